// Kernels that only read. A block reads one contiguous run, as a worker does that walks a cache, by
// one of two ways: bulk copies into a ring of shared memory (GPUs of compute capability 9 and up),
// or 16-byte loads into registers. Which one is faster, with how many blocks and how large pieces,
// depends on the GPU and the size: all are timed and the fastest counts.
#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "device/cuda_check.h"
#include "device/cuda_cold_reads.h"

namespace diffkv::device {
namespace {

constexpr int kRepetitions = 20;
constexpr int kWarmUps = 3;
// Written between two repetitions: several times the caches of the largest GPU.
constexpr std::int64_t kFlushBytes = std::int64_t{256} << 20;
constexpr long long kBusyCycles = 200'000;  // about 0.1 ms
constexpr int kMaxStages = 16;
constexpr int kThreads = 256;
constexpr int kLoadsInFlight = 8;
constexpr std::int64_t kVectorBytes = 16;

__global__ void stay_busy(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

// Words that no memory compresses.
__global__ void fill_noise(std::uint32_t* words, std::int64_t count) {
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 0x9e3779b9U;
    x = (x ^ (x >> 16)) * 0x85ebca6bU;
    words[i] = x ^ (x >> 13);
  }
}

// The share of `count` things of this block.
struct Share {
  std::int64_t begin;
  std::int64_t end;
};
__device__ Share share_of(std::int64_t count) {
  return {count * blockIdx.x / gridDim.x, count * (blockIdx.x + 1) / gridDim.x};
}

__device__ void write_share(uint4* to, std::int64_t count, int first_thread) {
  const Share share = share_of(count);
  const int thread = static_cast<int>(threadIdx.x) - first_thread;
  if (thread < 0) return;
  for (std::int64_t i = share.begin + thread; i < share.end; i += blockDim.x - first_thread) {
    to[i] = make_uint4(1, 2, 3, 4);
  }
}

struct ReadParams {
  const std::byte* from;
  std::int64_t bytes;
  uint4* to;  // [writes]
  std::int64_t writes;
  std::int32_t piece_bytes;  // of a bulk copy
  std::int32_t stages;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// The first warp's first thread copies, the other warps write.
__global__ void read_by_bulk_copies(const __grid_constant__ ReadParams params) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte ring[];
  __shared__ __align__(8) std::uint64_t arrived[kMaxStages];
  write_share(params.to, params.writes, warpSize);
  if (threadIdx.x != 0) return;
  for (int stage = 0; stage < params.stages; ++stage) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrived + stage)));
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const Share share = share_of(params.bytes / params.piece_bytes);
  const auto start = [&](std::int64_t piece, int stage) {
    const std::uint32_t barrier = shared_address(arrived + stage);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(params.piece_bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(ring + std::int64_t{stage} * params.piece_bytes)),
        "l"(params.from + piece * params.piece_bytes), "r"(params.piece_bytes), "r"(barrier)
        : "memory");
  };
  std::int64_t next = share.begin;
  for (; next < share.end && next - share.begin < params.stages; ++next) {
    start(next, static_cast<int>(next - share.begin));
  }
  int stage = 0;
  std::uint32_t phase = 0;
  for (std::int64_t piece = share.begin; piece < share.end; ++piece) {
    std::uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(shared_address(arrived + stage)), "r"(phase)
          : "memory");
    }
    if (next < share.end) start(next++, stage);
    if (++stage == params.stages) {
      stage = 0;
      phase ^= 1U;
    }
  }
#endif
}

