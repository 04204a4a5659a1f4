// A CUDA stream, its events and graphs.
#include "device/cuda_session.h"

#include <cuda_runtime_api.h>

#include <optional>
#include <vector>

#include "device/cuda_check.h"
#include "device/cuda_cold_reads.h"

namespace diffkv::device {
namespace {

class CudaMarks final : public Marks {
 public:
  CudaMarks(std::size_t count, cudaStream_t stream) : stream_(stream) {
    for (std::size_t i = 0; i < count; ++i) {
      events_.emplace_back();
      DIFFKV_CHECK_CUDA(cudaEventCreate(&events_.back()));
    }
  }
  ~CudaMarks() override {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  CudaMarks(const CudaMarks&) = delete;
  CudaMarks& operator=(const CudaMarks&) = delete;

  void set(std::size_t mark) override {
    // In a capture an event is the graph's own business unless it is said to be external.
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    DIFFKV_CHECK_CUDA(cudaStreamIsCapturing(stream_, &capture));
    DIFFKV_CHECK_CUDA(cudaEventRecordWithFlags(
        events_.at(mark), stream_,
        capture == cudaStreamCaptureStatusNone ? cudaEventRecordDefault : cudaEventRecordExternal));
  }

  double seconds(std::size_t from, std::size_t to) override {
    DIFFKV_CHECK_CUDA(cudaEventSynchronize(events_.at(from)));
    DIFFKV_CHECK_CUDA(cudaEventSynchronize(events_.at(to)));
    float milliseconds = 0;
    DIFFKV_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, events_.at(from), events_.at(to)));
    return static_cast<double>(milliseconds) * 1e-3;
  }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

class Graph final : public Recording {
 public:
  Graph(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    DIFFKV_CHECK_CUDA(cudaGraphInstantiate(&executable_, graph, 0));
    // So that the first launch is like the others.
    DIFFKV_CHECK_CUDA(cudaGraphUpload(executable_, stream_));
  }
  ~Graph() override {
    if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() override { DIFFKV_CHECK_CUDA(cudaGraphLaunch(executable_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
};

class CudaSession final : public Session {
 public:
  explicit CudaSession(const Backend& backend) : Session(backend) {
    DIFFKV_CHECK_CUDA(cudaSetDevice(device().index));
    DIFFKV_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaSession() override {
    cold_reads_.reset();
    cudaStreamDestroy(stream_);
  }

  Stream stream() const override { return {stream_}; }
  std::unique_ptr<Marks> make_marks(std::size_t count) const override {
    return std::make_unique<CudaMarks>(count, stream_);
  }
  std::string cannot_record() const override { return ""; }

  std::unique_ptr<Recording> record(const std::function<void()>& work) const override {
    DIFFKV_CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      // The stream must leave the capture, whatever went wrong in it.
      if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess) cudaGraphDestroy(graph);
      throw;
    }
    DIFFKV_CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
    const std::unique_ptr<CUgraph_st, cudaError_t (*)(cudaGraph_t)> owner(graph, cudaGraphDestroy);
    return std::make_unique<Graph>(graph, stream_);
  }

  void copy(void* to, const void* from, std::int64_t bytes) const override {
    DIFFKV_CHECK_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes),
                                      cudaMemcpyDeviceToDevice, stream_));
  }

  double measure_read_rate() override {
    constexpr std::int64_t kBytes = std::int64_t{1} << 30;
    return static_cast<double>(kBytes) / cold_reads()->seconds(kBytes, 0);
  }

  ColdReads* cold_reads() override {
    if (!cold_reads_) cold_reads_ = make_cuda_cold_reads(*this);
    return cold_reads_.get();
  }

 private:
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<ColdReads> cold_reads_;
};

}  // namespace

std::unique_ptr<Session> open_cuda_session(const Backend& backend) {
  return std::make_unique<CudaSession>(backend);
}

}  // namespace diffkv::device
