// Host memory and its copy on a backend's device: tensors are made and read on the host, and a
// backend is given the same tensors in its own memory.
#pragma once

#include <cstdint>
#include <vector>

#include "device/memory.h"
#include "diffkv/attention.h"
#include "diffkv/backend.h"

namespace diffkv::device {

// A backend that computes in host memory gets the host's tensors as they are: nothing is copied
// then, and upload and download do nothing.
class Mirror {
 public:
  explicit Mirror(const Backend& backend) : Mirror(backend, device_of(backend)) {}
  Mirror(const Backend& backend, const Device& device) : backend_(&backend), device_(device) {}

  // Makes a copy, not yet filled, of `bytes` bytes of host memory that must outlive this. The
  // copy's address is the same as the host's modulo 64. Throws Error(kUnavailable).
  void add(void* data, std::int64_t bytes);

  // Copies everything to the device, or the first `bytes` bytes from `data` on, which lie in memory
  // that was added; in the order of the stream. The host's memory must stay unchanged until the
  // stream is synchronized.
  void upload(Stream stream = {}) const;
  void upload(const void* data, std::int64_t bytes, Stream stream = {}) const;

  // Copies everything back once the stream has done what it was given, and waits for it.
  void download(Stream stream = {}) const;
  void download(void* data, std::int64_t bytes, Stream stream = {}) const;

  // The same tensors in the device's memory; those that are not given stay so. Throws
  // std::logic_error if one lies in memory that was not added.
  TensorView on_device(TensorView view) const;
  ConstTensorView on_device(ConstTensorView view) const;
  KvCacheView on_device(KvCacheView cache) const;
  Batch on_device(Batch batch) const;
  AttentionParams on_device(AttentionParams params) const;
  AttendArgs on_device(AttendArgs args) const;

 private:
  struct Range {
    std::byte* host;
    std::int64_t bytes;
    Memory memory;
    std::byte* device;  // of the copy, in memory
  };

  bool on_host() const { return computes_on_host(*backend_); }
  const Range& range_of(const void* data) const;
  std::byte* address(const void* data) const;

  const Backend* backend_;
  Device device_;
  std::vector<Range> ranges_;
};

}  // namespace diffkv::device
