// The runner, on a backend that computes by the reference: right it must pass, and every way of
// being wrong must be noticed.
#include "verify/run.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "verify/codec.h"
#include "verify/reference.h"

namespace diffkv::verify {
namespace {

enum class Fault {
  kNone,
  kUnsupported,
  kZeros,           // output stays zero
  kOneRow,          // one row is wrong
  kLse,             // lse is wrong in one row
  kPastTheEnd,      // a row that is not covered is written
  kBeforeOutput,    // the guard zone is written
  kWritesCache,     // attend changes the cache
  kWritesInput,     // attend changes the query
  kUpdatesPadding,  // update_cache takes slot -1 for slot 0
  kForgetsUpdate,   // update_cache does nothing
  kUnsteady,        // every run gives other low bits
};

class FaultyBackend : public Backend {
 public:
  explicit FaultyBackend(Fault fault) : fault_(fault) {}

  std::string_view name() const override { return "faulty"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  std::string description() const override { return "the reference, with a fault"; }
  Support available() const override { return {true, "", ""}; }
  Support supports(const Problem&) const override {
    if (fault_ == Fault::kUnsupported) return {false, "not today", ""};
    return {true, "", "reference"};
  }
  ScheduleLimits limits(const PlanKey&, std::int32_t) const override {
    ScheduleLimits limits;
    limits.num_classes = 1;
    return limits;
  }
  void* allocate(std::int64_t bytes, const Device&) const override {
    return std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64));
  }
  void deallocate(void* data, const Device&) const noexcept override { std::free(data); }
  void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device&,
                      Stream) const override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device&,
                    Stream) const override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device&,
                  Stream) const override {
    if (bytes > 0) std::memset(data, value, static_cast<std::size_t>(bytes));
  }
  void synchronize(const Device&, Stream) const override {}
  void plan(const PlanKey&, const ScheduleLimits&, const Batch& batch, detail::PlanTables& tables,
            Stream) const override {
    tables.num_seqs = static_cast<std::int32_t>(batch.num_seqs);
    tables.num_tokens = static_cast<std::int32_t>(covered_tokens(batch));
    for (std::int64_t s = 0; s <= batch.num_seqs; ++s) {
      tables.query_start_loc[s] = static_cast<std::int32_t>(index_at(batch.query_start_loc, s));
      if (s < batch.num_seqs) {
        tables.seq_lens[s] = static_cast<std::int32_t>(index_at(batch.seq_lens, s));
      }
    }
  }
  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slots, Stream) const override {
    if (fault_ == Fault::kForgetsUpdate) return;
    std::vector<std::int64_t> mapping;
    for (std::int64_t i = 0; i < slots.shape[0]; ++i) {
      const std::int64_t slot = index_at(slots, i);
      mapping.push_back(fault_ == Fault::kUpdatesPadding && slot < 0 ? 0 : slot);
    }
    reference_update(key, value, cache, view_of(mapping.data(), {slots.shape[0]}));
  }
  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream) const override {
    const TensorView& out = args.output;
    const auto* query_bytes = static_cast<const std::byte*>(args.query.data);
    for (std::int64_t token = 0; token < covered_tokens(args.batch); ++token) {
      for (std::int64_t head = 0; head < plan.key().num_heads; ++head) {
        RowRef row = reference_row(plan.key(), params, args, token, head);
        if (fault_ == Fault::kZeros) row.output.assign(row.output.size(), 0.0);
        if (fault_ == Fault::kOneRow && token == 3 && head == 1) row.output[0] *= 1.5;
        if (fault_ == Fault::kLse && token == 3 && head == 1) row.lse += 0.1;
        if (fault_ == Fault::kUnsteady) row.output[0] *= 1 + 0.008 * (++runs_ % 2);
        for (std::int64_t d = 0; d < out.shape[2]; ++d) {
          store_bits(out.data, out.dtype, token * out.strides[0] + head * out.strides[1] + d,
                     encode(out.dtype, row.output[static_cast<std::size_t>(d)],
                            is_fp8(out.dtype) ? Overflow::kSaturate : Overflow::kInfinity));
        }
        if (args.lse.given()) {
          store_bits(args.lse.data, DType::kF32,
                     head * args.lse.strides[0] + token * args.lse.strides[1],
                     encode(DType::kF32, row.lse, Overflow::kInfinity));
        }
      }
    }
    auto* output_bytes = static_cast<std::byte*>(out.data);
    if (fault_ == Fault::kPastTheEnd) {
      output_bytes[covered_tokens(args.batch) * out.strides[0] * size_of(out.dtype)] = {};
    }
    if (fault_ == Fault::kBeforeOutput) output_bytes[-1] ^= std::byte{1};
    if (fault_ == Fault::kWritesCache) {
      static_cast<std::byte*>(args.cache.key.data)[0] ^= std::byte{1};
    }
    if (fault_ == Fault::kWritesInput) const_cast<std::byte*>(query_bytes)[0] ^= std::byte{1};
    return false;
  }
  void combine(const AttentionParams&, const AttendArgs&, const Plan&, Stream) const override {}
  void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                         const TensorView& output, const TensorView& lse, Stream) const override {
    for (std::int64_t token = 0; token < output.shape[0]; ++token) {
      for (std::int64_t head = 0; head < output.shape[1]; ++head) {
        const RowRef row = reference_merge_row(a, b, sinks, token, head);
        for (std::int64_t d = 0; d < output.shape[2]; ++d) {
          store_bits(
              output.data, output.dtype, token * output.strides[0] + head * output.strides[1] + d,
              encode(output.dtype, row.output[static_cast<std::size_t>(d)], Overflow::kInfinity));
        }
        store_bits(lse.data, DType::kF32, head * lse.strides[0] + token * lse.strides[1],
                   encode(DType::kF32, row.lse, Overflow::kInfinity));
      }
    }
  }
  void fill_zero(const TensorView&, Stream) const override {}

 private:
  Fault fault_;
  mutable int runs_ = 0;
};

