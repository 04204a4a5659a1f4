// Problems in memory, run, and compared.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "problem.h"

namespace diffkv::properties {
namespace {

constexpr std::size_t kGuard = 64;            // bytes before and after a buffer
constexpr std::int64_t kExtraRows = 2;        // of the output, past the last sequence's
constexpr std::int32_t kNoPage = 0x7fffff00;  // past a sequence's last block
constexpr std::int64_t kSparePages = 3;       // that no sequence has

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// NaN and infinity in turn, where the type has an infinity.
void poison(std::byte* elements, DType dtype, std::int64_t count) {
  const std::int64_t bytes = size_of(dtype);
  std::memset(elements, 0xff, at(count * bytes));  // NaN in every type
  std::uint32_t infinity = 0;
  if (dtype == DType::kF32) infinity = 0x7f800000;
  if (dtype == DType::kF16) infinity = 0x7c00;
  if (dtype == DType::kBF16) infinity = 0x7f80;
  if (dtype == DType::kE5M2) infinity = 0x7c;
  if (infinity == 0) return;
  for (std::int64_t i = 0; i < count; i += 2)
    std::memcpy(elements + i * bytes, &infinity, at(bytes));
}

// The keys and values of a batch in one of the layouts.
class CacheMemory {
 public:
  CacheMemory(const Problem& problem, const Layout& layout, const std::vector<std::size_t>& order)
      : key_(problem.key), layout_(layout) {
    std::int64_t pages = 0;
    for (const std::size_t s : order) {
      const std::int64_t blocks = blocks_of(problem.seqs[s]);
      pages += blocks;
      max_blocks_ = std::max(max_blocks_, blocks);
    }
    num_blocks_ = pages + kSparePages;
    const std::int64_t row =
        key_.num_kv_heads * (key_.head_size_qk + key_.head_size_v) * size_of(key_.key_dtype);
    bytes_.resize(at(num_blocks_ * layout.block_size * row));
    if (layout.poison) {
      poison(bytes_.data(), key_.key_dtype,
             static_cast<std::int64_t>(bytes_.size()) / size_of(key_.key_dtype));
    }
    std::vector<std::int32_t> free(at(num_blocks_));
    std::iota(free.begin(), free.end(), 0);
    Rng rng(layout.page_seed);
    // Dense sequences lie one after another: their "pages" stay in order.
    if (!layout.dense) std::shuffle(free.begin(), free.end(), rng);
    std::size_t next = 0;
    for (const std::size_t s : order) {
      const std::int64_t blocks = blocks_of(problem.seqs[s]);
      const std::size_t first = next;
      for (std::int64_t b = 0; b < max_blocks_; ++b) {
        block_table_.push_back(b < blocks ? free[next++] : kNoPage);
      }
      kv_start_.push_back(
          static_cast<std::int32_t>(static_cast<std::int64_t>(free[first]) * layout.block_size));
      fill(problem.seqs[s], &block_table_[block_table_.size() - at(max_blocks_)]);
    }
  }

  KvCacheView view() {
    const std::int64_t tokens = num_blocks_ * layout_.block_size;
    if (layout_.dense) {
      return KvCacheView::dense_tokens(
          ConstTensorView(bytes_.data(), key_.key_dtype,
                          {tokens, key_.num_kv_heads, key_.head_size_qk}),
          ConstTensorView(bytes_.data() + value_offset(), key_.value_dtype,
                          {tokens, key_.num_kv_heads, key_.head_size_v}));
    }
    TensorView cache(bytes_.data(), key_.key_dtype,
                     {num_blocks_, layout_.block_size, key_.num_kv_heads, row_size()});
    if (layout_.order == KvCacheLayout::kHND) {
      cache.strides[1] = row_size();
      cache.strides[2] = layout_.block_size * row_size();
    }
    return KvCacheView::packed(cache, key_.head_size_qk);
  }

  void set(Batch& batch) const {
    if (layout_.dense) {
      batch.kv_start = view_of(kv_start_.data(), {batch.num_seqs});
    } else {
      batch.block_table = view_of(block_table_.data(), {batch.num_seqs, max_blocks_});
    }
  }

  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  std::int64_t row_size() const { return key_.head_size_qk + key_.head_size_v; }
  std::int64_t blocks_of(const Seq& seq) const {
    return (seq.seq_len + layout_.block_size - 1) / layout_.block_size;
  }
  // Dense: where V begins.
  std::int64_t value_offset() const {
    return num_blocks_ * layout_.block_size * key_.num_kv_heads * key_.head_size_qk *
           size_of(key_.key_dtype);
  }

