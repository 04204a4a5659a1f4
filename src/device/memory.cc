#include "device/memory.h"

#include <algorithm>
#include <utility>

namespace diffkv::device {

Device device_of(const Backend& backend) { return {backend.device_type(), 0}; }

Memory::Memory(const Backend& backend, std::int64_t bytes, const Device& device)
    : backend_(&backend),
      device_(device),
      data_(static_cast<std::byte*>(backend.allocate(std::max<std::int64_t>(bytes, 1), device))),
      bytes_(bytes) {}

Memory::~Memory() {
  if (data_ != nullptr) backend_->deallocate(data_, device_);
}

Memory::Memory(Memory&& other) noexcept
    : backend_(other.backend_),
      device_(other.device_),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(backend_, other.backend_);
  std::swap(device_, other.device_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void Memory::fill(std::uint8_t value, Stream stream) const {
  backend_->fill_bytes(data_, value, bytes_, device_, stream);
}

void Memory::upload(const void* from, std::int64_t bytes, std::int64_t at, Stream stream) const {
  backend_->copy_to_device(data_ + at, from, bytes, device_, stream);
}

void Memory::download(void* to, std::int64_t bytes, std::int64_t at, Stream stream) const {
  backend_->copy_to_host(to, data_ + at, bytes, device_, stream);
}

}  // namespace diffkv::device
