#include "diffkv/tensor.h"

#include <fmt/format.h>

#include <array>
#include <string>
#include <string_view>

namespace diffkv {
namespace {

struct DTypeName {
  std::string_view name;
  DType dtype;
};

// The first name of a dtype is the one printed.
constexpr std::array<DTypeName, 16> kNames = {{
    {"fp32", DType::kF32},
    {"fp16", DType::kF16},
    {"bf16", DType::kBF16},
    {"fp8_e4m3", DType::kE4M3},
    {"fp8_e5m2", DType::kE5M2},
    {"uint8", DType::kU8},
    {"bool", DType::kBool},
    {"int32", DType::kI32},
    {"int64", DType::kI64},
    {"float32", DType::kF32},
    {"float16", DType::kF16},
    {"half", DType::kF16},
    {"bfloat16", DType::kBF16},
    {"fp8", DType::kE4M3},
    {"e4m3", DType::kE4M3},
    {"e5m2", DType::kE5M2},
}};

}  // namespace

std::string_view to_string(DType dtype) {
  for (const DTypeName& entry : kNames) {
    if (entry.dtype == dtype) return entry.name;
  }
  return "an unknown dtype";
}

DType parse_dtype(std::string_view name) {
  for (const DTypeName& entry : kNames) {
    if (entry.name == name) return entry.dtype;
  }
  std::string known;
  for (const DTypeName& entry : kNames) {
    if (!known.empty()) known += ", ";
    known += entry.name;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("dtype is \"{}\", expected one of {}", name, known));
}

std::string to_string(const Device& device) {
  if (device.type == DeviceType::kCpu) return "cpu";
  return fmt::format("cuda:{}", device.index);
}

}  // namespace diffkv
