#include "core/rules.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "diffkv/layer.h"

namespace diffkv::core {
namespace {

std::string join(DTypes dtypes) {
  std::string text;
  for (const DType& dtype : dtypes) {
    if (!text.empty()) text += &dtype + 1 == dtypes.end() ? " or " : ", ";
    text += to_string(dtype);
  }
  return text;
}

std::string shape_text(std::initializer_list<Dim> dims) {
  std::string text;
  for (const Dim& dim : dims) {
    text += text.empty() ? "[" : ", ";
    text += dim.name;
  }
  return text + "]";
}

bool fits(const Dim& dim, std::int64_t extent) {
  switch (dim.rule) {
    case Dim::Rule::kAny:
      return true;
    case Dim::Rule::kExactly:
      return extent == dim.extent;
    case Dim::Rule::kAtLeast:
      return extent >= dim.extent;
    case Dim::Rule::kAtMost:
      return extent <= dim.extent;
  }
  return false;
}

// Whether the count of elements and the bytes from the lowest to the highest fit in int64.
bool is_addressable(const ConstTensorView& view) {
  std::int64_t count = 1;
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t extent = std::max<std::int64_t>(view.shape[i], 1);
    if (__builtin_mul_overflow(count, extent, &count)) return false;
  }
  if (__builtin_mul_overflow(count, size_of(view.dtype), &count)) return false;
  if (is_empty(view)) return true;
  std::int64_t lowest = 0;
  std::int64_t highest = 0;
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t extent = view.shape[i];
    std::int64_t reach = 0;
    if (__builtin_mul_overflow(extent - 1, view.strides[i], &reach)) return false;
    std::int64_t& bound = reach < 0 ? lowest : highest;
    if (__builtin_add_overflow(bound, reach, &bound)) return false;
  }
  std::int64_t span = 0;
  return !__builtin_sub_overflow(highest, lowest, &span) &&
         !__builtin_add_overflow(span, std::int64_t{1}, &span) &&
         !__builtin_mul_overflow(span, size_of(view.dtype), &span);
}

// Of a power of two; these checks run in every layer of every step, and a division takes long.
std::int64_t past_multiple(std::int64_t x, std::int64_t power_of_two) {
  return x & (power_of_two - 1);
}

std::int64_t past_multiple(const void* data, std::int64_t bytes) {
  return past_multiple(reinterpret_cast<std::intptr_t>(data), bytes);
}

}  // namespace

void check_dtype(std::string_view name, DType dtype, DTypes allowed) {
  if (std::find(allowed.begin(), allowed.end(), dtype) != allowed.end()) return;
  refuse("{} is {}, expected {}", name, to_string(dtype), join(allowed));
}

void check_head_size(std::string_view name, std::int64_t size) {
  if (DiffKVBackend::supports_head_size(size)) return;
  refuse("{} is {}, expected a multiple of 8 from 8 to 576", name, size);
}

bool is_empty(const ConstTensorView& view) {
  return std::any_of(view.shape.begin(), view.shape.begin() + view.rank,
                     [](std::int64_t extent) { return extent == 0; });
}

void check_tensor(std::string_view name, const ConstTensorView& view, DTypes dtypes,
                  std::initializer_list<Dim> dims) {
  if (view.rank == 0) refuse("{} is not given, expected {}", name, shape_text(dims));
  if (view.rank != static_cast<int>(dims.size())) {
    refuse("{} has rank {}, expected {}: {}", name, view.rank, dims.size(), shape_text(dims));
  }
  check_dtype(name, view.dtype, dtypes);
  int i = 0;
  for (const Dim& dim : dims) {
    const std::int64_t extent = view.shape[i++];
    if (extent < 0) refuse("{} has {} {}, expected 0 or more", name, dim.name, extent);
    if (!fits(dim, extent)) {
      refuse("{} has {} {}, {} {}", name, dim.name, extent, dim.because, dim.extent);
    }
  }
  if (!is_addressable(view)) {
    refuse("{} has shape [{}] and strides [{}] whose bytes overflow int64", name,
           fmt::join(view.shape.begin(), view.shape.begin() + view.rank, ", "),
           fmt::join(view.strides.begin(), view.strides.begin() + view.rank, ", "));
  }
  if (is_empty(view)) return;
  if (view.data == nullptr) {
    refuse("{} has no data (a null pointer), expected the memory of its shape [{}]", name,
           fmt::join(view.shape.begin(), view.shape.begin() + view.rank, ", "));
  }
  const std::int64_t past = past_multiple(view.data, size_of(view.dtype));
  if (past != 0) {
    refuse("{} starts {} bytes past a multiple of {}, expected the alignment of {}", name, past,
           size_of(view.dtype), to_string(view.dtype));
  }
}

