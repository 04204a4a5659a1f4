#include "tests/cuda/rig.h"

#include <algorithm>
#include <random>
#include <utility>

#include "core/dtype.h"
#include "cuda/device.h"

namespace diffkv::cuda {
namespace {

using device::Memory;

constexpr Device kDevice{DeviceType::kCuda, 0};

// Random bf16 numbers around zero.
std::vector<std::uint16_t> random_bf16(std::mt19937& rng, std::int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> numbers(static_cast<std::size_t>(count));
  for (std::uint16_t& x : numbers) x = core::float_to_bf16(normal(rng));
  return numbers;
}

template <class T>
void upload(const Memory& memory, const std::vector<T>& from, Stream stream) {
  memory.upload(from.data(), static_cast<std::int64_t>(from.size() * sizeof(T)), 0, stream);
}

template <class T>
std::vector<T> random_bits(std::mt19937& rng, std::int64_t count) {
  std::uniform_int_distribution<std::uint64_t> bits;
  std::vector<T> numbers(static_cast<std::size_t>(count));
  for (T& x : numbers) x = static_cast<T>(bits(rng));
  return numbers;
}

void copy(const Memory& to, const Memory& from, const OwnStream& stream) {
  DIFFKV_CUDA_CALL(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(to.bytes()),
                                   cudaMemcpyDeviceToDevice, stream.handle()));
}

}  // namespace

OwnStream::OwnStream() {
  DIFFKV_CUDA_CALL(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking));
}

OwnStream::~OwnStream() { cudaStreamDestroy(handle_); }

Rig::Rig(const PlanKey& key, const RigSizes& sizes) : Rig(key, sizes, nullptr) {}

Rig::Rig(const Rig& before) : Rig(before.key_, before.sizes_, before.cache_) {
  first_page_ = before.first_page_ + 1;
  cache_filled_ = true;
}

Rig::Rig(const PlanKey& key, const RigSizes& sizes, std::shared_ptr<const Memory> cache)
    : backend_(backend()),
      key_(key),
      sizes_(sizes),
      face_("cuda"),
      num_blocks_(sizes.sharing * (sizes.max_seqs * sizes.max_blocks + 3)),
      cache_(std::move(cache)) {
  spec_.block_size = sizes.block_size;
  spec_.num_kv_heads = key.num_kv_heads;
  spec_.head_size_qk = key.head_size_qk;
  spec_.head_size_v = key.head_size_v;
  spec_.dtype = key.key_dtype;
  builder_ = std::make_unique<DiffKVMetadataBuilder>(
      face_, key,
      PlanMaxima{.max_tokens = sizes.max_tokens,
                 .max_seqs = sizes.max_seqs,
                 .max_seq_len = sizes.max_blocks * sizes.block_size},
      kDevice);
  AttentionParams params;
  params.scale = 0.1F;
  layer_ = std::make_unique<DiffKVAttention>(face_, key, params, DType::kBF16);
  const auto memory = [&](std::int64_t elements, DType dtype) {
    return Memory(backend_, elements * size_of(dtype));
  };
  const std::int64_t tokens = sizes.max_tokens;
  query_ = memory(tokens * key.num_heads * key.head_size_qk, DType::kBF16);
  new_key_ = memory(tokens * key.num_kv_heads * key.head_size_qk, DType::kBF16);
  new_value_ = memory(tokens * key.num_kv_heads * key.head_size_v, DType::kBF16);
  output_ = memory(tokens * key.num_heads * key.head_size_v, DType::kBF16);
  lse_ = memory(tokens * key.num_heads, DType::kF32);
  if (cache_ == nullptr) {
    cache_ = std::make_shared<Memory>(backend_, spec_.page_stride_bytes() * num_blocks_);
  }
  query_start_loc_ = memory(sizes.max_seqs + 1, DType::kI32);
  seq_lens_ = memory(sizes.max_seqs, DType::kI32);
  block_table_ = memory(sizes.max_seqs * sizes.max_blocks, DType::kI32);
  slot_mapping_ = memory(tokens, DType::kI64);
}

void Rig::fill(unsigned seed, Stream stream) {
  std::mt19937 rng(seed);
  const auto uniform = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
  };
  if (!std::exchange(cache_filled_, true)) {
    // Finite in every type: the exponent's upper bits of each byte are cleared.
    std::vector<std::uint8_t> bytes = random_bits<std::uint8_t>(rng, cache_->bytes());
    for (std::uint8_t& byte : bytes) byte &= 0xbfU;
    upload(*cache_, bytes, stream);
    backend_.synchronize(kDevice, stream);
  }
  std::vector<std::int32_t> pages;
  for (std::int32_t page = first_page_; page < num_blocks_; page += sizes_.sharing) {
    pages.push_back(page);
  }
  std::shuffle(pages.begin(), pages.end(), rng);
  std::vector<std::int32_t> starts{0};
  std::vector<std::int32_t> lens;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(sizes_.max_tokens), -1);
  const std::int64_t longest = sizes_.max_blocks * sizes_.block_size;
  for (std::int64_t s = 0; s < sizes_.max_seqs; ++s) {
    const std::int64_t left = sizes_.max_tokens - starts.back();
    std::int64_t most = uniform(0, 3) == 0 ? std::min<std::int64_t>(left, 30) : 1;
    if (sizes_.max_query_len > 0) most = std::min(most, sizes_.max_query_len);
    const std::int64_t query_len = std::min(left, uniform(0, most));
    const std::int64_t seq_len = uniform(query_len, longest);
    for (std::int64_t i = 0; i < query_len; ++i) {
      const std::int64_t position = seq_len - query_len + i;
      const auto page =
          static_cast<std::size_t>(s * sizes_.max_blocks + position / sizes_.block_size);
      slots[static_cast<std::size_t>(starts.back() + i)] =
          pages[page] * sizes_.block_size + position % sizes_.block_size;
    }
    starts.push_back(starts.back() + static_cast<std::int32_t>(query_len));
    lens.push_back(static_cast<std::int32_t>(seq_len));
  }
  num_tokens_ = starts.back();
  pages.resize(static_cast<std::size_t>(sizes_.max_seqs * sizes_.max_blocks));
  const auto query = random_bf16(rng, query_.bytes() / 2);
  const auto new_key = random_bf16(rng, new_key_.bytes() / 2);
  const auto new_value = random_bf16(rng, new_value_.bytes() / 2);
  upload(query_, query, stream);
  upload(new_key_, new_key, stream);
  upload(new_value_, new_value, stream);
  upload(query_start_loc_, starts, stream);
  upload(seq_lens_, lens, stream);
  upload(block_table_, pages, stream);
  upload(slot_mapping_, slots, stream);
  output_.fill(0xff, stream);
  lse_.fill(0xff, stream);
  backend_.synchronize(kDevice, stream);  // the host's arrays end here
}

