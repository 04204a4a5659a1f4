// Typed, strided, non-owning views of memory. Strides and shapes are in elements.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "diffkv/error.h"

namespace diffkv {

enum class DType : std::uint8_t {
  kF32,
  kF16,   // IEEE binary16
  kBF16,  // upper half of binary32
  kE4M3,  // fp8 e4m3fn: no infinities, largest finite 448, NaN 0x7f and 0xff
  kE5M2,  // fp8 e5m2: IEEE-like, largest finite 57344
  kU8,    // raw bytes; accepted wherever an fp8 cache is expected
  kBool,  // one byte, zero is false
  kI32,
  kI64,
};

// Bytes of one element.
constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI64:
      return 8;
    case DType::kE4M3:
    case DType::kE5M2:
    case DType::kU8:
    case DType::kBool:
      return 1;
  }
  return 1;
}

// True for e4m3 and e5m2.
constexpr bool is_fp8(DType dtype) { return dtype == DType::kE4M3 || dtype == DType::kE5M2; }

// "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "uint8", "bool", "int32", "int64".
std::string_view to_string(DType dtype);

// The inverse of to_string; also takes "float32", "float16", "bfloat16", "half", "fp8" (=
// fp8_e4m3), "e4m3" and "e5m2". Throws Error for any other name.
DType parse_dtype(std::string_view name);

enum class DeviceType : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

// "cpu", "cuda:1".
std::string to_string(const Device& device);

// An opaque stream of the tensors' device (a cudaStream_t); ignored on the CPU, where every call
// has finished when it returns.
struct Stream {
  void* handle = nullptr;
};

inline constexpr int kMaxRank = 4;

// A view of rank 1 to kMaxRank. Rank 0, the default, means "not given".
template <class Void>
struct BasicTensorView {
  Void* data = nullptr;
  DType dtype = DType::kF32;
  Device device;
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  BasicTensorView() = default;

  // A dense row-major view. Throws Error if the rank is 0 or above kMaxRank, or a stride is past
  // int64.
  BasicTensorView(Void* data_in, DType dtype_in, std::initializer_list<std::int64_t> shape_in,
                  Device device_in = {})
      : data(data_in), dtype(dtype_in), device(device_in), rank(static_cast<int>(shape_in.size())) {
    if (rank < 1 || rank > kMaxRank) {
      throw Error(ErrorCode::kInvalidArgument,
                  "a tensor view has rank " + std::to_string(rank) + ", expected 1 to 4");
    }
    int i = 0;
    for (std::int64_t extent : shape_in) shape[i++] = extent;
    std::int64_t stride = 1;
    for (i = rank - 1; i >= 0; --i) {
      strides[i] = stride;
      stride = product(stride, shape[i]);
    }
  }

  // A mutable view is a const view.
  template <class Other>
  requires(std::is_const_v<Void> && !std::is_const_v<Other>)
      BasicTensorView(const BasicTensorView<Other>& other)  // NOLINT(google-explicit-constructor)
      : data(other.data),
        dtype(other.dtype),
        device(other.device),
        rank(other.rank),
        shape(other.shape),
        strides(other.strides) {}

  // False for a default-constructed view: the optional tensor was not given.
  bool given() const { return rank > 0; }

  // Throws Error if the product of the extents is past int64.
  std::int64_t numel() const {
    std::int64_t n = rank > 0 ? 1 : 0;
    for (int i = 0; i < rank; ++i) n = product(n, shape[i]);
    return n;
  }

 private:
  static std::int64_t product(std::int64_t a, std::int64_t b) {
    std::int64_t result = 0;
    if (__builtin_mul_overflow(a, b, &result)) {
      throw Error(ErrorCode::kInvalidArgument, "a tensor view's extents multiply past int64: " +
                                                   std::to_string(a) + " x " + std::to_string(b));
    }
    return result;
  }
};

using TensorView = BasicTensorView<void>;
using ConstTensorView = BasicTensorView<const void>;

// The DType of a C++ scalar type; fp16, bf16 and fp8 have no standard type, name their DType.
template <class T>
constexpr DType dtype_of() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_same_v<U, float>) {
    return DType::kF32;
  } else if constexpr (std::is_same_v<U, std::int32_t>) {
    return DType::kI32;
  } else if constexpr (std::is_same_v<U, std::int64_t>) {
    return DType::kI64;
  } else if constexpr (std::is_same_v<U, bool>) {
    return DType::kBool;
  } else {
    static_assert(std::is_same_v<U, std::uint8_t>, "no DType for this C++ type");
    return DType::kU8;
  }
}

// A dense view of CPU memory whose DType follows from its C++ type.
template <class T>
auto view_of(T* data, std::initializer_list<std::int64_t> shape) {
  using Void = std::conditional_t<std::is_const_v<T>, const void, void>;
  return BasicTensorView<Void>(data, dtype_of<T>(), shape);
}

}  // namespace diffkv
