// The cache of a generated problem: pages, their poison, what earlier steps left in them and where
// this step's tokens go.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "verify/codec.h"
#include "verify/generate.h"

namespace diffkv::verify {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::int32_t kBadBlock = 0x3fffffff;
constexpr std::int64_t kUnusedPages = 2;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Values that conversions get wrong: ties, the ends of the range, subnormals, no numbers.
constexpr double kSpecial[] = {0.0,     -0.0,   kNan,    kInf,  -kInf,    448.0,   464.0,  480.0,
                               -465.0,  1e-3,   0.00195, 1e-6,  57344.0,  61440.0, -1e30,  17.0,
                               19.0,    1.0625, 1.1875,  13.5,  25,       27,      23,     0.8125,
                               0.90625, 3.125,  3.375,   65504, 0.015625, 3e-8,    -2e-38, 0.3};

}  // namespace

void GeneratedProblem::make_pools() {
  const PlanKey& key = case_.key;
  const std::int64_t n = case_.block_size;
  const std::int64_t heads = key.num_kv_heads;
  std::int64_t pages = 1 + kUnusedPages + ceil_div(case_.special_values ? 18 : 0, n);
  for (const SeqShape& seq : case_.seqs) pages += ceil_div(seq.seq_len, n);
  for (std::int32_t page = 1; page < pages; ++page) page_order_.push_back(page);
  for (std::size_t i = page_order_.size(); i > 1; --i) {
    std::swap(page_order_[i - 1],
              page_order_[static_cast<std::size_t>(random_.below(static_cast<std::int64_t>(i)))]);
  }

  // A pool [pages, n, heads, row]; HND keeps the heads before the tokens.
  const auto pool = [&](const char* name, DType dtype, std::int64_t row, bool hnd,
                        std::int64_t padding) {
    const std::int64_t stride_block = n * heads * row + padding;
    GuardedBuffer& memory = new_buffer(name, pages * stride_block * size_of(dtype), dtype);
    pools_.push_back(&memory);
    TensorView view(memory.data(), case_.uint8_cache ? DType::kU8 : dtype, {pages, n, heads, row});
    view.strides = {stride_block, hnd ? row : heads * row, hnd ? n * row : row, 1};
    return with_odd_strides(view);
  };
  if (case_.cache == CaseCache::kSeparate) {
    const TensorView k = pool("key pool", key.key_dtype, key.head_size_qk, false, 32);
    const TensorView v = pool("value pool", key.value_dtype, key.head_size_v, true, 0);
    args_.cache = KvCacheView::separate(k, v);
  } else {
    const bool hnd = case_.cache == CaseCache::kPackedHND;
    const std::int64_t padding = case_.cache == CaseCache::kPackedPadded ? 48 : 0;
    const TensorView kv =
        pool("cache", key.key_dtype, key.head_size_qk + key.head_size_v, hnd, padding);
    args_.cache = KvCacheView::packed(kv, key.head_size_qk, key.key_dtype);
  }
}

void GeneratedProblem::make_block_table() {
  Batch& batch = args_.batch;
  std::int64_t width = 1;
  for (const SeqShape& seq : case_.seqs) {
    width = std::max(width, ceil_div(seq.seq_len, case_.block_size) + 1);
  }
  maxima_.max_seq_len = width * case_.block_size;
  std::vector<std::int32_t> table(static_cast<std::size_t>(batch.num_seqs * width), kBadBlock);
  std::size_t next = 0;
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const std::int64_t len = case_.seqs[static_cast<std::size_t>(s)].seq_len;
    for (std::int64_t b = 0; b < ceil_div(len, case_.block_size); ++b) {
      table[static_cast<std::size_t>(s * width + b)] = page_order_[next++];
    }
  }
  for (; case_.special_values && next < page_order_.size(); ++next) {
    for (std::int64_t i = 0; i < case_.block_size; ++i) {
      special_slots_.push_back(page_order_[next] * case_.block_size + i);
    }
  }
  for (std::int64_t s = 0; case_.null_blocks && s < batch.num_seqs; ++s) {
    const SeqShape& seq = case_.seqs[static_cast<std::size_t>(s)];
    for (std::int64_t b = 0; b < ceil_div(seq.seq_len, case_.block_size); ++b) {
      bool read = false;
      for (std::int64_t i = 0; i < seq.query_len && !read; ++i) {
        const RowPlace place = place_row(batch, query_start_[static_cast<std::size_t>(s)] + i);
        for (std::int64_t j = b * case_.block_size; j < (b + 1) * case_.block_size; ++j) {
          // Pages that this step writes stay, read or not.
          read = read || j >= place.context_len || sees(case_.key.mask, batch, place, j);
        }
      }
      if (!read) table[static_cast<std::size_t>(s * width + b)] = 0;
    }
  }
  batch.block_table =
      index_tensor("block_table", table.data(), {batch.num_seqs, width}, DType::kI32);
}

