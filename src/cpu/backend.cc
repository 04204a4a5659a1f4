// Walks the plan with OpenMP threads.
#include "cpu/backend.h"

#include <fmt/format.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/validate.h"
#include "cpu/amx.h"
#include "cpu/bf16_dot.h"
#include "cpu/kernels.h"
#include "cpu/merge_states.h"
#include "cpu/processor.h"
#include "cpu/targets.h"
#include "diffkv/error.h"
#include "plan/host_plan.h"
#include "plan/schedule.h"

namespace diffkv::cpu {
namespace {

constexpr std::int64_t kAlignment = 64;
constexpr std::int64_t kHugePage = std::int64_t{2} << 20;
// Shares of a line of work a thread: spare ones even out threads that were held up.
constexpr std::int32_t kSharesPerThread = 4;
// Cost of a block of keys and of a tile, in conversions of a block: a decode tile adds up to three
// of arithmetic, a prefill tile about nineteen.
constexpr std::int32_t kDecodeBlockCost = 4;
constexpr std::int32_t kPrefillBlockCost = 20;
// A share's first block finds nothing fetched, and its partials are written and merged: about one
// and a half blocks more. With eight shares of 8 blocks a decode of 64 took 0.74 ms, with two 0.63.
constexpr std::int32_t kLeastShareBlocks = 32;
// Threads among which the heads of a share's cut tiles are dealt out for merging.
constexpr std::int32_t kCombineParts = 4;

class CpuBackend final : public Backend {
 public:
  CpuBackend() {
    try {
      current_target();  // the first choice, unless it is made
    } catch (const Error& error) {
      unavailable_ = error.what();  // DIFFKV_CPU_TARGET names a target that is not there
    }
  }

  std::string_view name() const override { return "cpu"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }

  std::string description() const override {
    return fmt::format("CPU, {}, {} threads", current_target(), omp_get_max_threads());
  }

  Support available() const override {
    if (!unavailable_.empty()) return {false, unavailable_, ""};
    return {true, "", "cpu/" + current_target()};
  }

  Support supports(const Problem& problem) const override {
    try {
      core::validate_key(problem.key);
      core::validate_output_dtype(problem.key, problem.output_scale, problem.output_dtype);
    } catch (const Error& error) {
      return {false, error.what(), ""};
    }
    if (!problem.dense && problem.block_size < 1) return {false, "block_size is below 1", ""};
    if (problem.output_block_scale) return {false, "output_block_scale is not supported", ""};
    return {true, "", "narrow+wide/" + current_target()};
  }

  ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const override {
    ScheduleLimits limits;
    limits.threads = threads > 0 ? threads : omp_get_max_threads();
    limits.num_classes = 2;
    TileClass& decode = limits.classes[0];
    decode.tile_rows = kDecodeRows;
    const std::int64_t heads = gains_by_long_runs(key) ? kMostTileHeads : kDecodeRows / key.group();
    decode.tile_heads =
        static_cast<std::int32_t>(std::clamp<std::int64_t>(heads, 1, kMostTileHeads));
    while (key.num_kv_heads % decode.tile_heads != 0) --decode.tile_heads;
    // A block of many heads is as much work as several of one.
    decode.least_cut = std::max(1, decode.least_cut / decode.tile_heads);
    decode.max_seq_rows = kDecodeRows;
    decode.block_cost = kDecodeBlockCost;
    decode.tile_cost = kDecodeBlockCost;
    decode.least_share_cost = kLeastShareBlocks * kDecodeBlockCost;
    TileClass& prefill = limits.classes[1];
    prefill.tile_rows = kPrefillRows;
    prefill.block_cost = kPrefillBlockCost;
    prefill.tile_cost = kPrefillBlockCost;
    // Its partials are wide: fewer of them.
    prefill.invariant_max_pieces = 4;
    limits.scratch_bytes = std::max(
        attend_scratch_bytes(kPrefillRows, 1, key.head_size_qk, key.head_size_v),
        attend_scratch_bytes(kDecodeRows, decode.tile_heads, key.head_size_qk, key.head_size_v));
    for (TileClass* cls : {&decode, &prefill}) {
      cls->block_keys = static_cast<std::int32_t>(kBlockKeys);
      cls->workers = limits.threads * kSharesPerThread;
    }
    return limits;
  }

  void* allocate(std::int64_t bytes, const Device& /*device*/) const override {
    // A layer's step reads rows all over a cache, each in another page of 4 KB: huge pages keep the
    // translations of addresses at hand.
    const std::int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : kAlignment;
    const auto size = static_cast<std::size_t>((bytes + alignment - 1) / alignment * alignment);
    void* data = std::aligned_alloc(static_cast<std::size_t>(alignment), size);
    if (data == nullptr) {
      throw Error(ErrorCode::kUnavailable, fmt::format("no memory for {} bytes", bytes));
    }
#ifdef MADV_HUGEPAGE
    // A wish: without it the memory is as good, only slower.
    if (alignment == kHugePage) static_cast<void>(madvise(data, size, MADV_HUGEPAGE));
#endif
    return data;
  }

  void deallocate(void* data, const Device& /*device*/) const noexcept override { std::free(data); }

