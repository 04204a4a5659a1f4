// A generated problem in a backend's memory.
#pragma once

#include <string>
#include <vector>

#include "device/memory.h"
#include "device/mirror.h"
#include "verify/generate.h"

namespace diffkv::verify {

// What a backend is given: the problem's tensors in the backend's memory. The problem itself stays
// on the host, where the reference reads it and where everything is judged. Of a backend that
// computes in host memory both are one.
class PlacedProblem {
 public:
  // Copies every buffer, guard zones and poison included, to that device of the backend.
  PlacedProblem(const Backend& backend, GeneratedProblem& problem, const Device& device);

  GeneratedProblem& host() { return *problem_; }
  const GeneratedProblem& host() const { return *problem_; }
  const Backend& backend() const { return *backend_; }
  const Device& device() const { return device_; }

  // In the backend's memory.
  const AttentionParams& params() const { return params_; }
  const AttendArgs& args() const { return args_; }
  const ConstTensorView& new_key() const { return new_key_; }
  const ConstTensorView& new_value() const { return new_value_; }
  const ConstTensorView& slot_mapping() const { return slot_mapping_; }

  // Waits for the device and copies every buffer to the host, as the backend left it.
  void fetch() const { mirror_.download(); }
  // Makes output and lse NaN again, on both sides.
  void poison_outputs();

 private:
  const Backend* backend_;
  GeneratedProblem* problem_;
  Device device_;
  device::Mirror mirror_;
  AttentionParams params_;
  AttendArgs args_;
  ConstTensorView new_key_;
  ConstTensorView new_value_;
  ConstTensorView slot_mapping_;
};

// Device memory that no host buffer stands behind, such as a plan's: poisoned with NaN, between
// guard zones, 64-byte aligned.
class GuardedMemory {
 public:
  // `name` is for messages.
  GuardedMemory(const Backend& backend, std::string name, std::int64_t bytes, const Device& device);

  std::byte* data() const { return memory_.data() + GuardedBuffer::kGuardBytes; }
  std::int64_t bytes() const { return bytes_; }
  // Waits for the device. "" or which byte of which guard zone was overwritten.
  std::string guard_damage() const;

 private:
  const Backend* backend_;
  std::string name_;
  std::int64_t bytes_;
  device::Memory memory_;
};

}  // namespace diffkv::verify
