// `check`'s flows on a device whose memory the host cannot touch, which proves that neither the
// library nor the runner reads a device's tensors on the host.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/mirror.h"
#include "diffkv/error.h"
#include "tests/device/separate_memory.h"
#include "verify/cases.h"
#include "verify/run.h"

namespace diffkv::testing {
namespace {

TEST(Check, EveryCaseIsRightInSeparateMemory) {
  const SeparateMemoryBackend backend;
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    SCOPED_TRACE(c.name);
    const verify::CaseResult result = verify::run_case(backend, c, 11, false);
    EXPECT_TRUE(result.supported) << result.message;
    EXPECT_TRUE(result.ok) << result.message;
    EXPECT_GT(result.rows, 0);
  }
  EXPECT_EQ(backend.allocations(), 0) << "memory was left behind";
}

// A case of each flow, with all that `--deep` adds.
TEST(Check, DeepRunsAreRightInSeparateMemory) {
  const SeparateMemoryBackend backend;
  std::vector<bool> seen(4, false);
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    const auto flow = static_cast<std::size_t>(c.flow);
    if (seen[flow]) continue;
    seen[flow] = true;
    SCOPED_TRACE(c.name);
    const verify::CaseResult result = verify::run_case(backend, c, 12, true);
    EXPECT_TRUE(result.ok) << result.message;
  }
  EXPECT_EQ(seen, std::vector<bool>(4, true));
}

// On another than the first device everything is there: tensors, workspaces, copies.
TEST(Check, EveryCaseIsRightOnASecondDevice) {
  constexpr Device kSecond{DeviceType::kCuda, 1};
  const SeparateMemoryBackend backend(kSecond.index);
  std::set<std::string> features;
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    if (!features.insert(c.feature).second) continue;
    SCOPED_TRACE(c.name);
    const verify::CaseResult result = verify::run_case(backend, kSecond, c, 15, false);
    EXPECT_TRUE(result.supported) << result.message;
    EXPECT_TRUE(result.ok) << result.message;
  }
  EXPECT_EQ(backend.allocations(), 0) << "memory was left behind";
}

// Faults that happen in the device's memory alone.
class Faulty final : public SeparateMemoryBackend {
 public:
  enum class Fault { kBeforeOutput, kPastTheWorkspace, kQuery, kCache, kOutput };

  explicit Faulty(Fault fault) : fault_(fault) {}

  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override {
    attend_whole(params, args, plan, stream);
    spoil(args, plan);
    return false;
  }

 private:
  void spoil(const AttendArgs& args, const Plan& plan) const {
    switch (fault_) {
      case Fault::kBeforeOutput:
        return flip(static_cast<std::byte*>(args.output.data) - 1);
      case Fault::kPastTheWorkspace:
        return flip(reinterpret_cast<std::byte*>(plan.tables().query_start_loc) - 1);
      case Fault::kQuery:
        return flip(static_cast<std::byte*>(const_cast<void*>(args.query.data)));
      case Fault::kCache:
        return flip(static_cast<std::byte*>(args.cache.key.data));
      case Fault::kOutput:
        return flip(static_cast<std::byte*>(args.output.data) + 1, std::byte{0x40});
    }
  }

  void flip(std::byte* at, std::byte bits = std::byte{1}) const {
    std::byte value{};
    copy_to_host(&value, at, 1, {DeviceType::kCuda, 0}, {});
    value ^= bits;
    copy_to_device(at, &value, 1, {DeviceType::kCuda, 0}, {});
  }

  Fault fault_;
};

