// How long the stages beside attention take on this GPU, update_cache beside a copy of the same
// bytes; and how long the calls of all stages take on the host.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/backend.h"
#include "cuda/device.h"
#include "device/memory.h"
#include "diffkv/attention.h"
#include "diffkv/plan.h"

namespace diffkv::cuda {
namespace {

using device::Memory;

constexpr Device kDevice{DeviceType::kCuda, 0};
constexpr int kInGraph = 20;      // launches in a row, so that the graph's own cost is shared
constexpr int kRepetitions = 25;  // of the graph

// Median microseconds of one of kInGraph launches; launch i gets its number, so that it can use
// other memory than its neighbours.
double microseconds(const std::function<void(int, Stream)>& work) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  DIFFKV_CUDA_CALL(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  DIFFKV_CUDA_CALL(cudaEventCreate(&begin));
  DIFFKV_CUDA_CALL(cudaEventCreate(&end));
  DIFFKV_CUDA_CALL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kInGraph; ++i) work(i, Stream{stream});
  DIFFKV_CUDA_CALL(cudaStreamEndCapture(stream, &graph));
  DIFFKV_CUDA_CALL(cudaGraphInstantiate(&executable, graph, 0));
  std::vector<float> times;
  for (int i = 0; i < kRepetitions + 3; ++i) {
    DIFFKV_CUDA_CALL(cudaEventRecord(begin, stream));
    DIFFKV_CUDA_CALL(cudaGraphLaunch(executable, stream));
    DIFFKV_CUDA_CALL(cudaEventRecord(end, stream));
    DIFFKV_CUDA_CALL(cudaEventSynchronize(end));
    float ms = 0;
    DIFFKV_CUDA_CALL(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
  return 1e3 * times[times.size() / 2] / kInGraph;
}

void time_plan(const char* name, std::int64_t num_seqs, std::int32_t query_len,
               std::int32_t longest, SchedulePolicy policy) {
  PlanKey key;
  key.num_heads = 64;
  key.num_kv_heads = 4;
  key.head_size_qk = 192;
  key.head_size_v = 128;
  key.policy = policy;
  const PlanMaxima maxima{
      .max_tokens = num_seqs * query_len, .max_seqs = num_seqs, .max_seq_len = longest};
  std::mt19937 rng(1);
  std::vector<std::int32_t> starts(static_cast<std::size_t>(num_seqs + 1));
  std::vector<std::int32_t> lens(static_cast<std::size_t>(num_seqs));
  for (std::size_t s = 0; s < lens.size(); ++s) {
    starts[s + 1] = starts[s] + query_len;
    lens[s] = std::uniform_int_distribution<std::int32_t>(query_len, longest)(rng);
  }
  const Memory start_memory(backend(), static_cast<std::int64_t>(4 * starts.size()));
  const Memory len_memory(backend(), static_cast<std::int64_t>(4 * lens.size()));
  start_memory.upload(starts.data(), start_memory.bytes());
  len_memory.upload(lens.data(), len_memory.bytes());
  Batch batch;
  batch.num_seqs = num_seqs;
  batch.num_actual_tokens = starts.back();
  batch.max_query_len = query_len;
  batch.query_start_loc =
      ConstTensorView(start_memory.data(), DType::kI32, {num_seqs + 1}, kDevice);
  batch.seq_lens = ConstTensorView(len_memory.data(), DType::kI32, {num_seqs}, kDevice);
  const std::int64_t bytes = workspace_bytes(backend(), key, maxima);
  const Memory workspace(backend(), bytes);
  const TensorView view(workspace.data(), DType::kU8, {bytes}, kDevice);
  backend().synchronize(kDevice, {});
  const double us = microseconds(
      [&](int, Stream stream) { make_plan(backend(), key, maxima, batch, view, stream); });
  fmt::print("plan          {:34} {:8.2f} us\n", name, us);
}

void time_update(const char* name, std::int64_t tokens, DType input, DType stored) {
  constexpr std::int64_t kHeads = 4;
  KvCacheSpec spec;
  spec.num_kv_heads = kHeads;
  spec.head_size_qk = 192;
  spec.head_size_v = 128;
  spec.dtype = stored;
  const std::int64_t blocks = tokens / spec.block_size;
  const std::int64_t read = tokens * kHeads * 320 * size_of(input);
  const std::int64_t written = tokens * kHeads * 320 * size_of(stored);
  // Each launch of a graph has memory of its own, together more than the cache of the GPU holds.
  const std::int64_t sets = kInGraph;
  const Memory inputs(backend(), read * sets);
  const Memory cache(backend(), written * sets);
  const Memory slots(backend(), 8 * tokens);
  const Memory scale(backend(), 4);
  std::vector<std::int64_t> order(static_cast<std::size_t>(tokens));
  std::iota(order.begin(), order.end(), 0);
  slots.upload(order.data(), slots.bytes());
  const float one = 0.37F;
  scale.upload(&one, 4);
  inputs.fill(0x3c);
  backend().synchronize(kDevice, {});
  const double us = microseconds([&](int i, Stream stream) {
    std::byte* from = inputs.data() + i * read;
    KvCacheView view = spec.view(cache.data() + i * written, blocks, kDevice);
    if (is_fp8(stored)) {
      view.k_scale = view.v_scale = ConstTensorView(scale.data(), DType::kF32, {1}, kDevice);
    }
    const ConstTensorView key(from, input, {tokens, kHeads, 192}, kDevice);
    const ConstTensorView value(from + read / 320 * 192, input, {tokens, kHeads, 128}, kDevice);
    update_cache(backend(), key, value, view,
                 ConstTensorView(slots.data(), DType::kI64, {tokens}, kDevice), stream);
  });
  // A copy that moves as many bytes in all.
  const auto copied = static_cast<std::size_t>((read + written) / 2);
  const double floor = microseconds([&](int i, Stream stream) {
    DIFFKV_CUDA_CALL(cudaMemcpyAsync(cache.data() + i * written, inputs.data() + i * read,
                                     std::min(copied, static_cast<std::size_t>(written)),
                                     cudaMemcpyDeviceToDevice, handle_of(stream)));
  });
  const double scaled =
      floor * static_cast<double>(copied) /
      static_cast<double>(std::min<std::int64_t>(static_cast<std::int64_t>(copied), written));
  fmt::print("update_cache  {:34} {:8.2f} us, copy {:8.2f} us, {:.1f} % of its rate, {:.0f} GB/s\n",
             name, us, scaled, 100 * scaled / us, 1e-3 * static_cast<double>(read + written) / us);
}

// Median microseconds that a call takes on the host while the GPU is behind.
double host_microseconds(const std::function<void()>& call) {
  constexpr int kCalls = 100;  // fewer than launches that a stream holds before it makes one wait
  std::vector<double> times;
  for (int i = 0; i < kRepetitions; ++i) {
    backend().synchronize(kDevice, {});
    const auto begin = std::chrono::steady_clock::now();
    for (int k = 0; k < kCalls; ++k) call();
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - begin;
    times.push_back(taken.count() / kCalls);
  }
  backend().synchronize(kDevice, {});
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// A planned decode step of sequences of one length, which all have their keys in one page.
class DecodeStep {
 public:
  DecodeStep(std::int64_t num_seqs, std::int32_t seq_len, std::int64_t num_heads,
             std::int64_t num_kv_heads, SchedulePolicy policy = SchedulePolicy::kBalanced) {
    key_.policy = policy;
    key_.num_heads = num_heads;
    key_.num_kv_heads = num_kv_heads;
    key_.head_size_qk = 192;
    key_.head_size_v = 128;
    KvCacheSpec spec;
    spec.block_size = 64;
    spec.num_kv_heads = num_kv_heads;
    spec.head_size_qk = key_.head_size_qk;
    spec.head_size_v = key_.head_size_v;
    std::vector<std::int32_t> starts(static_cast<std::size_t>(num_seqs + 1));
    std::iota(starts.begin(), starts.end(), 0);
    const std::vector<std::int32_t> lens(static_cast<std::size_t>(num_seqs), seq_len);
    Batch& batch = args_.batch;
    batch.num_seqs = batch.num_actual_tokens = num_seqs;
    batch.max_query_len = 1;
    batch.query_start_loc = tensor(DType::kI32, {num_seqs + 1}, starts.data());
    batch.seq_lens = tensor(DType::kI32, {num_seqs}, lens.data());
    batch.block_table = tensor(DType::kI32, {num_seqs, (seq_len + 63) / 64});
    args_.cache = spec.view(tensor(DType::kU8, {spec.page_stride_bytes()}).data, 1, kDevice);
    args_.query = tensor(DType::kBF16, {num_seqs, num_heads, 192});
    args_.output = tensor(DType::kBF16, {num_seqs, num_heads, 128});
    maxima_ = {.max_tokens = num_seqs, .max_seqs = num_seqs, .max_seq_len = seq_len};
    workspace_ = tensor(DType::kU8, {workspace_bytes(backend(), key_, maxima_)});
    new_key_ = tensor(DType::kBF16, {num_seqs, num_kv_heads, 192});
    new_value_ = tensor(DType::kBF16, {num_seqs, num_kv_heads, 128});
    slots_ = tensor(DType::kI64, {num_seqs});
    params_.scale = 0.07F;
    make_plan();
    backend().synchronize(kDevice, {});
  }

  void make_plan() { plan_ = diffkv::make_plan(backend(), key_, maxima_, args_.batch, workspace_); }
  void update_cache() const {
    diffkv::update_cache(backend(), new_key_, new_value_, args_.cache, slots_);
  }
  void attend() const { diffkv::attend(backend(), params_, args_, plan_); }
  void combine(Stream stream) const { backend().combine(params_, args_, plan_, stream); }

 private:
  // Zeros where no values are given.
  TensorView tensor(DType dtype, std::initializer_list<std::int64_t> shape,
                    const void* values = nullptr) {
    TensorView view(nullptr, dtype, shape, kDevice);
    const Memory& memory = memory_.emplace_back(backend(), view.numel() * size_of(dtype));
    view.data = memory.data();
    if (values == nullptr) {
      memory.fill(0);
    } else {
      memory.upload(values, memory.bytes());
    }
    return view;
  }

  std::vector<Memory> memory_;
  PlanKey key_;
  PlanMaxima maxima_;
  AttendArgs args_;
  AttentionParams params_;
  TensorView workspace_, new_key_, new_value_, slots_;
  Plan plan_;
};

// Of batch-invariant plans: those of others the attention kernels merge themselves. The partials
// are zeros; what is merged makes no difference to the time.
void time_combine(const char* name, std::int64_t num_seqs, std::int32_t seq_len,
                  std::int64_t num_heads, std::int64_t num_kv_heads) {
  const DecodeStep step(num_seqs, seq_len, num_heads, num_kv_heads,
                        SchedulePolicy::kBatchInvariant);
  const double us = microseconds([&](int, Stream stream) { step.combine(stream); });
  fmt::print("combine       {:34} {:8.2f} us\n", name, us);
}

void time_host() {
  DecodeStep step(8, 256, 64, 4);
  const auto print = [](const char* name, double us) {
    fmt::print("host          {:34} {:8.2f} us\n", name, us);
  };
  print("attend and combine", host_microseconds([&] { step.attend(); }));
  print("plan", host_microseconds([&] { step.make_plan(); }));
  print("update_cache", host_microseconds([&] { step.update_cache(); }));
}

int run() {
  if (!backend().available()) {
    fmt::print("no GPU: {}\n", backend().available().reason);
    return 0;
  }
  fmt::print("{}\n", backend().description());
  constexpr auto kBalanced = SchedulePolicy::kBalanced;
  constexpr auto kInvariant = SchedulePolicy::kBatchInvariant;
  time_plan("1 sequence of 131072", 1, 1, 131072, kBalanced);
  time_plan("256 decode sequences", 256, 1, 8192, kBalanced);
  time_plan("256 decode, batch invariant", 256, 1, 8192, kInvariant);
  time_plan("4096 decode sequences", 4096, 1, 8192, kBalanced);
  time_plan("4096 decode, batch invariant", 4096, 1, 8192, kInvariant);
  time_plan("64 x 4 tokens", 64, 4, 16384, kBalanced);
  time_plan("1 prefill of 16384", 1, 16384, 16384, kBalanced);
  time_plan("4 prefills of 4096", 4, 4096, 4096, kBalanced);
  time_combine("1 x 131072, 64/4 heads", 1, 131072, 64, 4);
  time_combine("8 x 32768, 16/1 heads", 8, 32768, 16, 1);
  time_combine("64 x 8192, 64/4 heads", 64, 8192, 64, 4);
  time_combine("512 x 1024, 64/4 heads: few cuts", 512, 1024, 64, 4);
  time_host();
  time_update("1 x 4/4 heads, 256 tokens, bf16", 256, DType::kBF16, DType::kBF16);
  time_update("8192 tokens bf16", 8192, DType::kBF16, DType::kBF16);
  time_update("32768 tokens bf16", 32768, DType::kBF16, DType::kBF16);
  time_update("8192 tokens bf16 to e4m3", 8192, DType::kBF16, DType::kE4M3);
  time_update("32768 tokens bf16 to e4m3", 32768, DType::kBF16, DType::kE4M3);
  time_update("32768 tokens fp16 to e5m2", 32768, DType::kF16, DType::kE5M2);
  time_update("16384 tokens fp32 to e4m3", 16384, DType::kF32, DType::kE4M3);
  return 0;
}

}  // namespace
}  // namespace diffkv::cuda

int main() {
  try {
    return diffkv::cuda::run();
  } catch (const std::exception& error) {
    fmt::print("error: {}\n", error.what());
    return 2;
  }
}
