// The tensor-core kernels alone: first every case against a plain fp64 kernel, then the time of
// each shape beside the time to read its cache. Needs no other part of the CUDA backend.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/generic/family.cuh"
#include "plan/host_plan.h"

namespace diffkv::cuda {
namespace {

struct Shape {
  std::string name;
  std::vector<int> query_lens;
  std::vector<int> seq_lens;
  int heads = 64;
  int kv_heads = 4;
  int qk = 192;
  int v = 128;
  int page = 64;
  int window = 0;
  bool causal = true;
  bool sinks = false;
  float soft_cap = 0.0F;
  bool alibi = false;
  bool separate = false;
  DType query = DType::kBF16;
  DType stored = DType::kBF16;
  SchedulePolicy policy = SchedulePolicy::kBalanced;
};

void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}
#define MUST(call) must((call), #call)

template <class X>
X* on_device(const std::vector<X>& host) {
  X* data = nullptr;
  MUST(cudaMalloc(&data, std::max<std::size_t>(host.size(), 1) * sizeof(X)));
  MUST(cudaMemcpy(data, host.data(), host.size() * sizeof(X), cudaMemcpyHostToDevice));
  return data;
}

__device__ float noise(std::uint64_t i) {
  i *= 0x9e3779b97f4a7c15ULL;
  i ^= i >> 29;
  i *= 0xbf58476d1ce4e5b9ULL;
  i ^= i >> 32;
  // A sum of two uniform numbers, -1.7 to 1.7, of variance 1/2.
  return (static_cast<float>(i & 0xffffU) + static_cast<float>(i >> 16 & 0xffffU)) * 0x1.bp-16F -
         1.7F;
}

__global__ void fill_poison(std::uint8_t* p, std::size_t n) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    p[i] = 0xff;  // NaN in every type but e5m2 pairs, where it is NaN too
  }
}

// Row r of `rows` is token r of all sequences' keys one after another; K has a direction that
// queries share, so that scores are peaked; V has a mean.
__global__ void fill_cache(PlaneParams plane, int size, const std::int64_t* slots,
                           std::int64_t rows, int kv_heads, int page, float mean, float peak,
                           std::uint64_t seed) {
  const std::int64_t total = rows * kv_heads * size;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t d = i % size;
    const std::int64_t h = i / size % kv_heads;
    const std::int64_t r = i / size / kv_heads;
    const float x = noise(i + seed) + mean + (noise(r * 977 + h + seed) > 1.2F ? peak : 0.0F);
    const std::int64_t at = slots[r] / page * plane.stride_block +
                            slots[r] % page * plane.stride_token + h * plane.stride_head + d;
    core::store_row(plane.dtype, &x, 1,
                    const_cast<std::byte*>(plane.data) + at * size_of(plane.dtype));
  }
}

__global__ void fill_rows(RowsParams rows, std::int64_t total, float mean, std::uint64_t seed) {
  const std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (i >= total) return;
  const float x = noise(i + seed) + mean;
  core::store_row(rows.dtype, &x, 1, rows.data + i * size_of(rows.dtype));
}

struct Reference {
  const std::int32_t* token_seq;    // [tokens]
  const std::int32_t* token_index;  // within the sequence
  const std::int32_t* query_lens;
  const std::int32_t* seq_lens;
  double* scores;  // [rows, max_len]
  std::int64_t max_len;
  int window;
  bool causal;
  double* out;  // [rows, v]
  double* lse;
  std::int64_t first;  // row = (token, head)
  int heads;
};

