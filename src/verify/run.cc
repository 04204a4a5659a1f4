#include "verify/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "diffkv/layer.h"
#include "verify/codec.h"
#include "verify/compare.h"
#include "verify/indices.h"
#include "verify/rows.h"
#include "verify/run_flow.h"

namespace diffkv::verify {
namespace {

// A tenth of a second or so of reference rows.
constexpr std::int64_t kSampledWork = 30'000'000;

// "" or the first element of a profiling run's output that is not zero.
std::string nonzero(const TensorView& output) {
  for (std::int64_t t = 0; t < output.shape[0]; ++t) {
    for (std::int64_t h = 0; h < output.shape[1]; ++h) {
      for (std::int64_t d = 0; d < output.shape[2]; ++d) {
        const double x =
            load(output.data, output.dtype, t * output.strides[0] + h * output.strides[1] + d);
        if (x == 0) continue;
        return fmt::format("forward without metadata left {} at [{}, {}, {}], expected 0", x, t, h,
                           d);
      }
    }
  }
  return "";
}

std::string update_by_flow(const PlacedProblem& problem) {
  const GeneratedProblem& host = problem.host();
  CacheImage expected = host.cache_image();
  reference_update(host.new_key(), host.new_value(), expected.view, host.slot_mapping());
  if (host.source().flow == CaseFlow::kLayer) {
    const DiffKVAttention layer(DiffKVBackend(problem.backend()), host.key(), problem.params(),
                                host.source().output_dtype);
    layer.do_kv_cache_update(problem.new_key(), problem.new_value(), problem.args().cache,
                             problem.slot_mapping());
  } else {
    update_cache(problem.backend(), problem.new_key(), problem.new_value(), problem.args().cache,
                 problem.slot_mapping());
  }
  problem.fetch();
  std::string what = host.cache_difference(expected);
  return what.empty() ? what : "update_cache: " + what;
}

// Leaves what it wrote on the host.
std::string attend_by_flow(PlacedProblem& problem) {
  std::string what;
  switch (problem.host().source().flow) {
    case CaseFlow::kStages:
      what = attend_by_stages(problem);
      break;
    case CaseFlow::kMerge:
      what = attend_by_merge(problem);
      break;
    case CaseFlow::kLayer:
    case CaseFlow::kSharing:
      what = attend_by_layer(problem);
      break;
  }
  problem.fetch();
  return what;
}

std::vector<std::byte> bytes_of(const TensorView& view) {
  std::vector<std::byte> bytes;
  if (!view.given()) return bytes;
  const auto* data = static_cast<const std::byte*>(view.data);
  const std::int64_t size = size_of(view.dtype);
  const std::int64_t depth = view.rank > 2 ? view.shape[2] : 1;
  for (std::int64_t i = 0; i < view.shape[0]; ++i) {
    for (std::int64_t j = 0; j < view.shape[1]; ++j) {
      const std::byte* row = data + size * (i * view.strides[0] + j * view.strides[1]);
      bytes.insert(bytes.end(), row, row + depth * size);
    }
  }
  return bytes;
}

// Runs one problem under one policy and adds what came out to the result.
void run_problem(PlacedProblem& placed, std::uint64_t seed, bool deep, CaseResult& result) {
  const GeneratedProblem& problem = placed.host();
  const auto judge = [&](std::string what) {
    if (result.message.empty()) result.message = std::move(what);
  };
  if (deep) judge(check_index_tensors(problem.key(), problem.args(), problem.slot_mapping()));
  if (problem.has_update()) judge(update_by_flow(placed));
  CacheImage before = problem.cache_image();
  judge(attend_by_flow(placed));

  const std::int64_t work = deep ? std::numeric_limits<std::int64_t>::max() : kSampledWork;
  const RowsCheck rows =
      check_rows(problem.key(), problem.params(), problem.args(),
                 tolerance(problem.key(), problem.source().output_dtype), work, seed);
  result.rows += rows.rows;
  result.worst_error = std::max(result.worst_error, rows.worst_error);
  if (rows.wrong > 0) {
    judge(fmt::format("{} of {} rows are wrong; {}", rows.wrong, rows.rows, rows.what));
  }
  judge(problem.damage());
  if (const std::string what = problem.cache_difference(before); !what.empty()) {
    judge("attend changed the cache: " + what);
  }
  if (!deep) return;
  const std::vector<std::byte> output = bytes_of(problem.args().output);
  const std::vector<std::byte> lse = bytes_of(problem.args().lse);
  placed.poison_outputs();
  judge(attend_by_flow(placed));
  if (output != bytes_of(problem.args().output) || lse != bytes_of(problem.args().lse)) {
    judge("a second run gave other bits");
  }
}

}  // namespace

PlanMemory::PlanMemory(const Backend& backend, const PlanKey& key, const PlanMaxima& maxima,
                       const Device& device)
    : memory_(backend, "workspace", workspace_bytes(backend, key, maxima), device),
      view_(memory_.data(), DType::kU8, {memory_.bytes()}, device) {}

std::string attend_by_stages(const PlacedProblem& problem) {
  const Backend& backend = problem.backend();
  const GeneratedProblem& host = problem.host();
  const PlanMemory memory(backend, host.key(), host.maxima(), problem.device());
  const Plan plan =
      make_plan(backend, host.key(), host.maxima(), problem.args().batch, memory.view());
  attend(backend, problem.params(), problem.args(), plan);
  return memory.guard_damage();
}

std::string attend_by_layer(PlacedProblem& problem) {
  const GeneratedProblem& host = problem.host();
  const Case& c = host.source();
  const AttendArgs& args = problem.args();
  const DiffKVBackend face(problem.backend());
  DiffKVMetadataBuilder builder(face, host.key(), host.maxima(), problem.device());
  // The query-query bias may come with the call instead of with the layer.
  AttentionParams params = problem.params();
  params.qq_bias = {};
  const DiffKVAttention layer(face, host.key(), params, c.output_dtype);

  DiffKVAttention::ForwardArgs forward;
  forward.query = args.query;
  forward.output = args.output;
  forward.lse = args.lse;
  forward.qq_bias = problem.params().qq_bias;
  if (c.flow == CaseFlow::kLayer) {
    forward.key = problem.new_key();
    forward.value = problem.new_value();
  }
  Batch batch = args.batch;
  if (args.cache.dense) {
    batch.kv_start = {};  // keys start where the queries do
  } else {
    forward.cache = &args.cache;
  }
  layer.forward(forward);
  problem.fetch();
  if (std::string what = nonzero(host.args().output); !what.empty()) return what;
  problem.poison_outputs();

  // Where there are no graphs, the one is the other.
  const DiffKVMetadata metadata = c.flow == CaseFlow::kSharing
                                      ? builder.build_for_cudagraph_capture(batch)
                                      : builder.build(batch);
  forward.metadata = &metadata;
  layer.forward(forward);
  problem.backend().synchronize(problem.device(), {});  // before the builder's memory goes
  return "";
}

CaseResult run_case(const Backend& backend, const Case& c, std::uint64_t seed, bool deep) {
  return run_case(backend, device::device_of(backend), c, seed, deep);
}

CaseResult run_case(const Backend& backend, const Device& device, const Case& c, std::uint64_t seed,
                    bool deep) {
  CaseResult result;
  result.name = c.name;
  result.feature = c.feature;
  result.tolerance = tolerance(c.key, c.output_dtype).output;
  std::vector<SchedulePolicy> policies{c.key.policy};
  if (deep) {
    policies.push_back(c.key.policy == SchedulePolicy::kBalanced ? SchedulePolicy::kBatchInvariant
                                                                 : SchedulePolicy::kBalanced);
  }
  for (const SchedulePolicy policy : policies) {
    Case with_policy = c;
    with_policy.key.policy = policy;
    // Which of two tokens wins a slot is promised only for host memory.
    with_policy.duplicate_slots = device::computes_on_host(backend);
    try {
      GeneratedProblem problem(with_policy, seed);
      const Support support = backend.supports(problem.problem());
      if (!support) {
        result.message = support.reason;
        result.supported = false;
        return result;
      }
      result.supported = true;
      result.kernel = support.kernel;
      PlacedProblem placed(backend, problem, device);
      run_problem(placed, seed, deep, result);
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kUnavailable) throw;  // the machine lacks something
      result.supported = true;  // a refusal where the case expects none is a failure
      if (result.message.empty()) result.message = fmt::format("threw: {}", error.what());
    }
  }
  result.ok = result.message.empty();
  return result;
}

}  // namespace diffkv::verify
