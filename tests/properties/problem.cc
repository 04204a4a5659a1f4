#include "problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace diffkv::properties {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// Bits of an element type: sign, exponent, mantissa.
struct Format {
  int exponent_bits;
  int mantissa_bits;
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {5, 10};
    case DType::kBF16:
      return {8, 7};
    case DType::kE4M3:
      return {4, 3};
    case DType::kE5M2:
      return {5, 2};
    default:
      return {8, 23};
  }
}

void choose_mask(Rng& rng, Problem& problem) {
  Mask& mask = problem.key.mask;
  mask.causal = chance(rng, 0.7);
  switch (uniform(rng, 0, 3)) {
    case 0:
      mask.window = static_cast<std::int32_t>(uniform(rng, 1, 90));
      break;
    case 1:
      mask.chunk_size = static_cast<std::int32_t>(uniform(rng, 1, 90));
      mask.chunk_lookback = static_cast<std::int32_t>(uniform(rng, 0, 2));
      break;
    case 2:
      mask.prefix_window = static_cast<std::int32_t>(uniform(rng, 1, 90));
      break;
    default:
      break;
  }
  problem.key.causal_per_seq = chance(rng, 0.2);
  problem.key.mm_ranges = chance(rng, 0.3);
  mask.clamp_mm_ranges = problem.key.mm_ranges && mask.window > 0 && chance(rng, 0.5);
}

void choose_scores(Rng& rng, Problem& problem) {
  if (chance(rng, 0.25)) problem.soft_cap = 5.0F;
  if (chance(rng, 0.25)) {
    for (std::int64_t h = 0; h < problem.key.num_heads; ++h) {
      problem.alibi_slopes.push_back(0.01F * static_cast<float>(uniform(rng, 1, 20)));
    }
    problem.alibi_sqrt = chance(rng, 0.5);
  }
  if (chance(rng, 0.2)) {
    problem.qq_bias_size = uniform(rng, 1, 12);
    for (std::int64_t i = 0; i < problem.qq_bias_size * problem.qq_bias_size; ++i) {
      problem.qq_bias.push_back(chance(rng, 0.2) ? -std::numeric_limits<float>::infinity()
                                                 : 0.25F * static_cast<float>(uniform(rng, -8, 8)));
    }
  }
}

// Ranges in ascending order with gaps between; some are empty.
void choose_mm_ranges(Rng& rng, Seq& seq) {
  std::int32_t next = static_cast<std::int32_t>(uniform(rng, 0, 30));
  for (std::int64_t r = 0; r < kRangesPerSeq; ++r) {
    const auto last = static_cast<std::int32_t>(next + uniform(rng, -1, 60));
    seq.mm_ranges.emplace_back(next, last);
    next = std::max(next, last) + static_cast<std::int32_t>(uniform(rng, 1, 80));
  }
}

}  // namespace

std::int64_t uniform(Rng& rng, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(rng);
}

bool chance(Rng& rng, double probability) { return std::bernoulli_distribution(probability)(rng); }

std::vector<std::byte> random_elements(Rng& rng, DType dtype, std::size_t count, double negative) {
  const Format format = format_of(dtype);
  const std::uint64_t bias = (std::uint64_t{1} << (format.exponent_bits - 1)) - 1;
  const auto negative_below = static_cast<std::uint64_t>(negative * 1024.0);
  const std::int64_t bytes = size_of(dtype);
  std::vector<std::byte> elements;
  elements.reserve(count * at(bytes));
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t random = rng();
    std::uint64_t bits = (random & 1023) < negative_below ? 1 : 0;
    bits = (bits << format.exponent_bits) | (bias - 3 + ((random >> 10) & 3));
    bits = (bits << format.mantissa_bits) |
           ((random >> 12) & ((std::uint64_t{1} << format.mantissa_bits) - 1));
    for (std::int64_t b = 0; b < bytes; ++b) {
      elements.push_back(static_cast<std::byte>((bits >> (8 * b)) & 0xff));
    }
  }
  return elements;
}

