// Times ggml's attention on the scenarios of `diffkv bench` with that command's harness: the same
// flushes, repetitions and JSON. K and V lie as ggml likes them best: each head's rows in one run.
#include <fmt/format.h>
#include <ggml-cpu.h>
#include <ggml.h>
#include <omp.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <random>
#include <vector>

#include "bench/harness/flush.h"
#include "bench/harness/results.h"
#include "bench/harness/run.h"
#include "bench/harness/scenario.h"
#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

struct FreeContext {
  void operator()(ggml_context* context) const { ggml_free(context); }
};

// ggml has no ragged batches of different query lengths, pages or windows in one call.
std::string unsupported(const Scenario& s) {
  const Seq& first = s.seqs.front();
  if (std::any_of(s.seqs.begin(), s.seqs.end(), [&](const Seq& seq) { return !(seq == first); })) {
    return "sequences of different lengths";
  }
  if (s.window > 0 || s.sinks) return "windows and sinks";
  if (s.soft_cap > 0 || s.alibi) return "soft caps and ALiBi";
  if (s.layout != KvCacheLayout::kNHD) return "a choice of the cache's layout";
  if (s.kv_dtype != s.dtype) return "another type of keys and values";
  if (s.policy != SchedulePolicy::kBalanced) return "the policy batch_invariant";
  return {};
}

ggml_type type_of(DType dtype) {
  if (dtype == DType::kF16) return GGML_TYPE_F16;
  return dtype == DType::kBF16 ? GGML_TYPE_BF16 : GGML_TYPE_F32;
}

double load(const ggml_tensor* tensor, std::int64_t index) {
  switch (tensor->type) {
    case GGML_TYPE_F16:
      return ggml_fp16_to_fp32(static_cast<const ggml_fp16_t*>(tensor->data)[index]);
    case GGML_TYPE_BF16:
      return ggml_bf16_to_fp32(static_cast<const ggml_bf16_t*>(tensor->data)[index]);
    default:
      return static_cast<const float*>(tensor->data)[index];
  }
}

class Attention {
 public:
  explicit Attention(const Scenario& s)
      : s_(s), seq_(s.seqs.front()), seqs_(static_cast<std::int64_t>(s.seqs.size())) {
    const std::int64_t heads = s.num_kv_heads * seqs_;
    const double bytes =
        4.0 * static_cast<double>(heads * seq_.seq_len * (s.head_size_qk + s.head_size_v) +
                                  s.num_tokens() * s.num_heads * (s.head_size_qk + s.head_size_v) +
                                  seq_.query_len * seq_.seq_len) +
        (1 << 20);
    context_.reset(ggml_init({static_cast<std::size_t>(bytes), nullptr, false}));
    ggml_context* c = context_.get();
    const ggml_type type = type_of(s.dtype);
    q_ = ggml_new_tensor_4d(c, GGML_TYPE_F32, s.head_size_qk, seq_.query_len, s.num_heads, seqs_);
    k_ = ggml_new_tensor_4d(c, type, s.head_size_qk, seq_.seq_len, s.num_kv_heads, seqs_);
    v_ = ggml_new_tensor_4d(c, type, s.head_size_v, seq_.seq_len, s.num_kv_heads, seqs_);
    std::mt19937_64 random(20);
    fill(q_, random, 3.0F, 0.0F);
    fill(k_, random, 1.0F, 0.0F);
    fill(v_, random, 1.0F, 0.5F);
    out_ = ggml_flash_attn_ext(c, q_, k_, v_, seq_.query_len > 1 ? make_mask() : nullptr, scale(),
                               0.0F, 0.0F);
    graph_ = ggml_new_graph(c);
    ggml_build_forward_expand(graph_, out_);
    plan_ = ggml_graph_plan(graph_, omp_get_max_threads(), nullptr);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  void run() {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) {
      throw Error(ErrorCode::kUnavailable, "ggml could not compute the graph");
    }
  }

  // The first, a middle and the last row against fp64.
  Verification verify() {
    Verification result;
    // That it computes the same thing; how well is in worst_error. Over fp16 keys and values ggml
    // sums a decode's values in fp16, which costs several percent over tens of thousands of keys.
    result.tolerance = 0.1;
    run();
    const std::int64_t rows = s_.num_tokens() * s_.num_heads;
    for (const std::int64_t row : {std::int64_t{0}, rows / 2, rows - 1}) {
      const double error = row_error(row);
      result.worst_error = std::max(result.worst_error, error);
      ++result.rows;
      if (error <= result.tolerance) continue;
      ++result.wrong;
      result.what = fmt::format("row {} has an error of {:.1e}", row, error);
    }
    return result;
  }

