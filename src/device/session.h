// A device at work, as programs need it beyond the stages: a stream, times by the device's own
// clock, work that is recorded once and launched again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "device/memory.h"
#include "diffkv/backend.h"

namespace diffkv::device {

// Points in the order of a stream whose distances in time can be told.
class Marks {
 public:
  virtual ~Marks() = default;
  // Part of what the stream does, also of what is recorded: each launch sets the mark anew.
  virtual void set(std::size_t mark) = 0;
  // Waits for both marks. Seconds between their last settings.
  virtual double seconds(std::size_t from, std::size_t to) = 0;
};

// Work that was recorded (a CUDA graph).
class Recording {
 public:
  virtual ~Recording() = default;
  // Does the work again, with what its memory then holds. May return before it is done.
  virtual void launch() = 0;
};

// Reads of device memory that find nothing in the caches, and what they take.
class ColdReads {
 public:
  virtual ~ColdReads() = default;
  // Leaves nothing of what was used before in the device's caches, and keeps the device busy for
  // the moment that the host needs to give it the next work.
  virtual void flush() = 0;
  // Seconds that the device takes only to read so many bytes of memory, each once, and to write so
  // many: one launch, from cold caches, the least median of several ways to do it.
  virtual double seconds(std::int64_t read_bytes, std::int64_t written_bytes) = 0;
};

class Session {
 public:
  explicit Session(const Backend& backend) : backend_(&backend) {}
  virtual ~Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Backend& backend() const { return *backend_; }
  Device device() const { return device_of(*backend_); }
  // Of the session's own.
  virtual Stream stream() const = 0;
  void synchronize() const { backend_->synchronize(device(), stream()); }

  virtual std::unique_ptr<Marks> make_marks(std::size_t count) const = 0;

  // "" or why work cannot be recorded here.
  virtual std::string cannot_record() const = 0;
  // Records what `work` gives to the stream, without doing it. Throws Error(kUnsupported) where
  // work cannot be recorded, or this work cannot.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& work) const = 0;

  // Copies within the device's memory, in the order of the stream.
  virtual void copy(void* to, const void* from, std::int64_t bytes) const = 0;

  // The best rate at which the device reads its memory, bytes per second; takes a moment.
  virtual double measure_read_rate() = 0;
  // Null for the host, whose caches are another matter.
  virtual ColdReads* cold_reads() { return nullptr; }

 private:
  const Backend* backend_;
};

// Throws Error(kUnavailable) if the backend cannot run here.
std::unique_ptr<Session> open_session(const Backend& backend);

}  // namespace diffkv::device
