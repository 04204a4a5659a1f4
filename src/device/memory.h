// Memory of a backend's device, for programs that put tensors there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "diffkv/backend.h"

namespace diffkv::device {

// The device whose memory a backend computes in; of several, the first, where none is named.
Device device_of(const Backend& backend);

// Whether that is host memory, which needs no copies.
inline bool computes_on_host(const Backend& backend) {
  return backend.device_type() == DeviceType::kCpu;
}

// An allocation of a backend, 64-byte aligned.
class Memory {
 public:
  Memory() = default;
  // Throws Error(kUnavailable).
  Memory(const Backend& backend, std::int64_t bytes) : Memory(backend, bytes, device_of(backend)) {}
  Memory(const Backend& backend, std::int64_t bytes, const Device& device);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;

  std::byte* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }
  const Device& device() const { return device_; }

  // All in the order of the stream and as Backend's; `at` counts bytes from the start.
  void fill(std::uint8_t value, Stream stream = {}) const;
  void upload(const void* from, std::int64_t bytes, std::int64_t at = 0, Stream stream = {}) const;
  void download(void* to, std::int64_t bytes, std::int64_t at = 0, Stream stream = {}) const;

 private:
  const Backend* backend_ = nullptr;
  Device device_;
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace diffkv::device