  // Elements from the start to (token, head) of K and of V; `token` counts through all pages.
  std::int64_t key_offset(std::int64_t token, std::int64_t head) const {
    if (layout_.dense) return (token * key_.num_kv_heads + head) * key_.head_size_qk;
    const std::int64_t page = token / layout_.block_size;
    const std::int64_t slot = token % layout_.block_size;
    const std::int64_t within = layout_.order == KvCacheLayout::kNHD
                                    ? slot * key_.num_kv_heads + head
                                    : head * layout_.block_size + slot;
    return (page * layout_.block_size * key_.num_kv_heads + within) * row_size();
  }

  void fill(const Seq& seq, const std::int32_t* pages) {
    const std::int64_t size = size_of(key_.key_dtype);
    for (std::int64_t j = 0; j < seq.seq_len; ++j) {
      const std::int64_t token =
          pages[j / layout_.block_size] * layout_.block_size + j % layout_.block_size;
      bool read = !layout_.poison;
      for (std::int64_t i = 0; i < seq.query_len && !read; ++i) read = sees(key_, seq, i, j);
      for (std::int64_t h = 0; h < key_.num_kv_heads && read; ++h) {
        std::byte* key = bytes_.data() + key_offset(token, h) * size;
        std::byte* value = layout_.dense
                               ? bytes_.data() + value_offset() +
                                     (token * key_.num_kv_heads + h) * key_.head_size_v * size
                               : key + key_.head_size_qk * size;
        const std::int64_t row = j * key_.num_kv_heads + h;
        std::memcpy(key, seq.key.data() + row * key_.head_size_qk * size,
                    at(key_.head_size_qk * size));
        std::memcpy(value, seq.value.data() + row * key_.head_size_v * size,
                    at(key_.head_size_v * size));
      }
    }
  }

  PlanKey key_;
  Layout layout_;
  std::int64_t num_blocks_ = 0;
  std::int64_t max_blocks_ = 1;
  std::vector<std::byte> bytes_;
  std::vector<std::int32_t> block_table_;
  std::vector<std::int32_t> kv_start_;
};

// A buffer between two guards, filled with one byte.
class Guarded {
 public:
  Guarded(std::int64_t size, std::uint8_t fill)
      : fill_(static_cast<std::byte>(fill)), bytes_(at(size) + 2 * kGuard, fill_) {}

  std::byte* data() { return bytes_.data() + kGuard; }
  // Every byte outside [begin, end) is as it was.
  bool untouched_outside(std::int64_t begin, std::int64_t end) const {
    const auto same = [this](std::byte b) { return b == fill_; };
    const auto first = bytes_.begin() + static_cast<std::ptrdiff_t>(kGuard);
    return std::all_of(bytes_.begin(), first + begin, same) &&
           std::all_of(first + end, bytes_.end(), same);
  }