TEST(Check, FaultsInSeparateMemoryAreFound) {
  verify::Case c;
  for (const verify::Case& each : verify::cases(verify::Suite::kQuick)) {
    if (each.flow == verify::CaseFlow::kStages && each.cache == verify::CaseCache::kPackedNHD) {
      c = each;
      break;
    }
  }
  using Fault = Faulty::Fault;
  for (const auto& [fault, message] :
       {std::pair(Fault::kBeforeOutput, "output: byte 1 before its start"),
        std::pair(Fault::kPastTheWorkspace, "workspace: byte 1 before its start"),
        std::pair(Fault::kQuery, "query: byte 0"), std::pair(Fault::kCache, "cache: byte 0"),
        std::pair(Fault::kOutput, "rows are wrong")}) {
    const verify::CaseResult result = verify::run_case(Faulty(fault), c, 13, false);
    EXPECT_FALSE(result.ok) << message;
    EXPECT_NE(result.message.find(message), std::string::npos) << result.message;
  }
}

// Looks for slots that occur twice, whose winner is promised on the host only.
class Unique final : public SeparateMemoryBackend {
 public:
  mutable int updates = 0;
  mutable int repeated = 0;

  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override {
    SeparateMemoryBackend::update_cache(key, value, cache, slot_mapping, stream);
    std::vector<std::int64_t> slots(static_cast<std::size_t>(slot_mapping.shape[0]));
    copy_to_host(slots.data(), slot_mapping.data, slot_mapping.shape[0] * 8, slot_mapping.device,
                 {});
    std::set<std::int64_t> seen;
    for (const std::int64_t slot : slots) repeated += slot >= 0 && !seen.insert(slot).second;
    ++updates;
  }
};

TEST(Check, DevicesGetEverySlotOnce) {
  const Unique backend;
  for (const verify::Case& c : verify::cases(verify::Suite::kQuick)) {
    if (!c.special_values) continue;
    const verify::CaseResult result = verify::run_case(backend, c, 14, false);
    EXPECT_TRUE(result.ok) << c.name << ": " << result.message;
  }
  EXPECT_GT(backend.updates, 0);
  EXPECT_EQ(backend.repeated, 0);
}

TEST(SeparateMemory, StagesRefuseHostTensors) {
  const SeparateMemoryBackend backend;
  std::vector<float> host(64);
  TensorView output(host.data(), DType::kF32, {2, 4, 8}, {DeviceType::kCuda, 0});
  EXPECT_THROW(fill_zero(backend, output), Error);
  device::Mirror mirror(backend);
  mirror.add(host.data(), 64 * 4);
  host[3] = 7;
  mirror.upload();
  fill_zero(backend, mirror.on_device(output));
  EXPECT_EQ(host[3], 7);
  mirror.download();
  EXPECT_EQ(host[3], 0);
}

TEST(SeparateMemoryDeathTest, TheHostCannotReadIt) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const SeparateMemoryBackend backend;
  const device::Memory memory(backend, 16);
  EXPECT_DEATH({ [[maybe_unused]] volatile const std::byte x = *memory.data(); }, "");
}

TEST(Mirror, KeepsAlignmentAndRefusesStrangers) {
  const SeparateMemoryBackend backend;
  alignas(64) std::array<std::byte, 256> host{};
  device::Mirror mirror(backend);
  mirror.add(host.data() + 24, 100);
  const TensorView view(host.data() + 40, DType::kU8, {84});
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mirror.on_device(view).data) % 64, 40U);
  EXPECT_EQ(mirror.on_device(view).device.type, DeviceType::kCuda);
  EXPECT_FALSE(mirror.on_device(TensorView()).given());
  const TensorView stranger(host.data(), DType::kU8, {8});
  EXPECT_THROW(mirror.on_device(stranger), std::logic_error);
}

TEST(Mirror, OfTheHostsMemoryIsTheMemory) {
  const Backend& cpu = find_backend("cpu");
  device::Mirror mirror(cpu);
  std::array<std::byte, 8> host{};
  const TensorView view(host.data(), DType::kU8, {8});
  EXPECT_EQ(mirror.on_device(view).data, host.data());
  EXPECT_EQ(mirror.on_device(view).device, Device{});
}

}  // namespace
}  // namespace diffkv::testing