 private:
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(s_.head_size_qk)); }

  static void fill(ggml_tensor* tensor, std::mt19937_64& random, float gain, float mean) {
    // Numbers are drawn once and reused from random places: drawing each would take seconds.
    std::normal_distribution<float> normal;
    std::vector<float> drawn(1 << 16);
    for (float& x : drawn) x = normal(random);
    const std::int64_t n = ggml_nelements(tensor);
    std::size_t at = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (i % 64 == 0) at = random() % (drawn.size() - 64);
      const float x = mean + gain * drawn[at + static_cast<std::size_t>(i % 64)];
      if (tensor->type == GGML_TYPE_F16) {
        static_cast<ggml_fp16_t*>(tensor->data)[i] = ggml_fp32_to_fp16(x);
      } else if (tensor->type == GGML_TYPE_BF16) {
        static_cast<ggml_bf16_t*>(tensor->data)[i] = ggml_fp32_to_bf16(x);
      } else {
        static_cast<float*>(tensor->data)[i] = x;
      }
    }
  }

  ggml_tensor* make_mask() {
    ggml_tensor* mask =
        ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, seq_.seq_len, seq_.query_len);
    auto* data = static_cast<ggml_fp16_t*>(mask->data);
    const std::int64_t context = seq_.seq_len - seq_.query_len;
    for (std::int64_t i = 0; i < seq_.query_len; ++i) {
      for (std::int64_t j = 0; j < seq_.seq_len; ++j) {
        data[i * seq_.seq_len + j] = ggml_fp32_to_fp16(j <= context + i ? 0.0F : -INFINITY);
      }
    }
    return mask;
  }

  double row_error(std::int64_t row) const {
    const std::int64_t head = row % s_.num_heads;
    const std::int64_t query = row / s_.num_heads % seq_.query_len;
    const std::int64_t seq = row / s_.num_heads / seq_.query_len;
    const std::int64_t kv_head = seq * s_.num_kv_heads + head * s_.num_kv_heads / s_.num_heads;
    const std::int64_t q_at = ((seq * s_.num_heads + head) * seq_.query_len + query);
    const std::int64_t visible = seq_.seq_len - seq_.query_len + query + 1;
    std::vector<double> scores;
    for (std::int64_t j = 0; j < visible; ++j) {
      double dot = 0;
      for (std::int64_t d = 0; d < s_.head_size_qk; ++d) {
        dot += load(q_, q_at * s_.head_size_qk + d) *
               load(k_, (kv_head * seq_.seq_len + j) * s_.head_size_qk + d);
      }
      scores.push_back(dot * scale());
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    std::vector<double> expected(static_cast<std::size_t>(s_.head_size_v));
    for (std::int64_t j = 0; j < visible; ++j) {
      const double p = std::exp(scores[static_cast<std::size_t>(j)] - most);
      sum += p;
      for (std::int64_t d = 0; d < s_.head_size_v; ++d) {
        expected[static_cast<std::size_t>(d)] +=
            p * load(v_, (kv_head * seq_.seq_len + j) * s_.head_size_v + d);
      }
    }
    double error = 0;
    double norm = 0;
    for (std::int64_t d = 0; d < s_.head_size_v; ++d) {
      const double want = expected[static_cast<std::size_t>(d)] / sum;
      const double got = load(out_, row * s_.head_size_v + d);
      error += (got - want) * (got - want);
      norm += want * want;
    }
    return std::sqrt(error / norm);
  }

  const Scenario& s_;
  Seq seq_;
  std::int64_t seqs_;
  std::unique_ptr<ggml_context, FreeContext> context_;
  ggml_tensor* q_ = nullptr;
  ggml_tensor* k_ = nullptr;
  ggml_tensor* v_ = nullptr;
  ggml_tensor* out_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_cplan plan_{};
  std::vector<std::uint8_t> work_;
};

RunResult time_all(const std::vector<Scenario>& scenarios, double seconds) {
  RunResult run;
  run.backend = "ggml";
  run.machine = this_machine();
  run.description = fmt::format("ggml {}, {} threads", ggml_version(), run.machine.threads);
  run.date = utc_now();
  run.seconds = seconds;
  Flush flush(run.machine);
  run.flush_bytes = flush.bytes();
  run.gemm_rate_before = measure_gemm_rate();
  for (const Scenario& scenario : scenarios) {
    ScenarioResult result;
    result.name = scenario.name;
    result.bytes = scenario.bytes();
    result.flops = scenario.flops();
    result.soft_cap = scenario.soft_cap;
    result.alibi = scenario.alibi;
    result.layout = to_string(scenario.layout);
    result.kernel = unsupported(scenario);
    result.supported = result.kernel.empty();
    if (result.supported) {
      Attention attention(scenario);
      result.verification = attention.verify();
      result.attend = time_cold(flush, {.seconds = seconds}, {[&] { attention.run(); }})[0];
      result.read_rate = flush.take_median_rate();
    }
    run.scenarios.push_back(result);
  }
  run.read_rate = flush.best_rate();
  run.gemm_rate_after = measure_gemm_rate();
  return run;
}

}  // namespace
}  // namespace diffkv::bench

int main(int argc, char** argv) {
  CLI::App app("Times ggml's attention on the scenarios of `diffkv bench`; writes its JSON");
  std::string pattern = "peer";
  std::string path;
  double seconds = 1.0;
  app.add_option("--scenario", pattern, "Scenarios whose name or tag matches")
      ->capture_default_str();
  app.add_option("--seconds", seconds, "For the repetitions of one scenario")
      ->capture_default_str();
  app.add_option("--json", path, "The file to write")->required();
  CLI11_PARSE(app, argc, argv);
  try {
    ggml_cpu_init();
    const auto all =
        diffkv::bench::parse_scenarios(diffkv::bench::embedded_scenarios(), "bench/scenarios.json");
    const diffkv::bench::RunResult run =
        diffkv::bench::time_all(diffkv::bench::select_scenarios(all, pattern, "cpu"), seconds);
    std::ofstream file(path);
    file << diffkv::bench::to_json(run);
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
    return run.all_right() ? 0 : 1;
  } catch (const std::exception& error) {
    fmt::print(stderr, "ggml_peer: error: {}\n", error.what());
    return 2;
  }
}
