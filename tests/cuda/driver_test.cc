// The command on machines whose NVIDIA driver is missing, too old, without a GPU or broken: it says
// so, and the CPU works. The driver is a stand-in, so this needs no GPU and uses none.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/cli/command.h"

namespace diffkv::cli {
namespace {

namespace fs = std::filesystem;

class CudaDriver : public CommandTest {
 protected:
  // Variables with which the command finds that driver.
  static std::string driver(int version, int start) {
    return "LD_LIBRARY_PATH='" DIFFKV_FAKE_DRIVER_DIR "' FAKE_DRIVER_VERSION=" +
           std::to_string(version) + " FAKE_DRIVER_START=" + std::to_string(start);
  }

  // Every command that computes refuses the CUDA backend with that reason; the CPU's goes on.
  void expect_unavailable(const std::string& variables, const std::string& reason) const {
    const Outcome info = diffkv("info", variables);
    EXPECT_EQ(info.exit_code, kExitRight) << info.err;
    EXPECT_NE(info.out.find("cuda  no                  " + reason + "\n"), std::string::npos)
        << "expected: " << reason << "\ngot: " << info.out;
    EXPECT_NE(info.out.find("\ncpu   yes"), std::string::npos) << info.out;
    for (const std::string command : {"check --filter heads", "bench", "plan --seqs 1x100",
                                      "replay '" DIFFKV_SAMPLE_TRACE "'"}) {
      expect_refused(command + " --backend cuda", reason, variables);
    }
    const Outcome check = diffkv("check --filter heads", variables);
    EXPECT_EQ(check.exit_code, kExitRight) << check.err;
    EXPECT_EQ(check.out.rfind("backend  CPU", 0), 0U) << check.out;
  }
};

std::string built_with() {
  return "this library was built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10);
}

TEST_F(CudaDriver, TooOld) {
  expect_unavailable(driver(11040, 0), "the NVIDIA driver is for CUDA 11.4, " + built_with());
}

TEST_F(CudaDriver, WithoutAGpu) {
  constexpr int kNoDevice = 100;
  expect_unavailable(driver(CUDART_VERSION, kNoDevice), "there is no GPU");
}

TEST_F(CudaDriver, OfAnotherVersionThanItsKernelModule) {
  constexpr int kSystemDriverMismatch = 803;
  expect_unavailable(driver(CUDART_VERSION, kSystemDriverMismatch),
                     "no GPU can be used: system has unsupported display driver / cuda driver "
                     "combination (cudaErrorSystemDriverMismatch)");
}

TEST_F(CudaDriver, ThatIsNoLibrary) {
  write("libcuda.so.1", "not a library");
  expect_unavailable("LD_LIBRARY_PATH='" + folder_.string() + "'", "there is no NVIDIA driver");
}

TEST_F(CudaDriver, ThatHasNoFunctions) {
  fs::copy(DIFFKV_EMPTY_LIBRARY, folder_ / "libcuda.so.1");
  const std::string variables = "LD_LIBRARY_PATH='" + folder_.string() + "'";
  expect_unavailable(variables, "there is no NVIDIA driver");
}

}  // namespace
}  // namespace diffkv::cli
