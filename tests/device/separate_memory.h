// A device without one: the CPU's kernels over memory that nobody else can touch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "diffkv/backend.h"

namespace diffkv::testing {

// A backend of device type kCuda. Its allocations are inaccessible except while one of its own
// calls runs: any other code of this process that reads or writes one, the library's included, ends
// the process. Everything is on the device of that number, and calls refuse any other; stages
// refuse tensors that do not lie in one allocation. One thread at a time.
class SeparateMemoryBackend : public Backend {
 public:
  explicit SeparateMemoryBackend(int index = 0) : device_{DeviceType::kCuda, index} {}
  ~SeparateMemoryBackend() override;

  // What is allocated now.
  std::int64_t allocations() const { return static_cast<std::int64_t>(sizes_.size()); }
  // Calls of stages that computed something so far.
  std::int64_t stages() const { return stages_; }

  // What a stream is doing: while it records, stages only look at their tensors; while it launches
  // what was recorded, they compute. In both the host may neither copy, wait nor allocate.
  enum class Mode : std::uint8_t { kNow, kRecording, kLaunching };
  Mode mode() const { return mode_; }
  void set_mode(Mode mode) const { mode_ = mode; }

  // Copies within its memory.
  void copy_within(void* to, const void* from, std::int64_t bytes) const;

  std::string_view name() const override { return "separate"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }
  std::string description() const override { return "the CPU over memory of its own"; }
  Support available() const override { return {true, "", "separate"}; }
  Support supports(const Problem& problem) const override { return cpu_.supports(problem); }
  ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const override {
    return cpu_.limits(key, threads);
  }
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

 protected:
  const Backend& cpu() const { return cpu_; }

  // This class's attend, and its combine of what that leaves: for tests that spoil the result.
  void attend_whole(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
                    Stream stream) const;

 private:
  class Open;

  // Throws Error unless it is this backend's.
  void require(const Device& device) const;
  // Throws Error unless the bytes lie in one allocation.
  void require(const std::string& what, const void* data, std::int64_t bytes) const;
  void require(const char* what, const ConstTensorView& view) const;
  void require(const KvCacheView& cache) const;
  void require(const Batch& batch) const;
  void require(const AttentionParams& params, const AttendArgs& args, const Plan& plan) const;
  void protect(int access) const;
  // Throws Error while recorded work is recorded or launched.
  void require_host(const char* what) const;
  // Whether a stage computes now; counts those that do.
  bool computes() const;

  Device device_;
  const Backend& cpu_ = find_backend("cpu");
  mutable std::map<const std::byte*, std::int64_t> sizes_;  // of each allocation, in bytes
  mutable std::int64_t stages_ = 0;
  mutable Mode mode_ = Mode::kNow;
};

}  // namespace diffkv::testing
