// Compute backends: what one must provide, and how to find one.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "diffkv/attention.h"
#include "diffkv/plan.h"

namespace diffkv {

// A backend's answer to "do you run this?".
struct Support {
  bool ok = false;
  std::string reason;  // of a no, for the error message
  std::string kernel;  // of a yes: the code path, e.g. "decode+prefill/AVX3"

  explicit operator bool() const { return ok; }
};

// The stages of one device type. The pipeline calls them with validated arguments; they neither
// validate nor print. Implementations are stateless and may be called from any thread; a plan's
// workspace serves one call at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;  // "cpu", "cuda"
  virtual DeviceType device_type() const = 0;
  // One line for people: device, instruction set, threads.
  virtual std::string description() const = 0;
  // Whether it can run on this machine at all; `reason` says why not.
  virtual Support available() const = 0;

  virtual Support supports(const Problem& problem) const = 0;
  // For plans of this key on that many threads (0: as many as would run now).
  virtual ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const = 0;
  ScheduleLimits limits(const PlanKey& key) const { return limits(key, 0); }

  // Memory of the device, 64-byte aligned, e.g. for workspaces. Throws Error(kUnavailable).
  virtual void* allocate(std::int64_t bytes, const Device& device) const = 0;
  virtual void deallocate(void* data, const Device& device) const noexcept = 0;

  // Copies bytes from host memory to memory of the device, or back, in the order of the stream. The
  // call may return before the copy is done: until the stream is synchronized, both sides must stay
  // alive, the source unchanged and the destination unread. Throws Error if the device fails.
  virtual void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device& device,
                              Stream stream) const = 0;
  virtual void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device& device,
                            Stream stream) const = 0;
  // Sets every byte of the device's memory [data, data + bytes) to `value`, in the order of the
  // stream. Throws Error if the device fails.
  virtual void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device& device,
                          Stream stream) const = 0;
  // Returns once everything that was given to the stream is done. Throws Error if any of it failed.
  virtual void synchronize(const Device& device, Stream stream) const = 0;

  // Fills the tables from the batch.
  virtual void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                    detail::PlanTables& tables, Stream stream) const = 0;
  virtual void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                            const KvCacheView& cache, const ConstTensorView& slot_mapping,
                            Stream stream) const = 0;
  // Work items to outputs (whole tiles) and partials (cut tiles). Whether partials are left for
  // combine: a backend may merge them as it goes. Throws Error(kUnsupported) where it has no kernel
  // for such arguments; nobody asks supports() before.
  [[nodiscard]] virtual bool attend(const AttentionParams& params, const AttendArgs& args,
                                    const Plan& plan, Stream stream) const = 0;
  // Those partials to outputs.
  virtual void combine(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
                       Stream stream) const = 0;
  virtual void merge_attn_states(const AttnState& a, const AttnState& b,
                                 const ConstTensorView& sinks, const TensorView& output,
                                 const TensorView& lse, Stream stream) const = 0;
  virtual void fill_zero(const TensorView& output, Stream stream) const = 0;
};

// Every backend this library was built with, best first.
std::vector<const Backend*> backends();

// The backend of that name; "" means the environment variable DIFFKV_BACKEND, or without it the
// first available one. Throws Error(kUnavailable) with the names there are.
const Backend& find_backend(std::string_view name = "");

}  // namespace diffkv