std::vector<double> values_of(const std::vector<std::byte>& elements, DType dtype) {
  const Format format = format_of(dtype);
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const std::size_t bytes = at(size_of(dtype));
  std::vector<double> values;
  for (std::size_t i = 0; i < elements.size(); i += bytes) {
    std::uint64_t bits = 0;
    for (std::size_t b = 0; b < bytes; ++b) {
      bits |= static_cast<std::uint64_t>(elements[i + b]) << (8 * b);
    }
    const int exponent = static_cast<int>((bits >> format.mantissa_bits) &
                                          ((std::uint64_t{1} << format.exponent_bits) - 1));
    const auto mantissa =
        static_cast<double>(bits & ((std::uint64_t{1} << format.mantissa_bits) - 1));
    const bool negative = (bits >> (format.exponent_bits + format.mantissa_bits)) != 0;
    double value = 0.0;
    if (exponent == (1 << format.exponent_bits) - 1) {
      value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                            : std::numeric_limits<double>::quiet_NaN();
    } else if (exponent == 0) {
      value = std::ldexp(mantissa, 1 - bias - format.mantissa_bits);
    } else {
      value = std::ldexp(mantissa + std::ldexp(1.0, format.mantissa_bits),
                         exponent - bias - format.mantissa_bits);
    }
    values.push_back(negative ? -value : value);
  }
  return values;
}

Seq random_seq(Rng& rng, const PlanKey& key, std::int32_t query_len, std::int32_t seq_len) {
  Seq seq;
  seq.query_len = query_len;
  seq.seq_len = seq_len;
  seq.causal = chance(rng, 0.5);
  seq.prefix_len = static_cast<std::int32_t>(uniform(rng, 0, 60));
  if (key.mm_ranges) choose_mm_ranges(rng, seq);
  seq.query =
      random_elements(rng, key.query_dtype, at(query_len * key.num_heads * key.head_size_qk), 0.5);
  seq.key =
      random_elements(rng, key.key_dtype, at(seq_len * key.num_kv_heads * key.head_size_qk), 0.5);
  // Values with a mean, so that zeros are far from right.
  seq.value =
      random_elements(rng, key.value_dtype, at(seq_len * key.num_kv_heads * key.head_size_v), 0.25);
  return seq;
}

Problem random_problem(Rng& rng, const Choice& choice) {
  Problem problem;
  PlanKey& key = problem.key;
  key.num_kv_heads = uniform(rng, 1, 3);
  key.num_heads = key.num_kv_heads * pick<std::int64_t>(rng, {1, 2, 3, 4, 5, 8, 16, 20});
  key.head_size_qk = 8 * uniform(rng, 1, 9);
  key.head_size_v = 8 * uniform(rng, 1, 9);
  if (chance(rng, 0.1)) {
    key.head_size_qk = 192;
    key.head_size_v = 128;
  }
  key.query_dtype = pick<DType>(rng, {DType::kF32, DType::kF32, DType::kF16, DType::kBF16});
  if (choice.fp8_queries && chance(rng, 0.1)) key.query_dtype = DType::kE4M3;
  problem.output_dtype = key.query_dtype == DType::kE4M3 ? DType::kBF16 : key.query_dtype;
  key.key_dtype = pick<DType>(
      rng, {DType::kF32, DType::kF16, DType::kBF16, DType::kBF16, DType::kE4M3, DType::kE5M2});
  key.value_dtype = key.key_dtype;
  problem.q_scale = 0.5F * static_cast<float>(uniform(rng, 1, 3));
  // Twice the usual scale: some keys weigh much more than others.
  problem.scale = 2.0F / std::sqrt(static_cast<float>(key.head_size_qk));
  if (choice.any_mask) choose_mask(rng, problem);
  if (choice.scores) choose_scores(rng, problem);
  if (choice.sinks && chance(rng, 0.4)) {
    for (std::int64_t h = 0; h < key.num_heads; ++h) {
      problem.sinks.push_back(chance(rng, 0.1) ? -std::numeric_limits<float>::infinity()
                                               : 0.5F * static_cast<float>(uniform(rng, -4, 8)));
    }
    problem.sink_mode = chance(rng, 0.3) ? SinkMode::kOut : SinkMode::kIn;
  }
  const std::int64_t num_seqs = uniform(rng, 1, 5);
  for (std::int64_t s = 0; s < num_seqs; ++s) {
    auto query_len = pick<std::int32_t>(rng, {1, 1, 1, 2, 5, 17, 40, 70});
    auto context = static_cast<std::int32_t>(uniform(rng, 0, 200));
    if (choice.long_seqs && chance(rng, 0.6)) {
      query_len = std::min(query_len, 2);
      context = static_cast<std::int32_t>(uniform(rng, 2000, 6000));
    }
    if (choice.odd_seqs && chance(rng, 0.1)) query_len = 0;
    std::int32_t seq_len = query_len + context;
    if (choice.odd_seqs && chance(rng, 0.1)) {
      seq_len = static_cast<std::int32_t>(uniform(rng, 0, query_len));
    }
    problem.seqs.push_back(random_seq(rng, key, query_len, seq_len));
  }
  return problem;
}

