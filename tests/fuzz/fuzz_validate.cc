// Calls of the public API whose tensors are right but for a few fields, on real memory of exactly
// the size the views claim: each is refused with diffkv::Error, with no byte changed, or runs and
// stays within its memory.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "arena.h"
#include "bytes.h"
#include "diffkv/diffkv.h"

namespace diffkv::fuzz {
namespace {

constexpr std::array kAnyDType = {DType::kBF16, DType::kF16,  DType::kF32,
                                  DType::kE4M3, DType::kE5M2, DType::kU8,
                                  DType::kBool, DType::kI32,  DType::kI64};

// Raised where an input asks for more memory than a run may have.
class TooLarge {};

class Maker {
 public:
  Maker(Bytes& bytes, Arena& arena) : bytes_(bytes), arena_(arena) {}

  // A dense tensor, or one with some field changed.
  TensorView tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
    TensorView view = dense(dtype, shape);
    if (bytes_.one_in(24)) spoil(view);
    if (!arena_.place(bytes_, view)) throw TooLarge();
    if (bytes_.one_in(200)) view.data = nullptr;
    return view;
  }

  // A dense int32 tensor of values mostly from low to high.
  TensorView indices(std::initializer_list<std::int64_t> shape, std::int64_t low,
                     std::int64_t high) {
    TensorView view = tensor(DType::kI32, shape);
    for_each_element<std::int32_t>(view, [&] {
      return static_cast<std::int32_t>(bytes_.one_in(100) ? bytes_.odd_number()
                                                          : bytes_.range(low, high));
    });
    return view;
  }

  template <class T, class Fn>
  static void for_each_element(const TensorView& view, Fn&& fn) {
    const Span span = span_of(view);
    const bool usable = view.data != nullptr && !span.overflows && size_of(view.dtype) == sizeof(T);
    if (!usable) return;
    for (std::int64_t i = span.low; i <= span.high; ++i) {
      const T value = fn();
      std::memcpy(static_cast<std::byte*>(view.data) + i * std::int64_t{sizeof(T)}, &value,
                  sizeof(T));
    }
  }

 private:
  // As TensorView's constructor, for extents whose product may overflow.
  static TensorView dense(DType dtype, std::initializer_list<std::int64_t> shape) {
    TensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape.begin());
    std::uint64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      view.strides[i] = static_cast<std::int64_t>(stride);
      stride *= static_cast<std::uint64_t>(view.shape[i]);
    }
    return view;
  }

  void spoil(TensorView& view) {
    const auto dim = static_cast<std::size_t>(bytes_.range(0, kMaxRank - 1));
    switch (bytes_.range(0, 6)) {
      case 0:
        view.shape[dim] = bytes_.odd_number();
        break;
      case 1:
        view.strides[dim] = bytes_.odd_number();
        break;
      case 2:
        view.strides[dim] += 8 * bytes_.range(-2, 4);
        break;
      case 3:
        view.dtype = bytes_.pick(kAnyDType);
        break;
      case 4:
        view.rank = static_cast<int>(bytes_.range(0, kMaxRank));
        break;
      case 5:
        if (!elsewhere_) view.device = {DeviceType::kCuda, 0};
        elsewhere_ = true;  // of one call at most one tensor
        break;
      default:
        view.shape[dim] += bytes_.range(-1, 1);
    }
  }

  Bytes& bytes_;
  Arena& arena_;
  bool elsewhere_ = false;
};

PlanKey make_key(Bytes& bytes) {
  PlanKey key;
  constexpr std::array<std::int64_t, 6> kSizes = {16, 8, 24, 40, 64, 192};
  constexpr std::array kPlain = {DType::kBF16, DType::kF16, DType::kF32, DType::kE4M3};
  constexpr std::array kStored = {DType::kBF16, DType::kF16, DType::kF32, DType::kE4M3,
                                  DType::kE5M2};
  key.num_kv_heads = bytes.range(1, 3);
  key.num_heads = key.num_kv_heads * bytes.range(1, 5);
  key.head_size_qk = bytes.pick(kSizes);
  key.head_size_v = bytes.pick(kSizes);
  key.query_dtype = bytes.pick(kPlain);
  key.key_dtype = bytes.pick(kStored);
  key.value_dtype = bytes.one_in(4) ? bytes.pick(kStored) : key.key_dtype;
  key.mask.causal = !bytes.one_in(3);
  const auto width = [&] {
    return static_cast<std::int32_t>(bytes.one_in(20) ? bytes.odd_number() : bytes.range(1, 40));
  };
  if (bytes.one_in(3)) key.mask.window = width();
  if (bytes.one_in(5)) key.mask.chunk_size = width();
  if (bytes.one_in(5)) key.mask.chunk_lookback = width();
  if (bytes.one_in(5)) key.mask.prefix_window = width();
  key.mm_ranges = bytes.one_in(4);
  key.mask.clamp_mm_ranges = bytes.one_in(8);
  key.causal_per_seq = bytes.one_in(6);
  if (bytes.one_in(3)) key.policy = SchedulePolicy::kBatchInvariant;
  if (bytes.one_in(40)) key.num_heads = bytes.odd_number();
  if (bytes.one_in(40)) key.head_size_v = bytes.range(-8, 700);
  return key;
}

