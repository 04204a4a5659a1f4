// Rows that will be read next, brought into the cache between the products.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/tile_base.h"
#include "diffkv/cache.h"

namespace diffkv::cpu {

// Fetches rows line by line in the order of their addresses, a few lines at a time between the
// products, into the second-level cache: there are more buffers for misses there than at the first
// level, whose two dozen, a line each in 110 ns, would read 14 GB/s. Seen on Zen 4, one thread,
// 8 x 4096 of 192/128 bf16: 12.0 ms at a group of 8 instead of 16.8 by fetches into the first
// level, 18.8 instead of 24.3 at 4, 17.8 instead of 20.3 at 1, 9.0 instead of 9.2 at 16. Loads in
// place of prefetches take longer than both (21, 28, 24, 12.1), as they wait in order, and so does
// touching the rows of a block before the fetches come (one line a page, or of every second row).
// Four lines at a time instead of one take 17.6 ms instead of 15.4 at a group of 1 in fp32
// products. Nor did it help to bring lines on into the first level shortly before they are read, or
// to fetch three blocks ahead instead of one.
//
// On Zen 5 into the first level (Tuning::near_fetch), though a block is more than that holds: two
// threads, 8 x 4096 of bf16 as above, least of four runs in turn with the second level: 4.3 ms
// instead of 5.5 at a group of 8, 8.3 instead of 8.9 at 4, 1.59 instead of 1.81 with a window, 1 x
// 4096 0.38 instead of 0.53, in tiles of one KV head; fp16, fp8 and prefill take as long either
// way. Past all levels (locality 0) is as fast. Tried there: lines of the two halves of 16 rows in
// turn (pages of 16 tokens 2 % faster in tiles of four KV heads, fp16 10 % slower). On a Xeon it is
// slower: fp16 7.8 ms instead of 6.9, a group of 4 19.7 instead of 17.5.
class Fetch {
 public:
  static constexpr std::int64_t kUnit = kFetchUnit;  // elements

  explicit Fetch(bool near = false) : near_(near) {}

  // `count` rows of so many bytes, of elements of so many.
  void add(const std::byte* const* rows, std::int64_t count, std::int64_t bytes,
           std::int64_t element) {
    if (count == 0) return;
    runs_[static_cast<std::size_t>(num_runs_++)] = {rows, count, bytes};
    step_ = std::max(step_, element * kUnit);
    if (num_runs_ == 1) start_row();
  }

  // Fetches n times kUnit elements, and the rest of the last line. The kernels call it for as much
  // as they read.
  void units(std::int64_t n) {
    const std::byte* at = at_;
    for (std::int64_t left = n * step_; left > 0 && at < end_; left -= kCacheLine) {
      line(at);
      at += kCacheLine;
      if (at < end_) continue;
      next_row();
      at = at_;
    }
    at_ = at;
  }

  // The same, but not past the end of a row: less code, for kernels that do little in between. By
  // two threads of a Zen 5, 8 x 4096 of bf16: 9.9 ms instead of 10.4 at a group of 4, 11.1 instead
  // of 11.9 at 1, but 5.2 instead of 4.7 at 8; in fp32 products (AVX3) 10.0 to 10.4 instead of 11.5
  // at 1, 11.0 to 11.3 instead of 10.9 at 4.
  void units_of_row(std::int64_t n) {
    const std::byte* at = at_;
    if (at >= end_) return;
    const std::byte* const stop = std::min(at + n * step_, end_);
    do {
      line(at);
      at += kCacheLine;
    } while (at < stop);
    at_ = at;
    if (at >= end_) next_row();
  }

 private:
  void line(const std::byte* at) const {
    if (near_) {
      __builtin_prefetch(at, /*rw=*/0, /*locality=*/3);
    } else {
      __builtin_prefetch(at, /*rw=*/0, /*locality=*/2);
    }
  }

  struct Run {
    const std::byte* const* rows = nullptr;
    std::int64_t count = 0;
    std::int64_t bytes = 0;
  };

  void start_row() {
    const Run& run = runs_[static_cast<std::size_t>(run_)];
    at_ = run.rows[row_];
    end_ = at_ + run.bytes;
  }

  void next_row() {
    if (++row_ == runs_[static_cast<std::size_t>(run_)].count) {
      row_ = 0;
      if (++run_ == num_runs_) {
        at_ = end_ = nullptr;
        return;
      }
    }
    start_row();
  }

  const std::byte* at_ = nullptr;  // of the row at hand; at its end: nothing is left
  const std::byte* end_ = nullptr;
  std::int64_t step_ = 0;  // bytes of kUnit elements
  std::array<Run, 2> runs_;
  std::int32_t num_runs_ = 0;
  std::int32_t run_ = 0;
  std::int64_t row_ = 0;
  bool near_;  // into the first-level cache
};

// n units, by less code if `kOfRow`.
template <bool kOfRow>
void fetch_units(Fetch& fetch, std::int64_t n) {
  if constexpr (kOfRow) {
    fetch.units_of_row(n);
  } else {
    fetch.units(n);
  }
}

// Asks for a row in every few, all at once, so that addresses of many pages are translated side by
// side: a prefetch whose page is not at hand waits for its translation, and holds up what follows.
// Seen on Zen 5, two threads, pages of 16: 8 x 4096 of fp16 3.75 ms instead of 3.83, with a window
// 1.34 instead of 1.41; contiguous keys take as long as without. Every 16th row is as good; each
// row, or every second, is slower.
inline void touch(const BlockRows& rows) {
  constexpr std::int64_t kStep = 8;
  for (std::int64_t k = 0; k < rows.count(); k += kStep) {
    __builtin_prefetch(rows.key[static_cast<std::size_t>(k)], /*rw=*/0, /*locality=*/3);
  }
}

// What head `head` of a tile's `heads` fetches while it works: of a cache whose rows of
// neighbouring heads are neighbours (NHD) its share of the tokens, all heads of each; else its own
// rows. `first` and `own`: the next block's rows of the tile's first head and of this one.
inline Fetch fetch_of(bool near, const KvCacheView& cache, const BlockRows& first,
                      const BlockRows& own, std::int64_t head, std::int64_t heads) {
  const KvPlane& key = cache.key;
  const KvPlane& value = cache.value;
  const std::int64_t key_bytes = cache.head_size_qk * size_of(key.dtype);
  const std::int64_t value_bytes = cache.head_size_v * size_of(value.dtype);
  const std::int64_t row_bytes = key_bytes + value_bytes;
  if (near && head == 0) touch(first);
  Fetch fetch(near);
  if (own.key[0] + key_bytes != own.value[0]) {
    fetch.add(own.key.data(), own.count(), key_bytes, size_of(key.dtype));
    fetch.add(own.value.data(), own.count(), value_bytes, size_of(value.dtype));
  } else if (heads == 1 || key.stride_head * size_of(key.dtype) != row_bytes) {
    fetch.add(own.key.data(), own.count(), row_bytes, size_of(key.dtype));
  } else {
    const std::int64_t begin = own.count() * head / heads;
    const std::int64_t end = own.count() * (head + 1) / heads;
    fetch.add(first.key.data() + begin, end - begin, row_bytes * heads, size_of(key.dtype));
  }
  return fetch;
}

}  // namespace diffkv::cpu