Case find_case(const std::string& name) {
  for (const Case& c : cases(Suite::kFull)) {
    if (c.name == name) return c;
  }
  throw std::runtime_error("no case " + name);
}

CaseResult run(Fault fault, const std::string& name, bool deep = false) {
  return run_case(FaultyBackend(fault), find_case(name), 7, deep);
}

TEST(Run, TheReferencePasses) {
  for (const char* name :
       {"padding/mixed_actual-2", "kv_dtype/bf16_in_fp8_e4m3_mixed", "merge/mixed_bf16_sinks",
        "degenerate/mm_window7_clamp", "dense/encoder_bf16_8heads",
        "fp8_query/multi_fp8_e4m3_out_bf16", "output_scale/bf16_mixed", "nan/causal_fp32",
        "strided_output/mixed_bf16", "unit_strides/decode_fp8_e4m3_one_head"}) {
    const CaseResult result = run(Fault::kNone, name, true);
    EXPECT_TRUE(result.supported && result.ok) << name << ": " << result.message;
    EXPECT_GT(result.rows, 0) << name;
    EXPECT_LT(result.worst_error, result.tolerance) << name;
    EXPECT_EQ(result.kernel, "reference");
  }
}

TEST(Run, EveryFaultIsNoticed) {
  const std::pair<Fault, const char*> faults[] = {{Fault::kZeros, "rows are wrong"},
                                                  {Fault::kOneRow, "1 of"},
                                                  {Fault::kLse, "lse"},
                                                  {Fault::kPastTheEnd, "outside the"},
                                                  {Fault::kBeforeOutput, "before its start"},
                                                  {Fault::kWritesCache, "attend changed the cache"},
                                                  {Fault::kWritesInput, "query"},
                                                  {Fault::kUpdatesPadding, "update_cache"},
                                                  {Fault::kForgetsUpdate, "update_cache"}};
  for (const auto& [fault, what] : faults) {
    const CaseResult result = run(fault, "padding/mixed_actual-2");
    EXPECT_FALSE(result.ok) << what;
    EXPECT_NE(result.message.find(what), std::string::npos) << what << ": " << result.message;
  }
}

TEST(Run, DeepNoticesUnsteadyBits) {
  // An odd number of rows, so that the next run starts with the other factor.
  Case c = find_case("heads/7on7_decode");
  c.seqs.pop_back();
  const FaultyBackend backend(Fault::kUnsteady);
  EXPECT_TRUE(run_case(backend, c, 7, false).ok);
  const CaseResult result = run_case(backend, c, 7, true);
  EXPECT_NE(result.message.find("second run"), std::string::npos) << result.message;
}

TEST(Run, UnsupportedIsNotOk) {
  const CaseResult result = run(Fault::kUnsupported, "padding/mixed_actual-2");
  EXPECT_FALSE(result.supported);
  EXPECT_FALSE(result.ok);
  EXPECT_EQ(result.message, "not today");
}

TEST(Run, AnErrorOfTheLibraryIsAWrongResult) {
  Case c = find_case("padding/mixed_actual-2");
  c.key.head_size_qk = 12;
  const CaseResult result = run_case(FaultyBackend(Fault::kNone), c, 7, false);
  EXPECT_FALSE(result.ok);
  EXPECT_EQ(result.message.find("threw: "), 0U) << result.message;
}

}  // namespace
}  // namespace diffkv::verify
