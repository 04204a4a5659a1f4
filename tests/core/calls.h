// Well-formed calls of the public API in small buffers, for tests that spoil one thing of them and
// expect a refusal that has changed nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "diffkv/diffkv.h"

namespace diffkv::test {

// Buffers of a call, filled with a pattern.
class Memory {
 public:
  // Zero-initialised where `fill` is 0; at a multiple of 64.
  void* take(std::int64_t bytes, unsigned char fill = 0x5a);

  template <class T>
  T* take_values(std::initializer_list<T> values) {
    auto* data = static_cast<T*>(take(static_cast<std::int64_t>(values.size() * sizeof(T))));
    std::copy(values.begin(), values.end(), data);
    return data;
  }

  // The bytes of all buffers.
  std::vector<unsigned char> snapshot() const;

 private:
  struct Free {
    void operator()(void* data) const;
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    std::int64_t bytes;
  };
  std::vector<Buffer> buffers_;
};

// Plans as the CPU backend does and counts the stages that write; it runs none of them, so that a
// call may carry memory that is not there. As a device backend it does not plan either.
class RecordingBackend : public Backend {
 public:
  explicit RecordingBackend(DeviceType type = DeviceType::kCpu) : type_(type) {}

  int writes() const { return writes_; }

  std::string_view name() const override { return "recording"; }
  DeviceType device_type() const override { return type_; }
  std::string description() const override { return "counts calls"; }
  Support available() const override { return {true, "", "none"}; }
  Support supports(const Problem&) const override { return {true, "", "none"}; }
  ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const override;
  void* allocate(std::int64_t bytes, const Device& device) const override;
  void deallocate(void* data, const Device& device) const noexcept override;
  void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device& device,
                      Stream stream) const override;
  void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device& device,
                    Stream stream) const override;
  void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device& device,
                  Stream stream) const override;
  void synchronize(const Device& device, Stream stream) const override;
  void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
            detail::PlanTables& tables, Stream stream) const override;
  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override;
  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override;
  void combine(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
               Stream stream) const override;
  void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                         const TensorView& output, const TensorView& lse,
                         Stream stream) const override;
  void fill_zero(const TensorView& output, Stream stream) const override;

 private:
  DeviceType type_;
  mutable int writes_ = 0;
};

// Three sequences of query lengths 2, 0, 3 and lengths 18, 0, 40 in a packed cache of 8 pages of 16
// tokens; 4 query heads, 2 KV heads, head sizes 24 and 16, bf16; 6 rows, 5 of them actual.
struct AttendCall {
  AttendCall();

  // Plans the key and batch as they now are, in the workspace there is.
  void make_plan_now();
  // The same in a new workspace.
  void replan();
  void attend() const;

  Memory memory;
  RecordingBackend backend;
  PlanKey key;
  PlanMaxima maxima;
  AttentionParams params;
  AttendArgs args;
  TensorView workspace;
  Plan plan;
  std::int32_t* query_start_loc = nullptr;
  std::int32_t* seq_lens = nullptr;
  std::int32_t* block_table = nullptr;  // [3, 4]
};

// 4 new tokens for the cache of AttendCall, the second of them skipped.
struct UpdateCall {
  UpdateCall();
  void update() const;

  Memory memory;
  RecordingBackend backend;
  KvCacheView cache;
  ConstTensorView key;
  ConstTensorView value;
  ConstTensorView slot_mapping;
  std::int64_t* slots = nullptr;
};

// Two states of 5 tokens, 4 heads, head_size_v 16, bf16.
struct MergeCall {
  MergeCall();
  void merge() const;

  Memory memory;
  RecordingBackend backend;
  AttnState a;
  AttnState b;
  ConstTensorView sinks;
  TensorView output;
  TensorView lse;
};

// One way to spoil a call: what the refusal must say.
template <class Call>
struct Refusal {
  std::string_view name;
  std::function<void(Call&)> spoil;
  std::vector<std::string> says;
  ErrorCode code = ErrorCode::kInvalidArgument;

  friend void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.name; }
};

// Runs `call` and expects an Error of that code whose message holds all of `says`, with neither
// memory changed nor a stage of the backend reached.
void expect_refused(const Memory& memory, const RecordingBackend& backend, ErrorCode code,
                    const std::vector<std::string>& says, const std::function<void()>& call);

// The same view, one field changed.
template <class View>
View with_shape(View view, int dim, std::int64_t extent) {
  view.shape[dim] = extent;
  return view;
}
template <class View>
View with_stride(View view, int dim, std::int64_t stride) {
  view.strides[dim] = stride;
  return view;
}
template <class View>
View with_dtype(View view, DType dtype) {
  view.dtype = dtype;
  return view;
}
template <class View>
View with_device(View view, DeviceType type, int index = 0) {
  view.device = {type, index};
  return view;
}
template <class View>
View moved(View view, std::int64_t bytes) {
  view.data = reinterpret_cast<decltype(view.data)>(reinterpret_cast<std::uintptr_t>(view.data) +
                                                    static_cast<std::uintptr_t>(bytes));
  return view;
}

}  // namespace diffkv::test
