#include "tests/device/separate_memory.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "diffkv/error.h"

namespace diffkv::testing {
namespace {

std::int64_t whole_pages(std::int64_t bytes) {
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  return (std::max<std::int64_t>(bytes, 1) + page - 1) / page * page;
}

// Bytes from the first element of a view to past its last.
std::int64_t extent(const ConstTensorView& view) {
  std::int64_t last = 0;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] == 0) return 0;
    last += (view.shape[i] - 1) * (view.shape[i] > 1 ? view.strides[i] : 0);
  }
  return (last + 1) * size_of(view.dtype);
}

}  // namespace

// Makes every allocation accessible for a scope.
class SeparateMemoryBackend::Open {
 public:
  explicit Open(const SeparateMemoryBackend& backend) : backend_(backend) {
    backend_.protect(PROT_READ | PROT_WRITE);
  }
  ~Open() { backend_.protect(PROT_NONE); }
  Open(const Open&) = delete;
  Open& operator=(const Open&) = delete;

 private:
  const SeparateMemoryBackend& backend_;
};

SeparateMemoryBackend::~SeparateMemoryBackend() {
  for (const auto& [data, bytes] : sizes_) {
    munmap(const_cast<std::byte*>(data), static_cast<std::size_t>(whole_pages(bytes)));
  }
}

void SeparateMemoryBackend::protect(int access) const {
  for (const auto& [data, bytes] : sizes_) {
    mprotect(const_cast<std::byte*>(data), static_cast<std::size_t>(whole_pages(bytes)), access);
  }
}

void SeparateMemoryBackend::require_host(const char* what) const {
  if (mode_ == Mode::kNow) return;
  throw Error(ErrorCode::kInvalidArgument, fmt::format("{} cannot be part of recorded work", what));
}

bool SeparateMemoryBackend::computes() const {
  if (mode_ == Mode::kRecording) return false;
  ++stages_;
  return true;
}

void SeparateMemoryBackend::copy_within(void* to, const void* from, std::int64_t bytes) const {
  require("a copy's destination", to, bytes);
  require("a copy's source", from, bytes);
  const Open open(*this);
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void SeparateMemoryBackend::require(const Device& device) const {
  if (device == device_) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("a call is for {}, expected {}", to_string(device), to_string(device_)));
}

void SeparateMemoryBackend::require(const std::string& what, const void* data,
                                    std::int64_t bytes) const {
  const auto* at = static_cast<const std::byte*>(data);
  auto it = sizes_.upper_bound(at);
  if (it != sizes_.begin()) {
    --it;
    if (bytes >= 0 && at + bytes <= it->first + it->second) return;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{} is not in the device's memory: {} bytes at {}", what, bytes, data));
}

void SeparateMemoryBackend::require(const char* what, const ConstTensorView& view) const {
  if (!view.given()) return;
  if (view.device != device_) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} is on {}", what, to_string(view.device)));
  }
  require(what, view.data, extent(view));
}

void SeparateMemoryBackend::require(const KvCacheView& cache) const {
  const auto plane = [&](const char* what, const KvPlane& p, std::int64_t size) {
    if (cache.num_blocks == 0 || cache.block_size == 0) return;
    const std::int64_t last = (cache.num_blocks > 1 ? (cache.num_blocks - 1) * p.stride_block : 0) +
                              (cache.block_size - 1) * p.stride_token +
                              (cache.num_kv_heads - 1) * p.stride_head + size;
    require(what, p.data, last * size_of(p.dtype));
  };
  plane("the cache's keys", cache.key, cache.head_size_qk);
  plane("the cache's values", cache.value, cache.head_size_v);
  require("k_scale", cache.k_scale);
  require("v_scale", cache.v_scale);
}

void SeparateMemoryBackend::require(const Batch& batch) const {
  require("query_start_loc", batch.query_start_loc);
  require("seq_lens", batch.seq_lens);
  require("block_table", batch.block_table);
  require("kv_start", batch.kv_start);
  require("causal_per_seq", batch.causal_per_seq);
  require("prefix_lens", batch.prefix_lens);
  require("mm_ranges", batch.mm_ranges);
}

void SeparateMemoryBackend::require(const AttentionParams& params, const AttendArgs& args,
                                    const Plan& plan) const {
  require("alibi_slopes", params.alibi_slopes);
  require("qq_bias", params.qq_bias);
  require("sinks", params.sinks);
  require("q_scale", params.q_scale);
  require("output_scale", params.output_scale);
  require("query", args.query);
  require(args.cache);
  require(args.batch);
  require("output", args.output);
  require("lse", args.lse);
  require("the plan", plan.tables().query_start_loc, size_of(DType::kI32));
}

