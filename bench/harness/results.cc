#include "bench/harness/results.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "diffkv/error.h"

namespace diffkv::bench {
namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "diffkv-bench-1";

Json timing_json(const Timing& timing) {
  return {{"repetitions", timing.repetitions},
          {"median_s", timing.median_s},
          {"least_s", timing.least_s},
          {"p25_s", timing.p25_s},
          {"p75_s", timing.p75_s},
          {"preemptions_per_s", timing.preemptions_per_s},
          {"to_first", timing.to_first}};
}

Timing read_timing(const Json& json) {
  Timing timing;
  timing.repetitions = json.at("repetitions").get<std::int64_t>();
  timing.median_s = json.at("median_s").get<double>();
  timing.least_s = json.at("least_s").get<double>();
  timing.p25_s = json.at("p25_s").get<double>();
  timing.p75_s = json.at("p75_s").get<double>();
  timing.preemptions_per_s = json.value("preemptions_per_s", 0.0);
  timing.to_first = json.value("to_first", 1.0);
  return timing;
}

Json scenario_json(const RunResult& run, const ScenarioResult& result) {
  const Verification& verification = result.verification;
  Json json = {{"name", result.name},
               {"batch", result.batch},
               {"layer", result.layer},
               {"supported", result.supported},
               {"kernel", result.kernel},
               {"bytes", result.bytes},
               {"flops", result.flops},
               {"soft_cap", result.soft_cap},
               {"alibi", result.alibi},
               {"layout", result.layout},
               {"verification",
                {{"ok", verification.ok()},
                 {"rows", verification.rows},
                 {"wrong", verification.wrong},
                 {"worst_error", verification.worst_error},
                 {"tolerance", verification.tolerance},
                 {"what", verification.what}}}};
  if (result.attend.repetitions == 0) return json;
  json["attend"] = timing_json(result.attend);
  json["plan"] = timing_json(result.plan);
  json["update"] = timing_json(result.update);
  json["read_bytes_per_s"] = result.read_rate;
  if (result.floor_s > 0) json["floor_s"] = result.floor_s;
  json["read_floor_s"] = run.read_floor_s(result);
  json["gemm_floor_s"] = run.gemm_floor_s(result);
  return json;
}

ScenarioResult read_scenario(const Json& json) {
  ScenarioResult result;
  result.name = json.at("name").get<std::string>();
  result.batch = json.value("batch", "");
  result.layer = json.value("layer", "");
  result.supported = json.value("supported", true);
  result.kernel = json.value("kernel", "");
  result.bytes = json.at("bytes").get<double>();
  result.flops = json.at("flops").get<double>();
  result.soft_cap = json.value("soft_cap", 0.0);
  result.alibi = json.value("alibi", false);
  result.layout = json.value("layout", "NHD");
  if (const auto it = json.find("verification"); it != json.end()) {
    result.verification = {.rows = it->at("rows").get<std::int64_t>(),
                           .wrong = it->at("wrong").get<std::int64_t>(),
                           .worst_error = it->at("worst_error").get<double>(),
                           .tolerance = it->at("tolerance").get<double>(),
                           .what = it->at("what").get<std::string>()};
  }
  if (json.contains("attend")) result.attend = read_timing(json.at("attend"));
  if (json.contains("plan")) result.plan = read_timing(json.at("plan"));
  if (json.contains("update")) result.update = read_timing(json.at("update"));
  result.read_rate = json.value("read_bytes_per_s", 0.0);
  result.floor_s = json.value("floor_s", 0.0);
  return result;
}

RunResult read_run(const Json& json) {
  RunResult run;
  run.backend = json.value("backend", "");
  run.description = json.value("description", "");
  run.device = json.value("device", false);
  run.date = json.value("date", "");
  run.seconds = json.value("seconds", 0.0);
  run.in_turn = json.value("in_turn", false);
  if (const auto it = json.find("machine"); it != json.end()) {
    run.machine.cpu = it->value("cpu", "");
    run.machine.threads = it->value("threads", 0);
    run.machine.last_level_bytes = it->value("last_level_bytes", std::int64_t{0});
  }
  if (const auto it = json.find("calibration"); it != json.end()) {
    run.flush_bytes = it->value("flush_bytes", std::int64_t{0});
    run.read_rate = it->value("read_bytes_per_s", 0.0);
    run.gemm_rate_before = it->value("gemm_flops_per_s_before", 0.0);
    run.gemm_rate_after = it->value("gemm_flops_per_s_after", 0.0);
  }
  for (const Json& scenario : json.at("scenarios")) {
    run.scenarios.push_back(read_scenario(scenario));
  }
  return run;
}

}  // namespace

std::string to_json(const RunResult& result) {
  Json json = {{"format", kFormat},
               {"backend", result.backend},
               {"description", result.description},
               {"device", result.device},
               {"date", result.date},
               {"seconds", result.seconds},
               {"in_turn", result.in_turn},
               {"machine",
                {{"cpu", result.machine.cpu},
                 {"threads", result.machine.threads},
                 {"last_level_bytes", result.machine.last_level_bytes}}},
               {"calibration",
                {{"flush_bytes", result.flush_bytes},
                 {"read_bytes_per_s", result.read_rate},
                 {"gemm_flops_per_s_before", result.gemm_rate_before},
                 {"gemm_flops_per_s_after", result.gemm_rate_after}}},
               {"noise", result.noise()},
               {"scenarios", Json::array()}};
  for (const ScenarioResult& scenario : result.scenarios) {
    json["scenarios"].push_back(scenario_json(result, scenario));
  }
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + '\n';
}

RunResult parse_results(std::string_view text, std::string_view where) {
  try {
    const Json json = Json::parse(text);
    const std::string format = json.is_object() ? json.value("format", "") : "";
    if (format != kFormat) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{} is no result of bench: its format is \"{}\", expected \"{}\"",
                              where, format, kFormat));
    }
    return read_run(json);
  } catch (const Json::exception& error) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} is no result of bench: {}", where, error.what()));
  }
}

}  // namespace diffkv::bench