void GeneratedProblem::make_dense() {
  const PlanKey& key = case_.key;
  Batch& batch = args_.batch;
  const bool encoder = case_.flow == CaseFlow::kLayer;  // keys are this step's tokens
  std::vector<std::int32_t> starts(static_cast<std::size_t>(batch.num_seqs));
  std::int64_t tokens = 3;
  for (std::size_t s = starts.size(); s-- > 0;) {
    starts[s] = static_cast<std::int32_t>(encoder ? query_start_[s] : tokens);
    tokens += case_.seqs[s].seq_len + 2;
  }
  if (encoder) tokens = num_rows_;
  batch.kv_start = index_tensor("kv_start", starts.data(), {batch.num_seqs}, DType::kI32);
  const auto dense = [&](const char* name, DType dtype, std::int64_t row) {
    const std::int64_t heads = key.num_kv_heads;
    GuardedBuffer& memory = new_buffer(name, tokens * heads * row * size_of(dtype), dtype);
    pools_.push_back(&memory);
    return with_odd_strides(ConstTensorView(memory.data(), dtype, {tokens, heads, row}));
  };
  new_key_ = dense("dense key", key.key_dtype, key.head_size_qk);
  new_value_ = dense("dense value", key.value_dtype, key.head_size_v);
  args_.cache = KvCacheView::dense_tokens(new_key_, new_value_);
}

void GeneratedProblem::make_scales() {
  if (case_.scales == CaseScale::kNone) return;
  const bool per_tensor = case_.scales == CaseScale::kPerTensor;
  std::vector<double> k;
  std::vector<double> v;
  for (std::int64_t h = 0; h < (per_tensor ? 1 : case_.key.num_kv_heads); ++h) {
    // Few bits, so that a tie times a scale is exact in bf16, and no power of two, so that a
    // product with the reciprocal is not the quotient.
    k.push_back(static_cast<double>(3 + 2 * (h % 3)) / 128);
    v.push_back(static_cast<double>(3 + 2 * ((h + 1) % 4)) / 256);
  }
  const std::int64_t stride = case_.scales == CaseScale::kPerHeadStrided ? 3 : 1;
  args_.cache.k_scale = value_vector("k_scale", DType::kF32, k, stride);
  args_.cache.v_scale = value_vector("v_scale", DType::kF32, v, stride);
}

// Memory starts as NaN; every third element of a row becomes an infinity, where the type has one.
void GeneratedProblem::poison_cache() const {
  const KvCacheView& cache = args_.cache;
  const auto poison = [&](const KvPlane& plane, std::int64_t size) {
    const std::uint32_t inf = encode(plane.dtype, kInf, Overflow::kInfinity);
    for (std::int64_t b = 0; b < (cache.dense ? 1 : cache.num_blocks); ++b) {
      for (std::int64_t t = 0; t < cache.block_size; ++t) {
        for (std::int64_t h = 0; h < cache.num_kv_heads; ++h) {
          for (std::int64_t d = 0; d < size; d += 3) {
            store_bits(plane.data, plane.dtype,
                       b * plane.stride_block + t * plane.stride_token + h * plane.stride_head + d,
                       inf);
          }
        }
      }
    }
  };
  poison(cache.key, cache.head_size_qk);
  poison(cache.value, cache.head_size_v);
}

bool GeneratedProblem::is_new(const RowPlace& place) const {
  if (case_.cache == CaseCache::kDense || case_.flow == CaseFlow::kSharing) return false;
  return place.position >= 0 && !(case_.skip_slots && place.query % 3 == 1);
}

void GeneratedProblem::put_row(const KvPlane& plane, const KeyPlace& place, std::int64_t head,
                               const std::vector<double>& values, double scale) const {
  const std::int64_t at = place.block * plane.stride_block + place.token * plane.stride_token +
                          head * plane.stride_head;
  for (std::size_t d = 0; d < values.size(); ++d) {
    store_bits(plane.data, plane.dtype, at + static_cast<std::int64_t>(d),
               cache_bits(plane.dtype, values[d], scale));
  }
}

// Writes every key that some row sees and this step does not bring.
void GeneratedProblem::write_context() {
  const Batch& batch = args_.batch;
  const KvCacheView& cache = args_.cache;
  for (std::int64_t s = 0; s < batch.num_seqs; ++s) {
    const SeqShape& seq = case_.seqs[static_cast<std::size_t>(s)];
    const std::int64_t start = query_start_[static_cast<std::size_t>(s)];
    for (std::int64_t j = 0; j < seq.seq_len; ++j) {
      const std::int64_t own = j - (seq.seq_len - seq.query_len);  // this step's token, if >= 0
      if (own >= 0 && own < seq.query_len && is_new(place_row(batch, start + own))) continue;
      bool read = false;
      for (std::int64_t i = seq.query_len; i-- > 0 && !read;) {
        read = sees(case_.key.mask, batch, place_row(batch, start + i), j);
      }
      if (!read) continue;
      const KeyPlace place = place_key(cache, batch, s, j);
      for (std::int64_t h = 0; h < cache.num_kv_heads; ++h) {
        put_row(cache.key, place, h, row(Use::kKey, s, j, h), scale_of(cache.k_scale, h));
        put_row(cache.value, place, h, row(Use::kValue, s, j, h), scale_of(cache.v_scale, h));
      }
    }
  }
}