void* SeparateMemoryBackend::allocate(std::int64_t bytes, const Device& device) const {
  require_host("an allocation");
  require(device);
  void* data = mmap(nullptr, static_cast<std::size_t>(whole_pages(bytes)), PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw Error(ErrorCode::kUnavailable, "no memory for a device");
  sizes_[static_cast<const std::byte*>(data)] = bytes;
  return data;
}

void SeparateMemoryBackend::deallocate(void* data, const Device& /*device*/) const noexcept {
  const auto it = sizes_.find(static_cast<const std::byte*>(data));
  munmap(data, static_cast<std::size_t>(whole_pages(it->second)));
  sizes_.erase(it);
}

void SeparateMemoryBackend::copy_to_device(void* to, const void* from, std::int64_t bytes,
                                           const Device& device, Stream stream) const {
  require_host("a copy");
  require(device);
  require("a copy's destination", to, bytes);
  const Open open(*this);
  cpu_.copy_to_device(to, from, bytes, device, stream);
}

void SeparateMemoryBackend::copy_to_host(void* to, const void* from, std::int64_t bytes,
                                         const Device& device, Stream stream) const {
  require_host("a copy");
  require(device);
  require("a copy's source", from, bytes);
  const Open open(*this);
  cpu_.copy_to_host(to, from, bytes, device, stream);
}

void SeparateMemoryBackend::fill_bytes(void* data, std::uint8_t value, std::int64_t bytes,
                                       const Device& device, Stream stream) const {
  require_host("a copy");
  require(device);
  require("what is filled", data, bytes);
  const Open open(*this);
  cpu_.fill_bytes(data, value, bytes, device, stream);
}

void SeparateMemoryBackend::synchronize(const Device& device, Stream stream) const {
  require_host("waiting for the device");
  require(device);
  cpu_.synchronize(device, stream);
}

void SeparateMemoryBackend::plan(const PlanKey& key, const ScheduleLimits& limits,
                                 const Batch& batch, detail::PlanTables& tables,
                                 Stream stream) const {
  require(batch);
  require("the plan", tables.query_start_loc, (batch.num_seqs + 1) * size_of(DType::kI32));
  if (!computes()) return;
  const Open open(*this);
  cpu_.plan(key, limits, batch, tables, stream);
}

void SeparateMemoryBackend::update_cache(const ConstTensorView& key, const ConstTensorView& value,
                                         const KvCacheView& cache,
                                         const ConstTensorView& slot_mapping, Stream stream) const {
  require("key", key);
  require("value", value);
  require(cache);
  require("slot_mapping", slot_mapping);
  if (!computes()) return;
  const Open open(*this);
  cpu_.update_cache(key, value, cache, slot_mapping, stream);
}

bool SeparateMemoryBackend::attend(const AttentionParams& params, const AttendArgs& args,
                                   const Plan& plan, Stream stream) const {
  require(params, args, plan);
  if (!computes()) return true;
  const Open open(*this);
  return cpu_.attend(params, args, plan, stream);
}

void SeparateMemoryBackend::combine(const AttentionParams& params, const AttendArgs& args,
                                    const Plan& plan, Stream stream) const {
  require(params, args, plan);
  if (!computes()) return;
  const Open open(*this);
  cpu_.combine(params, args, plan, stream);
}

void SeparateMemoryBackend::attend_whole(const AttentionParams& params, const AttendArgs& args,
                                         const Plan& plan, Stream stream) const {
  if (SeparateMemoryBackend::attend(params, args, plan, stream)) {
    SeparateMemoryBackend::combine(params, args, plan, stream);
  }
}

void SeparateMemoryBackend::merge_attn_states(const AttnState& a, const AttnState& b,
                                              const ConstTensorView& sinks,
                                              const TensorView& output, const TensorView& lse,
                                              Stream stream) const {
  require("a.output", a.output);
  require("a.lse", a.lse);
  require("b.output", b.output);
  require("b.lse", b.lse);
  require("sinks", sinks);
  require("output", output);
  require("lse", lse);
  if (!computes()) return;
  const Open open(*this);
  cpu_.merge_attn_states(a, b, sinks, output, lse, stream);
}

void SeparateMemoryBackend::fill_zero(const TensorView& output, Stream stream) const {
  require("output", output);
  if (!computes()) return;
  const Open open(*this);
  cpu_.fill_zero(output, stream);
}

}  // namespace diffkv::testing