__global__ void __launch_bounds__(kThreads)
    read_by_loads(const __grid_constant__ ReadParams params) {
  const auto* from = reinterpret_cast<const uint4*>(params.from);
  const Share share = share_of(params.bytes / kVectorBytes);
  std::uint32_t sum = 0;
  for (std::int64_t i = share.begin + threadIdx.x; i < share.end; i += kLoadsInFlight * kThreads) {
    uint4 values[kLoadsInFlight];
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) {
      const std::int64_t at = i + std::int64_t{k} * kThreads;
      values[k] = at < share.end ? __ldcs(from + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (const uint4& value : values) sum ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  write_share(params.to, params.writes, 0);
  // Never so in noise, but the compiler cannot know and must read everything.
  if (sum == 0x12345678U && params.writes > 0) params.to[0].x = sum;
}

struct Way {
  bool bulk;
  int blocks_per_sm;
  std::int32_t piece_bytes;  // of bulk copies
};

class CudaColdReads final : public ColdReads {
 public:
  explicit CudaColdReads(const Session& session)
      : session_(&session), flush_(session.backend(), kFlushBytes), marks_(session.make_marks(2)) {
    int capability = 0;
    const int index = session.device().index;
    DIFFKV_CHECK_CUDA(
        cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index));
    DIFFKV_CHECK_CUDA(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, index));
    DIFFKV_CHECK_CUDA(
        cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    ways_ = {{false, 4, 0}, {false, 8, 0}};
    if (capability < 9) return;
    for (const int blocks_per_sm : {1, 2}) {
      for (const std::int32_t piece : {20'480, 36'864}) {
        ways_.push_back({true, blocks_per_sm, piece});
      }
    }
    DIFFKV_CHECK_CUDA(cudaFuncSetAttribute(
        read_by_bulk_copies, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_ - 1024));
  }

  void flush() override {
    flush_.fill(++flushes_, session_->stream());
    stay_busy<<<1, 1, 0, stream()>>>(kBusyCycles);
    DIFFKV_CHECK_CUDA(cudaGetLastError());
  }

  double seconds(std::int64_t read_bytes, std::int64_t written_bytes) override {
    const auto [it, is_new] = known_.try_emplace({read_bytes, written_bytes}, 0.0);
    if (!is_new) return it->second;
    reserve(read_bytes, written_bytes);
    double least = 0.0;
    for (const Way& way : ways_) {
      const double median = median_seconds(way, read_bytes, written_bytes);
      if (least == 0.0 || median < least) least = median;
    }
    return it->second = least;
  }

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(session_->stream().handle); }

  void reserve(std::int64_t read_bytes, std::int64_t written_bytes) {
    if (written_.bytes() < written_bytes) {
      written_ = Memory();
      written_ = Memory(session_->backend(), written_bytes);
    }
    if (noise_.bytes() >= read_bytes) return;
    noise_ = Memory();  // the old goes first
    noise_ = Memory(session_->backend(), read_bytes);
    fill_noise<<<8 * num_sms_, kThreads, 0, stream()>>>(
        reinterpret_cast<std::uint32_t*>(noise_.data()), noise_.bytes() / 4);
    DIFFKV_CHECK_CUDA(cudaGetLastError());
  }

  void launch(const Way& way, std::int64_t read_bytes, std::int64_t written_bytes) const {
    ReadParams params{noise_.data(),
                      read_bytes,
                      reinterpret_cast<uint4*>(written_.data()),
                      written_bytes / kVectorBytes,
                      way.piece_bytes,
                      0};
    const int blocks = way.blocks_per_sm * num_sms_;
    if (way.bulk) {
      // Two blocks of an SM share what one may have; some is the blocks' own.
      const int room = (shared_bytes_ - 2048) / way.blocks_per_sm - 1024;
      params.stages = std::min(room / way.piece_bytes, kMaxStages);
      read_by_bulk_copies<<<blocks, 4 * 32, params.stages * params.piece_bytes, stream()>>>(params);
    } else {
      read_by_loads<<<blocks, kThreads, 0, stream()>>>(params);
    }
    DIFFKV_CHECK_CUDA(cudaGetLastError());
  }

  double median_seconds(const Way& way, std::int64_t read_bytes, std::int64_t written_bytes) {
    const auto recording = session_->record([&] { launch(way, read_bytes, written_bytes); });
    std::vector<double> times;
    for (int i = 0; i < kWarmUps + kRepetitions; ++i) {
      flush();
      marks_->set(0);
      recording->launch();
      marks_->set(1);
      const double time = marks_->seconds(0, 1);
      if (i >= kWarmUps) times.push_back(time);
    }
    std::nth_element(times.begin(), times.begin() + kRepetitions / 2, times.end());
    return times[kRepetitions / 2];
  }

  const Session* session_;
  Memory flush_;
  Memory noise_;
  Memory written_;
  std::unique_ptr<Marks> marks_;
  std::vector<Way> ways_;
  std::map<std::pair<std::int64_t, std::int64_t>, double> known_;  // by bytes read and written
  std::uint8_t flushes_ = 0;
  int num_sms_ = 0;
  int shared_bytes_ = 0;
};

}  // namespace

std::unique_ptr<ColdReads> make_cuda_cold_reads(const Session& session) {
  return std::make_unique<CudaColdReads>(session);
}

}  // namespace diffkv::device
