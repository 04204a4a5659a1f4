#include "calls.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace diffkv::test {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void Memory::Free::operator()(void* data) const { ::operator delete(data, kAlignment); }

void* Memory::take(std::int64_t bytes, unsigned char fill) {
  const auto size = static_cast<std::size_t>(bytes);
  void* data = ::operator new(size, kAlignment);
  std::memset(data, fill, size);
  buffers_.push_back({std::unique_ptr<void, Free>(data), bytes});
  return data;
}

std::vector<unsigned char> Memory::snapshot() const {
  std::vector<unsigned char> bytes;
  for (const Buffer& buffer : buffers_) {
    const auto* data = static_cast<const unsigned char*>(buffer.data.get());
    bytes.insert(bytes.end(), data, data + buffer.bytes);
  }
  return bytes;
}

ScheduleLimits RecordingBackend::limits(const PlanKey& key, std::int32_t threads) const {
  return find_backend("cpu").limits(key, threads);
}

void* RecordingBackend::allocate(std::int64_t bytes, const Device& device) const {
  return find_backend("cpu").allocate(bytes, device);
}

void RecordingBackend::deallocate(void* data, const Device& device) const noexcept {
  find_backend("cpu").deallocate(data, device);
}

void RecordingBackend::copy_to_device(void* to, const void* from, std::int64_t bytes,
                                      const Device& device, Stream stream) const {
  find_backend("cpu").copy_to_device(to, from, bytes, device, stream);
}

void RecordingBackend::copy_to_host(void* to, const void* from, std::int64_t bytes,
                                    const Device& device, Stream stream) const {
  find_backend("cpu").copy_to_host(to, from, bytes, device, stream);
}

void RecordingBackend::fill_bytes(void* data, std::uint8_t value, std::int64_t bytes,
                                  const Device& device, Stream stream) const {
  find_backend("cpu").fill_bytes(data, value, bytes, device, stream);
}

void RecordingBackend::synchronize(const Device& device, Stream stream) const {
  find_backend("cpu").synchronize(device, stream);
}

void RecordingBackend::plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
                            detail::PlanTables& tables, Stream stream) const {
  if (type_ != DeviceType::kCpu) return;
  ++writes_;
  find_backend("cpu").plan(key, limits, batch, tables, stream);
}

void RecordingBackend::update_cache(const ConstTensorView&, const ConstTensorView&,
                                    const KvCacheView&, const ConstTensorView&, Stream) const {
  ++writes_;
}

bool RecordingBackend::attend(const AttentionParams&, const AttendArgs&, const Plan&,
                              Stream) const {
  ++writes_;
  return true;
}

void RecordingBackend::combine(const AttentionParams&, const AttendArgs&, const Plan&,
                               Stream) const {
  ++writes_;
}

void RecordingBackend::merge_attn_states(const AttnState&, const AttnState&, const ConstTensorView&,
                                         const TensorView&, const TensorView&, Stream) const {
  ++writes_;
}

void RecordingBackend::fill_zero(const TensorView&, Stream) const { ++writes_; }

namespace {

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kSizeQk = 24;
constexpr std::int64_t kSizeV = 16;
constexpr std::int64_t kBlocks = 8;
constexpr std::int64_t kBlockSize = 16;

TensorView take_bf16(Memory& memory, std::initializer_list<std::int64_t> shape) {
  TensorView view(nullptr, DType::kBF16, shape);
  view.data = memory.take(view.numel() * size_of(view.dtype), 0);
  return view;
}

KvCacheView take_cache(Memory& memory) {
  return KvCacheView::packed(take_bf16(memory, {kBlocks, kBlockSize, kKvHeads, kSizeQk + kSizeV}),
                             kSizeQk);
}

}  // namespace

AttendCall::AttendCall() {
  key.num_heads = kHeads;
  key.num_kv_heads = kKvHeads;
  key.head_size_qk = kSizeQk;
  key.head_size_v = kSizeV;
  maxima = {.max_tokens = 6, .max_seqs = 3, .max_seq_len = 64, .max_mm_ranges = 2};
  query_start_loc = memory.take_values<std::int32_t>({0, 2, 2, 5});
  seq_lens = memory.take_values<std::int32_t>({18, 0, 40});
  // Entries past a sequence's last block are never read and hold nonsense.
  block_table = memory.take_values<std::int32_t>({3, 0, -9, 99, 77, 77, 77, 77, 7, 1, 5, 1 << 30});
  args.batch.num_seqs = 3;
  args.batch.num_actual_tokens = 5;
  args.batch.query_start_loc = view_of(query_start_loc, {4});
  args.batch.seq_lens = view_of(seq_lens, {3});
  args.batch.block_table = view_of(block_table, {3, 4});
  args.query = take_bf16(memory, {6, kHeads, kSizeQk});
  args.output = take_bf16(memory, {6, kHeads, kSizeV});
  args.lse = view_of(static_cast<float*>(memory.take(kHeads * 6 * 4, 0)), {kHeads, 6});
  args.cache = take_cache(memory);
  params.scale = 0.2F;
}

void AttendCall::make_plan_now() { plan = make_plan(backend, key, maxima, args.batch, workspace); }

void AttendCall::replan() {
  const std::int64_t bytes = workspace_bytes(backend, key, maxima);
  workspace = view_of(static_cast<std::uint8_t*>(memory.take(bytes)), {bytes});
  workspace.device = args.batch.query_start_loc.device;
  make_plan_now();
}

void AttendCall::attend() const { diffkv::attend(backend, params, args, plan); }

UpdateCall::UpdateCall() {
  cache = take_cache(memory);
  key = take_bf16(memory, {4, kKvHeads, kSizeQk});
  value = take_bf16(memory, {4, kKvHeads, kSizeV});
  slots = memory.take_values<std::int64_t>({5, -1, 127, 0});
  slot_mapping = view_of(slots, {4});
}

void UpdateCall::update() const { diffkv::update_cache(backend, key, value, cache, slot_mapping); }

MergeCall::MergeCall() {
  a.output = take_bf16(memory, {5, kHeads, kSizeV});
  b.output = take_bf16(memory, {5, kHeads, kSizeV});
  output = take_bf16(memory, {5, kHeads, kSizeV});
  const auto take_lse = [&] {
    return view_of(static_cast<float*>(memory.take(kHeads * 5 * 4, 0)), {kHeads, 5});
  };
  a.lse = take_lse();
  b.lse = take_lse();
  lse = take_lse();
  sinks = view_of(static_cast<float*>(memory.take(kHeads * 4, 0)), {kHeads});
}

void MergeCall::merge() const { diffkv::merge_attn_states(backend, a, b, sinks, output, lse); }

void expect_refused(const Memory& memory, const RecordingBackend& backend, ErrorCode code,
                    const std::vector<std::string>& says, const std::function<void()>& call) {
  const std::vector<unsigned char> before = memory.snapshot();
  const int writes = backend.writes();
  try {
    call();
    ADD_FAILURE() << "the call was not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    const std::string message = error.what();
    for (const std::string& part : says) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "\"" << message << "\" does not say \"" << part << "\"";
    }
  }
  EXPECT_EQ(backend.writes(), writes);
  EXPECT_TRUE(memory.snapshot() == before) << "the refused call changed memory";
}

}  // namespace diffkv::test