 private:
  std::byte fill_;
  std::vector<std::byte> bytes_;
};

double tolerance_of(const Problem& problem) {
  if (problem.key.query_dtype == DType::kE4M3) return 5e-2;
  if (problem.output_dtype == DType::kF32) return 1e-5;
  return problem.output_dtype == DType::kF16 ? 1e-3 : 6e-3;
}

}  // namespace

Layout random_layout(Rng& rng) {
  Layout layout;
  layout.dense = chance(rng, 0.2);
  layout.order = chance(rng, 0.5) ? KvCacheLayout::kNHD : KvCacheLayout::kHND;
  layout.block_size = pick<std::int64_t>(rng, {1, 5, 13, 16, 16, 32, 64, 100, 128});
  layout.page_seed = rng();
  return layout;
}

Result run(const Backend& backend, const Problem& problem, const Layout& layout) {
  const PlanKey& key = problem.key;
  const std::vector<std::size_t> order = layout.seqs.empty() ? all_seqs(problem) : layout.seqs;
  CacheMemory cache(problem, layout, order);
  BatchTensors tensors(problem, order);
  cache.set(tensors.batch);
  const Batch& batch = tensors.batch;
  std::vector<std::byte> query;
  for (const std::size_t s : order) {
    query.insert(query.end(), problem.seqs[s].query.begin(), problem.seqs[s].query.end());
  }

  // Outputs start as a byte that depends on the layout: a row that is not written differs.
  const auto fill = static_cast<std::uint8_t>(layout.page_seed & 0xff);
  const std::int64_t tokens = batch.num_actual_tokens + kExtraRows;
  const std::int64_t row_bytes = key.num_heads * key.head_size_v * size_of(problem.output_dtype);
  query.resize(query.size() +
               at(kExtraRows * key.num_heads * key.head_size_qk * size_of(key.query_dtype)));
  Guarded output(tokens * row_bytes, fill);
  Guarded lse(key.num_heads * tokens * 4, fill);
  AttendArgs args;
  args.query =
      ConstTensorView(query.data(), key.query_dtype, {tokens, key.num_heads, key.head_size_qk});
  args.cache = cache.view();
  args.batch = batch;
  args.output =
      TensorView(output.data(), problem.output_dtype, {tokens, key.num_heads, key.head_size_v});
  args.lse = TensorView(lse.data(), DType::kF32, {key.num_heads, tokens});

  const std::int64_t bytes = workspace_bytes(backend, key, tensors.maxima);
  void* workspace = backend.allocate(bytes, {});
  std::memset(workspace, 0xff, at(bytes));  // NaN, and indices far out of range
  const std::vector<std::byte> cache_before = cache.bytes();
  try {
    const Plan plan =
        make_plan(backend, key, tensors.maxima, batch, TensorView(workspace, DType::kU8, {bytes}));
    attend(backend, params_of(problem), args, plan);
  } catch (...) {
    backend.deallocate(workspace, {});
    throw;
  }
  backend.deallocate(workspace, {});

  Result result;
  result.cache_intact = cache_before == cache.bytes();
  result.guards_intact = output.untouched_outside(0, batch.num_actual_tokens * row_bytes) &&
                         lse.untouched_outside(0, key.num_heads * tokens * 4);
  const auto* lse_values = reinterpret_cast<const float*>(lse.data());
  float untouched = 0.0F;
  std::memset(&untouched, fill, sizeof(untouched));
  for (std::int64_t h = 0; h < key.num_heads; ++h) {
    for (std::int64_t t = batch.num_actual_tokens; t < tokens; ++t) {
      result.guards_intact =
          result.guards_intact && std::memcmp(&lse_values[h * tokens + t], &untouched, 4) == 0;
    }
  }
  for (std::size_t s = 0; s < order.size(); ++s) {
    SeqResult seq;
    const std::int64_t first = tensors.query_start_loc[s];
    const std::int64_t last = tensors.query_start_loc[s + 1];
    seq.output.assign(output.data() + first * row_bytes, output.data() + last * row_bytes);
    for (std::int64_t t = first; t < last; ++t) {
      for (std::int64_t h = 0; h < key.num_heads; ++h) {
        seq.lse.push_back(lse_values[h * tokens + t]);
      }
    }
    result.seqs.push_back(std::move(seq));
  }
  return result;
}

std::string bit_difference(const SeqResult& a, const SeqResult& b) {
  if (a.output.size() != b.output.size() || a.lse.size() != b.lse.size()) return "other sizes";
  for (std::size_t i = 0; i < a.output.size(); ++i) {
    if (a.output[i] != b.output[i]) return "output differs at byte " + std::to_string(i);
  }
  for (std::size_t i = 0; i < a.lse.size(); ++i) {
    if (std::memcmp(&a.lse[i], &b.lse[i], sizeof(float)) != 0) {
      return "lse differs at (token, head) pair " + std::to_string(i);
    }
  }
  return "";
}

std::string difference(const Problem& problem, const SeqResult& a, const SeqResult& b) {
  if (a.output.size() != b.output.size() || a.lse.size() != b.lse.size()) return "other sizes";
  const std::vector<double> left = values_of(a.output, problem.output_dtype);
  const std::vector<double> right = values_of(b.output, problem.output_dtype);
  const double tolerance = 2.0 * tolerance_of(problem);  // each side may be off by one
  const double lse_tolerance = problem.output_dtype == DType::kF32 ? 2e-4 : 2e-3;
  const std::size_t row_size = at(problem.key.head_size_v);
  for (std::size_t row = 0; row < a.lse.size(); ++row) {
    double square = 0.0;
    double norm = 0.0;
    for (std::size_t d = row * row_size; d < (row + 1) * row_size; ++d) {
      square += (left[d] - right[d]) * (left[d] - right[d]);
      norm += right[d] * right[d];
    }
    const std::string where = "(token, head) pair " + std::to_string(row);
    if (!(std::sqrt(square) <= tolerance * std::sqrt(norm))) {
      return where + ": outputs differ by " + std::to_string(std::sqrt(square)) + " of " +
             std::to_string(std::sqrt(norm));
    }
    const bool same_infinity = std::isinf(a.lse[row]) && a.lse[row] == b.lse[row];
    if (!same_infinity && !(std::abs(a.lse[row] - b.lse[row]) <= lse_tolerance)) {
      return where + ": lse is " + std::to_string(a.lse[row]) + " and " +
             std::to_string(b.lse[row]);
    }
  }
  return "";
}

}  // namespace diffkv::properties