__global__ void reference(AttendKernelParams p, Reference ref) {
  const std::int64_t row = ref.first + blockIdx.x;
  const std::int64_t token = row / ref.heads;
  const int head = static_cast<int>(row % ref.heads);
  const int seq = ref.token_seq[token];
  const int kv = head / p.schedule.group;
  const std::int64_t len = ref.seq_lens[seq];
  const std::int64_t pos = len - ref.query_lens[seq] + ref.token_index[token];
  double* scores = ref.scores + blockIdx.x * ref.max_len;
  const std::byte* q = row_at(p.query, token, head);
  const auto plane_row = [&](const PlaneParams& plane, std::int64_t key) {
    const std::int64_t page = p.block_table[seq * p.block_table_stride + key / p.block_size];
    return plane.data + (page * plane.stride_block + key % p.block_size * plane.stride_token +
                         kv * plane.stride_head) *
                            size_of(plane.dtype);
  };
  __shared__ double shared[256];
  const auto sees = [&](std::int64_t key) {
    return key < len && (!ref.causal || key <= pos) && (ref.window <= 0 || pos - key < ref.window) &&
           (ref.window <= 0 || ref.causal || key - pos < ref.window);
  };
  double top = -INFINITY;
  for (std::int64_t key = threadIdx.x; key < len; key += blockDim.x) {
    if (!sees(key)) continue;
    double s = 0;
    const std::byte* k = plane_row(p.key, key);
    for (int d = 0; d < p.head_size_qk; ++d) {
      s += double{core::load_element(p.query.dtype, q, d)} * core::load_element(p.key.dtype, k, d);
    }
    s *= p.scale;
    if (p.soft_cap > 0) s = p.soft_cap * tanh(s / p.soft_cap);
    if (p.alibi_slopes.data != nullptr) {
      s += scale_at(p.alibi_slopes, head) * static_cast<double>(key - (len - ref.query_lens[seq]));
    }
    scores[key] = s;
    top = max(top, s);
  }
  shared[threadIdx.x] = top;
  __syncthreads();
  for (int i = 0; i < blockDim.x; ++i) top = max(top, shared[i]);
  __syncthreads();
  const double sink = p.sinks.data == nullptr ? -INFINITY : scale_at(p.sinks, head);
  top = max(top, sink);
  double sum = 0;
  for (std::int64_t key = threadIdx.x; key < len; key += blockDim.x) {
    if (sees(key)) sum += exp(scores[key] - top);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = sink > -INFINITY ? exp(sink - top) : 0.0;
  for (int i = 0; i < blockDim.x; ++i) sum += shared[i];
  for (int d = threadIdx.x; d < p.head_size_v; d += blockDim.x) {
    double acc = 0;
    for (std::int64_t key = 0; key < len; ++key) {
      if (!sees(key)) continue;
      acc += exp(scores[key] - top) * core::load_element(p.value.dtype, plane_row(p.value, key), d);
    }
    ref.out[blockIdx.x * std::int64_t{p.head_size_v} + d] = sum > 0 ? acc / sum : 0.0;
  }
  if (threadIdx.x == 0) ref.lse[blockIdx.x] = sum > 0 ? top + log(sum) : -INFINITY;
}

// Merges cut tiles; only as right as a timing needs, the library has its own.
void combine_on_host(const AttendKernelParams& p, const plan::ScheduleView& host_view,
                     std::vector<float>& out, std::vector<float>& lse, int heads, int tokens,
                     std::int64_t partial_rows, const std::vector<float>& sinks) {
  const detail::PlanTables& tables = p.schedule.tables;
  std::vector<float> acc(partial_rows * tables.partial_stride);
  std::vector<float> max(partial_rows);
  std::vector<float> sum(partial_rows);
  MUST(cudaMemcpy(acc.data(), tables.partial_acc, acc.size() * 4, cudaMemcpyDeviceToHost));
  MUST(cudaMemcpy(max.data(), tables.partial_max, max.size() * 4, cudaMemcpyDeviceToHost));
  MUST(cudaMemcpy(sum.data(), tables.partial_sum, sum.size() * 4, cudaMemcpyDeviceToHost));
  for (int c = 0; c < host_view.limits.num_classes; ++c) {
    for (int w = 0; w < host_view.limits.classes[c].workers; ++w) {
      plan::for_each_piece(host_view, c, w, [&](const plan::Piece& piece) {
        if (piece.slot < 0 || !piece.first()) return;
        for (int row = 0; row < piece.tile.num_rows; ++row) {
          const int index = piece.tile.first_row + row;
          const int token = host_view.tables.query_start_loc[piece.seq] + index / host_view.group;
          const int head = piece.tile.kv_head * host_view.group + index % host_view.group;
          core::SoftmaxState state;
          std::vector<double> total(p.head_size_v, 0.0);
          plan::for_each_partial(host_view, c, w, piece, [&](std::int32_t slot) {
            const std::int64_t at = plan::partial_row(host_view, c, slot, row);
            float keep = 0;
            float add = 0;
            core::merge(state, {max[at], sum[at]}, keep, add);
            for (int d = 0; d < p.head_size_v; ++d) {
              total[d] = total[d] * keep + acc[at * tables.partial_stride + d] * add;
            }
          });
          const core::SoftmaxEnd end =
              core::finish(state, sinks.empty() ? core::kNegInf : sinks[head]);
          for (int d = 0; d < p.head_size_v; ++d) {
            out[(std::int64_t{token} * heads + head) * p.head_size_v + d] =
                end.empty ? 0.0F : static_cast<float>(total[d] * end.factor);
          }
          lse[std::int64_t{head} * tokens + token] = end.lse;
        }
      });
    }
  }
}

__global__ void spin(long long t) {
  const long long s = clock64();
  while (clock64() - s < t) {
  }
}

template <class Launch>
double median_us(Launch&& launch, int repeats) {
  static std::byte* flush = nullptr;
  constexpr std::size_t kFlush = std::size_t{256} << 20;
  if (flush == nullptr) MUST(cudaMalloc(&flush, kFlush));
  cudaStream_t stream;
  MUST(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  launch(stream);
  MUST(cudaStreamEndCapture(stream, &graph));
  MUST(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t a;
  cudaEvent_t b;
  MUST(cudaEventCreate(&a));
  MUST(cudaEventCreate(&b));
  std::vector<float> times;
  for (int i = 0; i < repeats + 4; ++i) {
    MUST(cudaMemsetAsync(flush, i, kFlush, stream));
    spin<<<1, 1, 0, stream>>>(200000);
    MUST(cudaEventRecord(a, stream));
    MUST(cudaGraphLaunch(exec, stream));
    MUST(cudaEventRecord(b, stream));
    MUST(cudaEventSynchronize(b));
    float ms = 0;
    MUST(cudaEventElapsedTime(&ms, a, b));
    if (i >= 4) times.push_back(ms * 1e3F);
  }
  std::sort(times.begin(), times.end());
  MUST(cudaGraphExecDestroy(exec));
  MUST(cudaGraphDestroy(graph));
  MUST(cudaStreamDestroy(stream));
  return times[times.size() / 2];
}

// Only reads: each block a contiguous part, in bulk copies.
__global__ void read_floor(const std::byte* p, std::size_t bytes, int chunk, int stages) {
  extern __shared__ __align__(128) std::byte memory[];
  __shared__ ptx::Barrier full[32];
  if (threadIdx.x != 0) return;
  for (int s = 0; s < stages; ++s) ptx::init(full + s, 1);
  ptx::fence_barrier_init();
  const std::size_t chunks = bytes / chunk;
  const std::size_t low = chunks * blockIdx.x / gridDim.x;
  const std::size_t count = chunks * (blockIdx.x + 1) / gridDim.x - low;
  const auto issue = [&](std::size_t k) {
    const int s = static_cast<int>(k % stages);
    ptx::arrive_expecting(full + s, chunk);
    ptx::copy_bulk(ptx::shared_address(memory) + s * chunk, p + (low + k) * chunk, chunk, full + s);
  };
  for (std::size_t k = 0; k < std::min<std::size_t>(stages, count); ++k) issue(k);
  for (std::size_t k = 0; k < count; ++k) {
    ptx::wait(full + k % stages, k / stages & 1);
    if (k + stages < count) issue(k + stages);
  }
}

double floor_us(double bytes) {
  static std::byte* data = nullptr;
  constexpr std::size_t kMost = std::size_t{1400} << 20;
  if (data == nullptr) {
    MUST(cudaMalloc(&data, kMost));
    fill_poison<<<1320, 256>>>(reinterpret_cast<std::uint8_t*>(data), kMost);
    MUST(cudaFuncSetAttribute(read_floor, cudaFuncAttributeMaxDynamicSharedMemorySize, 220000));
  }
  double best = 1e30;
  for (const int chunk : {20480, 36864}) {
    for (const int grid : {132, 264}) {
      const int stages = (grid == 132 ? 200000 : 100000) / chunk;
      best = std::min(best, median_us(
                                [&](cudaStream_t stream) {
                                  read_floor<<<grid, 32, stages * chunk, stream>>>(
                                      data, static_cast<std::size_t>(bytes), chunk, stages);
                                },
                                20));
    }
  }
  return best;
}

const AttendKernel* kernel_of(const Shape& s) {
  for (const Instance& i : instances()) {
    if (i.query == s.query && i.stored == s.stored && s.qk <= i.head_size_qk &&
        s.v <= i.head_size_v) {
      return &i.kernel().attend;
    }
  }
  std::printf("%s: no kernel\n", s.name.c_str());
  return nullptr;
}

// Runs a shape; checks up to `most_rows` rows, times if asked. Returns whether it was right.
bool run(const Shape& s, std::int64_t most_rows, bool timed, unsigned seed) {
  const AttendKernel* kernel = kernel_of(s);
  if (kernel == nullptr) return false;
  std::mt19937 random(seed);
  const int num_seqs = static_cast<int>(s.seq_lens.size());
  PlanKey key;
  key.num_heads = s.heads;
  key.num_kv_heads = s.kv_heads;
  key.head_size_qk = s.qk;
  key.head_size_v = s.v;
  key.query_dtype = s.query;
  key.key_dtype = key.value_dtype = s.stored;
  key.mask.causal = s.causal;
  key.mask.window = s.window;
  key.policy = s.policy;
  const ScheduleLimits limits = kernel->limits(key, current_gpu());

  std::vector<std::int32_t> start(num_seqs + 1, 0);
  std::vector<std::int32_t> token_seq;
  std::vector<std::int32_t> token_index;
  std::int64_t pages = 0;
  int max_blocks = 1;
  for (int i = 0; i < num_seqs; ++i) {
    start[i + 1] = start[i] + s.query_lens[i];
    for (int t = 0; t < s.query_lens[i]; ++t) {
      token_seq.push_back(i);
      token_index.push_back(t);
    }
    const int blocks = (s.seq_lens[i] + s.page - 1) / s.page;
    pages += blocks;
    max_blocks = std::max(max_blocks, blocks);
  }
  const int tokens = start[num_seqs];
  std::vector<std::int32_t> ids(pages + 1);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), random);
  std::vector<std::int32_t> table(std::int64_t{num_seqs} * max_blocks, 0x7fffffff);
  std::vector<std::int64_t> slots;
  std::int64_t used = 0;
  for (int i = 0; i < num_seqs; ++i) {
    for (int j = 0; j < s.seq_lens[i]; ++j) {
      if (j % s.page == 0) table[std::int64_t{i} * max_blocks + j / s.page] = ids[used++];
      slots.push_back(std::int64_t{ids[used - 1]} * s.page + j % s.page);
    }
  }

  AttendKernelParams p{};
  const std::int64_t stored = size_of(s.stored);
  const std::int64_t row = s.separate ? s.qk : s.qk + s.v;
  const std::int64_t num_pages = pages + 1;
  std::byte* cache = nullptr;
  const std::int64_t cache_bytes = num_pages * s.page * s.kv_heads * (s.qk + s.v) * stored;
  MUST(cudaMalloc(&cache, cache_bytes));
  fill_poison<<<1320, 256>>>(reinterpret_cast<std::uint8_t*>(cache), cache_bytes);
  p.key = {cache, std::int64_t{s.page} * s.kv_heads * row, s.kv_heads * row, row, s.stored};
  p.value = p.key;
  p.value.data = cache + s.qk * stored;
  if (s.separate) {
    p.value.data = cache + num_pages * s.page * s.kv_heads * s.qk * stored;
    p.value.stride_head = s.v;
    p.value.stride_token = std::int64_t{s.kv_heads} * s.v;
    p.value.stride_block = p.value.stride_token * s.page;
  }
  std::int64_t* device_slots = on_device(slots);
  const auto rows = static_cast<std::int64_t>(slots.size());
  fill_cache<<<2640, 256>>>(p.key, s.qk, device_slots, rows, s.kv_heads, s.page, 0.0F, 0.35F, seed);
  fill_cache<<<2640, 256>>>(p.value, s.v, device_slots, rows, s.kv_heads, s.page, 0.5F, 0.0F,
                            seed + 77);
  const auto dense_rows = [&](int size, DType dtype) {
    RowsParams r{};
    MUST(cudaMalloc(&r.data, std::int64_t{tokens} * s.heads * size * size_of(dtype)));
    r.stride_head = size;
    r.stride_token = std::int64_t{s.heads} * size;
    r.dtype = dtype;
    return r;
  };
  p.query = dense_rows(s.qk, s.query);
  const std::int64_t query_numel = std::int64_t{tokens} * s.heads * s.qk;
  fill_rows<<<static_cast<unsigned>((query_numel + 255) / 256), 256>>>(p.query, query_numel, 0.3F,
                                                                       seed + 5);
  p.output = dense_rows(s.v, timed ? DType::kBF16 : DType::kF32);
  MUST(cudaMalloc(&p.lse, std::int64_t{tokens} * s.heads * 4));
  MUST(cudaMemset(p.lse, 0xff, std::int64_t{tokens} * s.heads * 4));
  MUST(cudaMemset(p.output.data, 0xff,
                  std::int64_t{tokens} * s.heads * s.v * size_of(p.output.dtype)));
  p.lse_stride_head = tokens;
  p.lse_stride_token = 1;
  p.head_size_qk = s.qk;
  p.head_size_v = s.v;
  p.num_blocks = static_cast<std::int32_t>(num_pages);
  p.block_size = s.page;
  p.block_shift = (s.page & (s.page - 1)) == 0 ? __builtin_ctz(s.page) : -1;
  p.max_blocks = max_blocks;
  p.block_table = on_device(table);
  p.block_table_stride = max_blocks;
  p.scale = 1.0F / std::sqrt(static_cast<float>(s.qk));
  p.soft_cap = s.soft_cap;
  std::vector<float> sinks;
  std::vector<float> slopes;
  for (int h = 0; h < s.heads; ++h) {
    if (s.sinks) sinks.push_back(0.25F * h - 2.0F);
    if (s.alibi) slopes.push_back(0.01F * (h + 1));
  }
  if (s.sinks) p.sinks = {on_device(sinks), 1, DType::kF32};
  if (s.alibi) p.alibi_slopes = {on_device(slopes), 1, DType::kF32};

  // The plan, made here and copied.
  Batch batch;
  batch.num_seqs = num_seqs;
  batch.num_actual_tokens = tokens;
  batch.query_start_loc = view_of(static_cast<const std::int32_t*>(start.data()), {num_seqs + 1});
  batch.seq_lens = view_of(static_cast<const std::int32_t*>(s.seq_lens.data()), {num_seqs});
  detail::PlanTables host;
  host.num_seqs = num_seqs;
  host.num_tokens = tokens;
  std::vector<std::int32_t> loc(num_seqs + 1);
  std::vector<std::int32_t> lens(num_seqs);
  std::vector<std::int32_t> slot_before(num_seqs);
  std::vector<std::vector<std::int64_t>> cost(limits.num_classes);
  std::vector<std::vector<detail::WorkStart>> starts(limits.num_classes);
  host.query_start_loc = loc.data();
  host.seq_lens = lens.data();
  if (s.policy == SchedulePolicy::kBatchInvariant) host.slot_before = slot_before.data();
  std::int64_t partial_rows = 0;
  std::int64_t slot_count = 0;
  for (int c = 0; c < limits.num_classes; ++c) {
    cost[c].resize(num_seqs + 1);
    starts[c].resize(limits.classes[c].workers + 1);
    host.cost_before[c] = cost[c].data();
    host.starts[c] = starts[c].data();
    host.first_slot[c] = static_cast<std::int32_t>(slot_count);
    host.first_partial_row[c] = partial_rows;
    const std::int64_t slots_here = s.policy == SchedulePolicy::kBalanced
                                        ? 2 * limits.classes[c].workers
                                        : std::int64_t{16} * num_seqs * s.kv_heads;
    slot_count += slots_here;
    partial_rows += slots_here * limits.classes[c].tile_rows;
  }
  host.num_slots = static_cast<std::int32_t>(slot_count);
  host.partial_stride = s.v <= 64 ? 64 : s.v <= 128 ? 128 : 256;
  plan::plan_on_host(key, limits, batch, host);
  const plan::ScheduleView host_view = plan::schedule_view(key, limits, host, batch);
  detail::PlanTables device = host;
  device.query_start_loc = on_device(loc);
  device.seq_lens = on_device(lens);
  if (host.slot_before != nullptr) device.slot_before = on_device(slot_before);
  for (int c = 0; c < limits.num_classes; ++c) {
    device.cost_before[c] = on_device(cost[c]);
    device.starts[c] = on_device(starts[c]);
  }
  MUST(cudaMalloc(&device.partial_acc, partial_rows * host.partial_stride * 4));
  MUST(cudaMalloc(&device.partial_max, partial_rows * 4));
  MUST(cudaMalloc(&device.partial_sum, partial_rows * 4));
  p.schedule = plan::schedule_view(key, limits, device, batch);
  std::vector<int> classes;
  for (int c = 0; c < limits.num_classes; ++c) {
    if (cost[c].back() > 0) classes.push_back(c);
  }
  const auto launch = [&](cudaStream_t stream) {
    for (const int c : classes) kernel->launch(p, c, stream);
  };
  launch(nullptr);
  MUST(cudaDeviceSynchronize());

  // Compares.
  const std::int64_t all_rows = std::int64_t{tokens} * s.heads;
  std::vector<float> out(all_rows * s.v);
  std::vector<float> lse(all_rows);
  if (timed) {
    std::vector<std::uint16_t> half(out.size());
    MUST(cudaMemcpy(half.data(), p.output.data, half.size() * 2, cudaMemcpyDeviceToHost));
    std::transform(half.begin(), half.end(), out.begin(), core::bf16_to_float);
  } else {
    MUST(cudaMemcpy(out.data(), p.output.data, out.size() * 4, cudaMemcpyDeviceToHost));
  }
  MUST(cudaMemcpy(lse.data(), p.lse, lse.size() * 4, cudaMemcpyDeviceToHost));
  combine_on_host(p, host_view, out, lse, s.heads, tokens, partial_rows, sinks);
  const std::int64_t checked = std::min(all_rows, most_rows);
  Reference ref{};
  ref.token_seq = on_device(token_seq);
  ref.token_index = on_device(token_index);
  ref.query_lens = on_device(s.query_lens);
  ref.seq_lens = on_device(s.seq_lens);
  ref.max_len = *std::max_element(s.seq_lens.begin(), s.seq_lens.end()) + 1;
  ref.window = s.window;
  ref.causal = s.causal;
  ref.heads = s.heads;
  // The last rows: the largest positions.
  ref.first = all_rows - checked;
  MUST(cudaMalloc(&ref.scores, checked * ref.max_len * 8));
  MUST(cudaMalloc(&ref.out, checked * s.v * 8));
  MUST(cudaMalloc(&ref.lse, checked * 8));
  reference<<<static_cast<unsigned>(checked), 256>>>(p, ref);
  MUST(cudaDeviceSynchronize());
  std::vector<double> ref_out(checked * s.v);
  std::vector<double> ref_lse(checked);
  MUST(cudaMemcpy(ref_out.data(), ref.out, ref_out.size() * 8, cudaMemcpyDeviceToHost));
  MUST(cudaMemcpy(ref_lse.data(), ref.lse, ref_lse.size() * 8, cudaMemcpyDeviceToHost));
  double worst = 0;
  double worst_lse = 0;
  std::int64_t worst_row = -1;
  for (std::int64_t r = 0; r < checked; ++r) {
    double error = 0;
    double norm = 0;
    for (int d = 0; d < s.v; ++d) {
      const double x = ref_out[r * s.v + d];
      const double e = out[(ref.first + r) * s.v + d] - x;
      error += e * e;
      norm += x * x;
    }
    double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (std::isnan(relative)) relative = 1e9;
    if (relative > worst) {
      worst = relative;
      worst_row = ref.first + r;
    }
    const double got = lse[(ref.first + r) % s.heads * tokens + (ref.first + r) / s.heads];
    const double off = std::isinf(ref_lse[r]) ? (got == ref_lse[r] ? 0.0 : 1e9)
                                              : std::abs(got - ref_lse[r]);
    worst_lse = std::max(worst_lse, std::isnan(off) ? 1e9 : off);
  }
  const bool right = worst < (s.query == DType::kE4M3   ? 5e-2
                              : s.query == DType::kF16 ? 1e-3
                                                       : 6e-3) &&
                     worst_lse < 1e-3;
  std::printf("%-5s %-44s err %.1e (row %lld) lse %.1e", right ? "ok" : "WRONG", s.name.c_str(),
              worst, static_cast<long long>(worst_row), worst_lse);
  if (timed) {
    double keys = 0;
    double pairs = 0;
    for (int i = 0; i < num_seqs; ++i) {
      const int seen = s.window > 0 ? std::min(s.seq_lens[i], s.window + s.query_lens[i] - 1)
                                    : s.seq_lens[i];
      keys += seen;
      for (int t = 0; t < s.query_lens[i]; ++t) {
        const int position = s.seq_lens[i] - s.query_lens[i] + t;
        pairs += s.window > 0 ? std::min(s.window, position + 1) : position + 1;
      }
    }
    const double bytes = keys * s.kv_heads * (s.qk + s.v) * stored;
    const double us = median_us(launch, 20);
    if (bytes / 4.7e6 > pairs * 2 * s.heads * (s.qk + s.v) / 6e8) {
      const double floor = floor_us(bytes);
      std::printf("  %9.2f us  floor %8.2f us (%.2f TB/s)  ratio %.3f", us, floor,
                  bytes / floor * 1e-6, us / floor);
    } else {
      std::printf("  %9.2f us  %.0f TFLOP/s", us, pairs * 2 * s.heads * (s.qk + s.v) / us * 1e-6);
    }
  }
  std::printf("\n");
  std::fflush(stdout);
  MUST(cudaDeviceSynchronize());
  for (void* data : {static_cast<void*>(cache), static_cast<void*>(device_slots),
                     static_cast<void*>(p.query.data), static_cast<void*>(p.output.data),
                     static_cast<void*>(ref.scores), static_cast<void*>(ref.out),
                     static_cast<void*>(device.partial_acc)}) {
    MUST(cudaFree(data));
  }
  return right;
}

std::vector<int> ragged(int n, int len) {
  std::vector<int> lens;
  for (int i = 0; i < n; ++i) lens.push_back(len - 37 * i % 61);
  return lens;
}

std::vector<Shape> small_shapes(DType query, DType stored) {
  std::vector<Shape> shapes;
  const std::string types = std::string(to_string(query)) + "/" + std::string(to_string(stored));
  const auto add = [&](std::string name, Shape s) {
    s.name = types + " " + name;
    s.query = query;
    s.stored = stored;
    shapes.push_back(s);
  };
  for (const int page : {16, 32, 64, 1, 24}) {
    add("decode page " + std::to_string(page),
        {.query_lens = {1, 1, 1, 1, 1}, .seq_lens = {1, 17, 64, 65, 777}, .page = page});
  }
  add("one long", {.query_lens = {1}, .seq_lens = {20011}});
  add("many short", {.query_lens = std::vector<int>(300, 1), .seq_lens = ragged(300, 100)});
  add("window 128, sinks", {.query_lens = std::vector<int>(40, 1),
                            .seq_lens = ragged(40, 900),
                            .kv_heads = 8,
                            .window = 128,
                            .sinks = true});
  add("group 1", {.query_lens = {1, 1}, .seq_lens = {300, 5}, .heads = 3, .kv_heads = 3});
  add("group 40", {.query_lens = {1, 2}, .seq_lens = {300, 500}, .heads = 40, .kv_heads = 1});
  add("cap", {.query_lens = {1, 1}, .seq_lens = {333, 90}, .soft_cap = 3.0F});
  add("alibi", {.query_lens = {1, 3}, .seq_lens = {333, 90}, .alibi = true});
  add("separate", {.query_lens = {1, 1}, .seq_lens = {333, 90}, .separate = true});
  add("speculative", {.query_lens = {4, 2, 3, 4}, .seq_lens = {1000, 64, 3, 70}});
  add("speculative, window", {.query_lens = {4, 2, 3}, .seq_lens = {1000, 64, 3}, .window = 20});
  add("prefill", {.query_lens = {200, 1, 33}, .seq_lens = {200, 70, 500}, .sinks = true});
  add("prefill, window", {.query_lens = {300, 10}, .seq_lens = {700, 70}, .window = 37});
  add("full", {.query_lens = {30, 10}, .seq_lens = {70, 7}, .causal = false});
  add("sizes 96/64", {.query_lens = {1, 40}, .seq_lens = {700, 70}, .qk = 96, .v = 64});
  add("sizes 80/48", {.query_lens = {1, 40}, .seq_lens = {700, 70}, .qk = 80, .v = 48, .separate = true});
  add("invariant", {.query_lens = {1, 1, 3}, .seq_lens = {9000, 70, 4100},
                    .policy = SchedulePolicy::kBatchInvariant});
  return shapes;
}

std::vector<Shape> timed_shapes() {
  std::vector<Shape> shapes;
  const auto add = [&](std::string name, int n, int query_len, int len, Shape s) {
    s.name = std::move(name);
    s.query_lens.assign(n, query_len);
    s.seq_lens.assign(n, len);
    shapes.push_back(s);
  };
  add("decode 1 x 131072, 64/4", 1, 1, 131072, {});
  add("decode 64 x 8192, 64/4", 64, 1, 8192, {});
  add("decode 8 x 32768, 16/1", 8, 1, 32768, {.heads = 16, .kv_heads = 1});
  add("decode 64 x 8192, 64/4, page 16", 64, 1, 8192, {.page = 16});
  add("decode 64 x 8192, 64/4, fp8", 64, 1, 8192, {.stored = DType::kE4M3});
  add("decode 256 x 4096, window 128 + sinks, 64/8", 256, 1, 4096,
      {.kv_heads = 8, .window = 128, .sinks = true});
  add("speculative 4, 16 x 16384, 64/4", 16, 4, 16384, {});
  Shape mixed;
  mixed.name = "decode 128 ragged, 16/1";
  mixed.heads = 16;
  mixed.kv_heads = 1;
  std::mt19937 random(1);
  std::lognormal_distribution<double> lengths(std::log(4096.0), 1.0);
  for (int i = 0; i < 128; ++i) {
    mixed.query_lens.push_back(1);
    mixed.seq_lens.push_back(std::clamp(static_cast<int>(lengths(random)), 64, 65536));
  }
  shapes.push_back(mixed);
  add("prefill 1 x 16384, 64/4", 1, 16384, 16384, {});
  add("prefill 4 x 4096, window 128, 64/8", 4, 4096, 4096,
      {.kv_heads = 8, .window = 128, .sinks = true});
  return shapes;
}

}  // namespace
}  // namespace diffkv::cuda

int main(int argc, char** argv) {
  using namespace diffkv;
  using namespace diffkv::cuda;
  const std::string what = argc > 1 ? argv[1] : "all";  // check, time
  const std::string part = argc > 2 ? argv[2] : "";     // of the names of shapes to run
  int wrong = 0;
  unsigned seed = 1;
  if (what != "time") {
    for (const Instance& i : instances()) {
      if (i.head_size_qk != 192) continue;
      for (const Shape& s : small_shapes(i.query, i.stored)) {
        if (s.name.find(part) != std::string::npos) wrong += !run(s, 1 << 14, false, ++seed);
      }
    }
  }
  if (what != "check") {
    for (const Shape& s : timed_shapes()) {
      if (s.name.find(part) != std::string::npos) wrong += !run(s, 64, true, ++seed);
    }
  }
  std::printf("%d wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