  // The device's memory is the host's, and every call is done when it returns.
  void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device& /*device*/,
                      Stream /*stream*/) const override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device& /*device*/,
                    Stream /*stream*/) const override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device& /*device*/,
                  Stream /*stream*/) const override {
    if (bytes > 0) std::memset(data, value, static_cast<std::size_t>(bytes));
  }
  void synchronize(const Device& /*device*/, Stream /*stream*/) const override {}

  void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
            detail::PlanTables& tables, Stream /*stream*/) const override {
    plan::plan_on_host(key, limits, batch, tables);
  }

  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream /*stream*/) const override {
    const UpdateCall call{key, value, cache, slot_mapping};
    // Threads share the work by page, so that of two tokens for one slot the later one wins.
    const std::int64_t parts = std::min<std::int64_t>(
        omp_get_max_threads(), (slot_mapping.shape[0] + kTokensPerPart - 1) / kTokensPerPart);
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (std::int64_t part = 0; part < parts; ++part) update_cache_part(call, part, parts);
  }

  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream /*stream*/) const override {
    for_each_share(
        params, args, plan, 1,
        [](const AttendCall& call, std::int32_t cls, std::int32_t worker, std::int32_t /*part*/,
           std::byte* scratch) { attend_share(call, cls, worker, scratch); });
    return plan::cuts_tiles(plan.limits(), plan.key().policy, plan.tables());
  }

  void combine(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
               Stream /*stream*/) const override {
    // One long sequence may be a single tile of many heads.
    const std::int32_t parts = std::min(plan.limits().threads, kCombineParts);
    for_each_share(
        params, args, plan, parts,
        [&](const AttendCall& call, std::int32_t cls, std::int32_t worker, std::int32_t part,
            std::byte* scratch) { combine_share(call, cls, worker, part, parts, scratch); });
  }

  void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                         const TensorView& output, const TensorView& lse,
                         Stream /*stream*/) const override {
    const MergeCall call{a, b, sinks, output, lse};
#pragma omp parallel for collapse(2) \
    schedule(static) if (output.shape[0] * output.shape[1] >= kRowsForThreads)
    for (std::int64_t token = 0; token < output.shape[0]; ++token) {
      for (std::int64_t head = 0; head < output.shape[1]; ++head) merge_row(call, token, head);
    }
  }

  void fill_zero(const TensorView& output, Stream /*stream*/) const override {
    const std::int64_t bytes = size_of(output.dtype);
    for (std::int64_t token = 0; token < output.shape[0]; ++token) {
      for (std::int64_t head = 0; head < output.shape[1]; ++head) {
        auto* row = static_cast<std::byte*>(output.data) +
                    (token * output.strides[0] + head * output.strides[1]) * bytes;
        std::memset(row, 0, static_cast<std::size_t>(output.shape[2] * bytes));
      }
    }
  }

 private:
  static constexpr std::int64_t kTokensPerPart = 16;
  // Rows below which threads cost more than they save.
  static constexpr std::int64_t kRowsForThreads = 64;

  static bool multiplies_bf16(const PlanKey& key) {
    return uses_bf16_dot() && key.query_dtype == DType::kBF16 && bf16_dot_reads(key.key_dtype) &&
           bf16_dot_reads(key.value_dtype);
  }

  static bool multiplies_by_amx(const PlanKey& key) {
    const bool fp16 = key.query_dtype == DType::kF16 && key.key_dtype == DType::kF16 &&
                      key.value_dtype == DType::kF16;
    return uses_amx() && (fp16 || multiplies_bf16(key)) &&
           amx_multiplies(key.head_size_qk, key.head_size_v) && amx_permitted();
  }

  // Whether decode is faster in tiles of many KV heads though one's group fills a tile: where
  // memory limits such groups, too.
  static bool gains_by_long_runs(const PlanKey& key) {
    const bool near = tuning().row_blocks && tuning().near_fetch;
    return key.group() > kNarrowRows && multiplies_bf16(key) &&
           ((near && key.mask.window == 0) || multiplies_by_amx(key));
  }

  // Runs `parts` of every worker's share of every class on the plan's threads.
  template <class Fn>
  static void for_each_share(const AttentionParams& params, const AttendArgs& args,
                             const Plan& plan, std::int32_t parts, Fn&& fn) {
    const ScheduleLimits& limits = plan.limits();
    const PlanKey& key = plan.key();
    const AttendCall call{&params,
                          &args,
                          plan::schedule_view(key, limits, plan.tables(), args.batch),
                          tuning(),
                          multiplies_bf16(key),
                          multiplies_by_amx(key)};
    std::int32_t shares = 0;
    for (std::int32_t c = 0; c < limits.num_classes; ++c) shares += limits.classes[c].workers;
#pragma omp parallel for schedule(dynamic, 1) num_threads(limits.threads)
    for (std::int32_t i = 0; i < shares * parts; ++i) {
      std::int32_t worker = i / parts;
      std::int32_t cls = 0;
      while (worker >= limits.classes[cls].workers) worker -= limits.classes[cls++].workers;
      fn(call, cls, worker, i % parts,
         plan.tables().scratch + omp_get_thread_num() * limits.scratch_bytes);
    }
  }

  std::string unavailable_;  // why, or empty
};

}  // namespace

const Backend& backend() {
  static const CpuBackend instance;
  return instance;
}

}  // namespace diffkv::cpu