std::int64_t GeneratedProblem::slot_of(std::int64_t seq, std::int64_t j) const {
  const KeyPlace place = place_key(args_.cache, args_.batch, seq, j);
  return place.block * case_.block_size + place.token;
}

void GeneratedProblem::make_slots() {
  const KvCacheView& cache = args_.cache;
  std::vector<std::int64_t> slots;
  for (std::int64_t token = 0; token < query_start_.back(); ++token) {
    const RowPlace place = place_row(args_.batch, token);
    slots.push_back(-1);
    if (!is_new(place)) continue;  // its key and value rows stay NaN
    slots.back() = slot_of(place.seq, place.position);
    for (std::int64_t h = 0; h < cache.num_kv_heads; ++h) {
      put_new(new_key_, token, h, row(Use::kKey, place.seq, place.position, h),
              scale_of(cache.k_scale, h));
      put_new(new_value_, token, h, row(Use::kValue, place.seq, place.position, h),
              scale_of(cache.v_scale, h));
    }
  }
  // Padding tokens have slots of -1, or none: the mapping's length governs.
  if (!case_.fused_qkv) slots.resize(static_cast<std::size_t>(num_rows_), -1);
  if (case_.special_values) {
    const std::size_t rows = static_cast<std::size_t>(new_key_.shape[0] - num_rows_);
    // The last two go where the first went.
    for (std::size_t i = 0; i < rows; ++i) {
      const bool again = case_.duplicate_slots && i >= rows - 2;
      slots.push_back(special_slots_[again ? 0 : i]);
    }
    write_special_rows();
  }
  const auto n = static_cast<std::int64_t>(slots.size());
  slot_mapping_ = index_tensor("slot_mapping", slots.data(), {n}, DType::kI64);
}

void GeneratedProblem::write_special_rows() {
  for (const ConstTensorView& to : {new_key_, new_value_}) {
    for (std::int64_t token = num_rows_; token < to.shape[0]; ++token) {
      for (std::int64_t i = 0; i < to.shape[1] * to.shape[2]; ++i) {
        double x = kSpecial[random_.below(std::ssize(kSpecial))];
        if (random_.below(3) == 0) {
          x = std::ldexp(random_.normal(), static_cast<int>(random_.below(24)) - 14);
        }
        const bool is_key = to.data == new_key_.data;
        if (random_.below(2) == 0) {
          const KvCacheView& cache = args_.cache;
          x *= scale_of(is_key ? cache.k_scale : cache.v_scale, i / to.shape[2]);
        }
        const std::int64_t at = token * to.strides[0] + i / to.shape[2] * to.strides[1];
        store_bits(const_cast<void*>(to.data), to.dtype, at + i % to.shape[2],
                   encode(to.dtype, x, Overflow::kInfinity));
      }
    }
  }
}

CacheImage GeneratedProblem::cache_image() const {
  CacheImage image;
  image.view = args_.cache;
  for (std::size_t i = 0; i < pools_.size(); ++i) image.pools[i] = pools_[i]->content();
  const auto rebase = [&](KvPlane& plane, std::size_t pool) {
    const auto* at = static_cast<const std::byte*>(plane.data);
    plane.data = image.pools[pool].data() + (at - pools_[pool]->data());
  };
  rebase(image.view.key, 0);
  rebase(image.view.value, pools_.size() - 1);
  return image;
}

std::string GeneratedProblem::cache_difference(CacheImage& expected) const {
  const KvCacheView& cache = args_.cache;
  // Accept any NaN where a NaN was written.
  for (std::int64_t i = 0; has_update() && i < slot_mapping_.shape[0]; ++i) {
    const std::int64_t slot = index_at(slot_mapping_, i);
    if (slot < 0) continue;
    const auto adopt_nans = [&](const KvPlane& got, const KvPlane& want, std::int64_t size) {
      for (std::int64_t h = 0; h < cache.num_kv_heads; ++h) {
        const std::int64_t at = slot / cache.block_size * got.stride_block +
                                slot % cache.block_size * got.stride_token + h * got.stride_head;
        for (std::int64_t d = at; d < at + size; ++d) {
          const std::uint32_t bits = load_bits(got.data, got.dtype, d);
          if (std::isnan(load(want.data, want.dtype, d)) && std::isnan(decode(got.dtype, bits))) {
            store_bits(want.data, want.dtype, d, bits);
          }
        }
      }
    };
    adopt_nans(cache.key, expected.view.key, cache.head_size_qk);
    adopt_nans(cache.value, expected.view.value, cache.head_size_v);
  }
  for (std::size_t i = 0; i < pools_.size(); ++i) {
    const std::byte* data = pools_[i]->data();
    const auto [got, want] = std::mismatch(data, data + pools_[i]->bytes(),
                                           expected.pools[i].begin(), expected.pools[i].end());
    if (got != data + pools_[i]->bytes()) {
      return fmt::format("{}: byte {} is {:#04x}, expected {:#04x}", pools_[i]->name(), got - data,
                         static_cast<int>(*got), static_cast<int>(*want));
    }
  }
  return "";
}

}  // namespace diffkv::verify