// A cache of separate planes (the kernels see no other), packed, or dense.
KvCacheView make_cache(Bytes& bytes, Maker& make, const PlanKey& key, std::int64_t tokens) {
  const std::int64_t block_size = bytes.pick(std::array<std::int64_t, 5>{16, 1, 5, 32, 13});
  const std::int64_t blocks = bytes.range(0, 6);
  KvCacheView cache;
  const std::int64_t heads = key.num_kv_heads;
  switch (bytes.range(0, 2)) {
    case 0:
      cache = KvCacheView::separate(
          make.tensor(key.key_dtype, {blocks, block_size, heads, key.head_size_qk}),
          make.tensor(key.value_dtype, {blocks, block_size, heads, key.head_size_v}));
      break;
    case 1:
      cache = KvCacheView::packed(
          make.tensor(bytes.one_in(4) ? DType::kU8 : key.key_dtype,
                      {blocks, block_size, heads, key.head_size_qk + key.head_size_v}),
          key.head_size_qk, key.key_dtype);
      break;
    default:
      cache =
          KvCacheView::dense_tokens(make.tensor(key.key_dtype, {tokens, heads, key.head_size_qk}),
                                    make.tensor(key.value_dtype, {tokens, heads, key.head_size_v}));
  }
  if (bytes.one_in(3)) cache.k_scale = make.tensor(DType::kF32, {bytes.one_in(2) ? heads : 1});
  if (bytes.one_in(40)) cache.read_only = true;
  if (bytes.one_in(40)) cache.num_blocks = bytes.range(-1, cache.num_blocks);
  if (bytes.one_in(3)) cache.v_scale = make.tensor(DType::kF32, {1});
  return cache;
}

Batch make_batch(Bytes& bytes, Maker& make, const PlanKey& key, std::int64_t dense_tokens) {
  Batch batch;
  batch.num_seqs = bytes.range(0, 4);
  const std::int64_t width = bytes.range(0, 5);
  const TensorView starts = make.tensor(DType::kI32, {batch.num_seqs + 1});
  std::int32_t start = 0;
  Maker::for_each_element<std::int32_t>(starts, [&] {
    const std::int32_t value = start;
    start += static_cast<std::int32_t>(bytes.range(0, 5));
    return bytes.one_in(60) ? static_cast<std::int32_t>(bytes.odd_number()) : value;
  });
  batch.query_start_loc = starts;
  batch.num_actual_tokens = bytes.one_in(4) ? bytes.odd_number() : bytes.range(0, start);
  batch.seq_lens = make.indices({batch.num_seqs}, 0, 5 * width);
  batch.block_table = make.indices({batch.num_seqs, width}, 0, 4);
  if (!bytes.one_in(5)) batch.kv_start = make.indices({batch.num_seqs}, 0, dense_tokens / 2);
  if (key.causal_per_seq) batch.causal_per_seq = make.tensor(DType::kBool, {batch.num_seqs});
  if (key.mask.prefix_window > 0) batch.prefix_lens = make.indices({batch.num_seqs}, 0, 20);
  if (key.mm_ranges) {
    batch.mm_ranges = make.indices({batch.num_seqs, bytes.range(0, 2), 2}, 0, 30);
  }
  if (bytes.one_in(40)) batch.num_seqs = bytes.odd_number();
  return batch;
}

AttentionParams make_params(Bytes& bytes, Maker& make, const PlanKey& key) {
  AttentionParams params;
  params.scale = 0.25F;
  if (bytes.one_in(4)) params.soft_cap = bytes.take<float>();
  if (bytes.one_in(4)) params.alibi_slopes = make.tensor(DType::kF32, {key.num_heads});
  params.alibi_sqrt = bytes.one_in(6);
  if (bytes.one_in(4)) {
    const std::int64_t n = bytes.range(0, 6);
    params.qq_bias = make.tensor(bytes.one_in(2) ? DType::kBF16 : DType::kF32, {n, n});
  }
  if (bytes.one_in(3)) params.sinks = make.tensor(DType::kF16, {key.num_heads});
  if (key.query_dtype == DType::kE4M3) params.q_scale = make.tensor(DType::kF32, {1});
  if (bytes.one_in(6)) params.output_scale = make.tensor(DType::kF32, {1});
  if (bytes.one_in(60)) params.output_block_scale = make.tensor(DType::kF32, {1});
  if (bytes.one_in(3)) params.sink_mode = SinkMode::kOut;
  return params;
}