bool sees(const PlanKey& key, const Seq& seq, std::int64_t i, std::int64_t j) {
  const std::int64_t p = seq.context_len() + i;
  const Mask& mask = key.mask;
  const bool causal = key.causal_per_seq ? seq.causal : mask.causal;
  if (j < 0 || j >= seq.seq_len) return false;
  const auto chunk_of = [&](std::int64_t position) {
    return static_cast<std::int64_t>(
        std::floor(static_cast<double>(position) / static_cast<double>(mask.chunk_size)));
  };
  bool seen = !causal || j <= p;
  if (mask.chunk_size > 0) {
    seen = seen && chunk_of(p) - chunk_of(j) <= mask.chunk_lookback;
  } else if (mask.prefix_window > 0) {
    seen = seen && (j < seq.prefix_len || p - j < mask.prefix_window);
  } else if (mask.window > 0) {
    seen = seen && p - j < mask.window && (causal || j - p < mask.window);
  }
  for (const auto& [start, last] : seq.mm_ranges) {
    if (!key.mm_ranges || start >= last) continue;
    const bool both = start <= p && p <= last && start <= j && j <= last;
    const bool clamped = mask.clamp_mm_ranges && mask.window > 0 && p - j >= mask.window;
    seen = seen || (both && !clamped);
  }
  return seen;
}

std::string describe(const Problem& problem) {
  std::string text = to_string(problem.key) + ", query_len x seq_len";
  for (const Seq& seq : problem.seqs) {
    text += " ";
    text += std::to_string(seq.query_len);
    text += "x";
    text += std::to_string(seq.seq_len);
  }
  if (problem.soft_cap > 0) text += ", soft cap";
  if (!problem.alibi_slopes.empty()) text += problem.alibi_sqrt ? ", ALiBi sqrt" : ", ALiBi";
  if (problem.qq_bias_size > 0) text += ", qq_bias " + std::to_string(problem.qq_bias_size);
  if (!problem.sinks.empty()) {
    text += problem.sink_mode == SinkMode::kIn ? ", sinks in" : ", sinks out";
  }
  return text;
}

std::vector<const Backend*> host_backends() {
  std::vector<const Backend*> list;
  for (const Backend* backend : backends()) {
    if (backend->device_type() == DeviceType::kCpu && backend->available().ok) {
      list.push_back(backend);
    }
  }
  return list;
}

std::uint64_t program_seed() {
  static const std::uint64_t seed =
      testing::GTEST_FLAG(random_seed) != 0
          ? static_cast<std::uint64_t>(testing::GTEST_FLAG(random_seed))
          : std::random_device{}() % 99999 + 1;  // what the flag takes
  return seed;
}

}  // namespace diffkv::properties