void Rig::spoil_indices(unsigned seed, Stream stream) {
  std::mt19937 rng(seed);
  const auto starts = random_bits<std::int32_t>(rng, sizes_.max_seqs + 1);
  const auto lens = random_bits<std::int32_t>(rng, sizes_.max_seqs);
  const auto pages = random_bits<std::int32_t>(rng, sizes_.max_seqs * sizes_.max_blocks);
  const auto slots = random_bits<std::int64_t>(rng, sizes_.max_tokens);
  upload(query_start_loc_, starts, stream);
  upload(seq_lens_, lens, stream);
  upload(block_table_, pages, stream);
  upload(slot_mapping_, slots, stream);
  backend_.synchronize(kDevice, stream);
}

void Rig::copy_inputs(const Rig& from, const OwnStream& stream) {
  copy(query_, from.query_, stream);
  copy(new_key_, from.new_key_, stream);
  copy(new_value_, from.new_value_, stream);
  copy(query_start_loc_, from.query_start_loc_, stream);
  copy(seq_lens_, from.seq_lens_, stream);
  copy(block_table_, from.block_table_, stream);
  copy(slot_mapping_, from.slot_mapping_, stream);
}

void Rig::copy_outputs(const Rig& from, const OwnStream& stream) {
  copy(output_, from.output_, stream);
  copy(lse_, from.lse_, stream);
}

Batch Rig::batch() const {
  Batch batch;
  batch.num_seqs = sizes_.max_seqs;
  batch.num_actual_tokens = sizes_.max_tokens;
  batch.max_query_len = sizes_.announced_query_len;
  const auto i32 = [](const Memory& memory, std::initializer_list<std::int64_t> shape) {
    return ConstTensorView(memory.data(), DType::kI32, shape, kDevice);
  };
  batch.query_start_loc = i32(query_start_loc_, {sizes_.max_seqs + 1});
  batch.seq_lens = i32(seq_lens_, {sizes_.max_seqs});
  batch.block_table = i32(block_table_, {sizes_.max_seqs, sizes_.max_blocks});
  return batch;
}

void Rig::enqueue(Stream stream) {
  const std::int64_t tokens = sizes_.max_tokens;
  const KvCacheView cache = spec_.view(cache_->data(), num_blocks_, kDevice);
  const auto rows = [&](const Memory& memory, std::int64_t heads, std::int64_t size) {
    return TensorView(memory.data(), DType::kBF16, {tokens, heads, size}, kDevice);
  };
  layer_->do_kv_cache_update(rows(new_key_, key_.num_kv_heads, key_.head_size_qk),
                             rows(new_value_, key_.num_kv_heads, key_.head_size_v), cache,
                             ConstTensorView(slot_mapping_.data(), DType::kI64, {tokens}, kDevice),
                             stream);
  const DiffKVMetadata metadata = builder_->build_for_cudagraph_capture(batch(), stream);
  DiffKVAttention::ForwardArgs args;
  args.query = rows(query_, key_.num_heads, key_.head_size_qk);
  args.cache = &cache;
  args.metadata = &metadata;
  args.output = rows(output_, key_.num_heads, key_.head_size_v);
  args.lse = TensorView(lse_.data(), DType::kF32, {key_.num_heads, tokens}, kDevice);
  layer_->forward(args, stream);
}

std::vector<std::byte> Rig::results(Stream stream) const {
  std::vector<std::byte> all(
      static_cast<std::size_t>(output_.bytes() + lse_.bytes() + cache_->bytes()));
  std::byte* to = all.data();
  for (const Memory* memory : {&output_, &lse_, cache_.get()}) {
    memory->download(to, memory->bytes(), 0, stream);
    to += memory->bytes();
  }
  backend_.synchronize(kDevice, stream);
  return all;
}

std::vector<float> Rig::outputs(Stream stream) const {
  std::vector<std::uint16_t> bits(
      static_cast<std::size_t>(num_tokens_ * key_.num_heads * key_.head_size_v));
  output_.download(bits.data(), static_cast<std::int64_t>(2 * bits.size()), 0, stream);
  backend_.synchronize(kDevice, stream);
  std::vector<float> numbers;
  for (const std::uint16_t x : bits) numbers.push_back(core::bf16_to_float(x));
  return numbers;
}

}  // namespace diffkv::cuda