void check_last_contiguous(std::string_view name, const ConstTensorView& view) {
  const int last = view.rank - 1;
  if (view.shape[last] <= 1 || view.strides[last] == 1 || is_empty(view)) return;
  refuse("{} has stride {} in its last dimension, expected 1 (contiguous)", name,
         view.strides[last]);
}

void check_rows(std::string_view name, const ConstTensorView& view) {
  check_last_contiguous(name, view);
  if (is_empty(view)) return;
  const std::int64_t size = size_of(view.dtype);
  const std::int64_t alignment = row_alignment(view.dtype);
  const std::int64_t past = past_multiple(view.data, alignment);
  if (past != 0) {
    refuse("{} starts {} bytes past a multiple of {}, expected rows of {} aligned to {} bytes",
           name, past, alignment, to_string(view.dtype), alignment);
  }
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.shape[i] > 1 && past_multiple(view.strides[i] * size, alignment) != 0) {
      refuse("{} has stride {} in dimension {}, expected a multiple of {} elements ({} bytes)",
             name, view.strides[i], i, alignment / size, alignment);
    }
  }
}

void check_no_overlap(std::string_view name, const ConstTensorView& view) {
  if (is_empty(view)) return;
  struct Step {
    std::int64_t stride = 0;
    std::int64_t extent = 0;
    int dim = 0;
  };
  std::array<Step, kMaxRank> steps;  // by stride
  int count = 0;
  for (int i = view.rank - 1; i >= 0; --i) {  // most are in order from the last dimension on
    if (view.shape[i] <= 1) continue;
    const std::int64_t stride = view.strides[i] < 0 ? -view.strides[i] : view.strides[i];
    int at = count++;
    for (; at > 0 && steps[at - 1].stride > stride; --at) steps[at] = steps[at - 1];
    steps[at] = {stride, view.shape[i], i};
  }
  std::int64_t span = 1;  // elements that the faster dimensions reach over
  for (int i = 0; i < count; ++i) {
    if (steps[i].stride < span) {
      refuse("{} has stride {} in dimension {}, expected {} or more: its elements overlap", name,
             view.strides[steps[i].dim], steps[i].dim, span);
    }
    span += (steps[i].extent - 1) * steps[i].stride;
  }
}

namespace {

// The bytes that a tensor reaches over; end is one past the last.
struct Span {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

Span span_of(const ConstTensorView& view) {
  if (!view.given() || is_empty(view)) return {};
  std::int64_t low = 0;
  std::int64_t high = 0;
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t reach = view.shape[i] > 1 ? (view.shape[i] - 1) * view.strides[i] : 0;
    (reach < 0 ? low : high) += reach;
  }
  const auto base = reinterpret_cast<std::uintptr_t>(view.data);
  const auto bytes = static_cast<std::uintptr_t>(size_of(view.dtype));
  return {base + static_cast<std::uintptr_t>(low) * bytes,
          base + static_cast<std::uintptr_t>(high + 1) * bytes};
}

}  // namespace

void check_apart(std::string_view name, const ConstTensorView& written, std::string_view other_name,
                 const ConstTensorView& other) {
  const Span a = span_of(written);
  const Span b = span_of(other);
  if (a.begin < b.end && b.begin < a.end) {
    refuse("{} lies over {}, expected memory of its own", name, other_name);
  }
}

void check_device(std::string_view name, const Device& device, std::string_view other_name,
                  const Device& other) {
  if (device == other) return;
  refuse("{} is on {}, {} is on {}: expected one device", name, to_string(device), other_name,
         to_string(other));
}

ConstTensorView plane_tensor(const KvCacheView& cache, const KvPlane& plane,
                             std::int64_t head_size) {
  ConstTensorView tensor;
  tensor.data = plane.data;
  tensor.dtype = plane.dtype;
  tensor.device = cache.device;
  tensor.rank = 4;
  tensor.shape = {cache.num_blocks, cache.block_size, cache.num_kv_heads, head_size};
  tensor.strides = {plane.stride_block, plane.stride_token, plane.stride_head, 1};
  return tensor;
}

}  // namespace diffkv::core
