// Memory with guard zones: what a backend reads and writes, and whether it wrote elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace diffkv::verify {

// Bytes between two guard zones of a known pattern. The content starts as 0xff, which is NaN in
// every floating-point type.
class GuardedBuffer {
 public:
  static constexpr std::int64_t kGuardBytes = 256;

  // The content starts `misalign` bytes past a 64-byte boundary. `name` is for messages.
  GuardedBuffer(std::string name, std::int64_t bytes, std::int64_t misalign = 0);
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  const std::string& name() const { return name_; }
  std::byte* data() { return storage_.data() + begin_; }
  const std::byte* data() const { return storage_.data() + begin_; }
  std::int64_t bytes() const { return bytes_; }

  // The content and both guard zones.
  std::byte* whole() { return data() - kGuardBytes; }
  std::int64_t whole_bytes() const { return bytes_ + 2 * kGuardBytes; }

  // Fills the content with 0xff.
  void poison();

  // The bytes of a guard zone: of index -kGuardBytes to -1 before the content, of the content's
  // size and up behind it.
  static std::byte guard_byte(std::int64_t index);
  // "" or which byte of which guard zone was overwritten.
  std::string guard_damage() const;

  // Remembers the content; changed() then says whether, and where first, it differs.
  void freeze() { frozen_ = content(); }
  // The remembered content; empty if it was never frozen.
  const std::vector<std::byte>& frozen() const { return frozen_; }
  // "" or the first byte that differs from the remembered content.
  std::string changed() const;

  std::vector<std::byte> content() const { return {data(), data() + bytes_}; }

 private:
  std::string name_;
  std::int64_t bytes_;
  std::int64_t begin_ = 0;
  std::vector<std::byte> storage_;
  std::vector<std::byte> frozen_;
};

}  // namespace diffkv::verify