// Runs a call; a refusal must have left all memory as it was.
template <class Fn>
void run(const Arena& arena, Fn&& call) {
  const std::vector<std::byte> before = arena.snapshot();
  try {
    call();
  } catch (const Error&) {
    if (arena.snapshot() != before) throw std::logic_error("a refused call changed memory");
  }
}

void attend_once(Bytes& bytes, Arena& arena, Maker& make, const PlanKey& key,
                 const KvCacheView& cache, std::int64_t dense_tokens) {
  const Backend& backend = find_backend("cpu");
  AttendArgs args;
  args.cache = cache;
  args.batch = make_batch(bytes, make, key, dense_tokens);
  const AttentionParams params = make_params(bytes, make, key);
  const std::int64_t tokens = bytes.range(0, 22);
  args.query = make.tensor(key.query_dtype, {tokens, key.num_heads, key.head_size_qk});
  DType output_dtype = key.query_dtype == DType::kE4M3 ? DType::kBF16 : key.query_dtype;
  if (params.output_scale.given()) output_dtype = DType::kE4M3;
  args.output = make.tensor(output_dtype, {tokens, key.num_heads, key.head_size_v});
  if (bytes.one_in(2)) args.lse = make.tensor(DType::kF32, {key.num_heads, tokens});

  PlanMaxima maxima{.max_tokens = 24, .max_seqs = 4, .max_seq_len = 64, .max_mm_ranges = 2};
  if (bytes.one_in(30)) maxima.max_tokens = bytes.odd_number();
  if (bytes.one_in(30)) maxima.max_seq_len = bytes.odd_number();
  const std::int64_t needed = workspace_bytes(backend, key, maxima);
  if (needed > (std::int64_t{1} << 26)) throw TooLarge();
  const TensorView workspace(arena.take(needed), DType::kU8, {needed});
  Plan plan;
  run(arena, [&] { plan = make_plan(backend, key, maxima, args.batch, workspace); });
  if (bytes.one_in(20)) args.batch.num_actual_tokens = bytes.odd_number();
  if (bytes.one_in(20) && args.batch.seq_lens.rank == 1 && args.batch.seq_lens.shape[0] > 0) {
    args.batch.seq_lens = make.indices({args.batch.seq_lens.shape[0]}, 0, 20);
  }
  run(arena, [&] { attend(backend, params, args, plan); });
  if (!args.lse.given()) return;
  const AttnState part{args.output, args.lse};
  const AttnState other{make.tensor(output_dtype, {tokens, key.num_heads, key.head_size_v}),
                        make.tensor(DType::kF32, {key.num_heads, tokens})};
  run(arena, [&] {
    merge_attn_states(backend, part, other, params.sinks, args.output,
                      bytes.one_in(2) ? args.lse : TensorView());
  });
  run(arena, [&] { fill_zero(backend, args.output); });
}

void update_once(Bytes& bytes, Arena& arena, Maker& make, const PlanKey& key,
                 const KvCacheView& cache) {
  const std::int64_t tokens = bytes.range(0, 9);
  const TensorView new_keys = make.tensor(bytes.one_in(5) ? key.key_dtype : DType::kBF16,
                                          {tokens, key.num_kv_heads, key.head_size_qk});
  const TensorView new_values = make.tensor(bytes.one_in(5) ? key.value_dtype : DType::kBF16,
                                            {tokens, key.num_kv_heads, key.head_size_v});
  const TensorView slots = make.tensor(DType::kI64, {tokens});
  Maker::for_each_element<std::int64_t>(
      slots, [&] { return bytes.one_in(50) ? bytes.odd_number() : bytes.range(-1, 31); });
  run(arena, [&] { update_cache(find_backend("cpu"), new_keys, new_values, cache, slots); });
}

}  // namespace
}  // namespace diffkv::fuzz

// One thread: what is looked for does not depend on their number, and starting them costs most.
extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  return setenv("OMP_NUM_THREADS", "1", 1);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace diffkv::fuzz;  // NOLINT(google-build-using-namespace): the target's one function
  Bytes bytes(data, size);
  Arena arena;
  Maker make(bytes, arena);
  try {
    const diffkv::PlanKey key = make_key(bytes);
    const std::int64_t dense_tokens = bytes.range(0, 70);
    const diffkv::KvCacheView cache = make_cache(bytes, make, key, dense_tokens);
    update_once(bytes, arena, make, key, cache);
    attend_once(bytes, arena, make, key, cache, dense_tokens);
  } catch (const diffkv::Error&) {
    return 0;
  } catch (const TooLarge&) {
    return 0;
  }
  return 0;
}
