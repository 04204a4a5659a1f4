// `diffkv bench`: how fast attention is, and how near to what the machine can do.
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bench/harness/compare.h"
#include "bench/harness/results.h"
#include "bench/harness/run.h"
#include "bench/harness/scenario.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/output.h"
#include "diffkv/backend.h"
#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

constexpr const char* kDescription = "Times attention and compares it with the machine's limits";

constexpr const char* kFooter =
    "Each scenario is a batch over one layer. It is verified first (a sample of output rows, and\n"
    "this step's keys and values in the cache, against a double-precision reference), then timed:\n"
    "attention with its merging of partial results, and beside it the plan and the cache update.\n"
    "\n"
    "Before each repetition all threads read a buffer far beyond the caches. Keys, values and\n"
    "queries then come from memory as in a model of many layers, and the rate of those reads is\n"
    "the limit that a decode is held against: `of read` is the time to read the scenario's bytes\n"
    "(keys and values that some row sees once, queries, output) at the run's best rate, as a "
    "share\n"
    "of the median time. `of GEMM` is the same of the arithmetic at the rate of an fp32 matrix\n"
    "product that stays in the caches. A decode nears 100 % of the first, a long prefill of the\n"
    "second; nothing reaches both.\n"
    "\n"
    "On a GPU each stage is recorded as a CUDA graph and launched from cold caches, and timed by\n"
    "the GPU's clock. `floor` is the time of one launch that only reads the scenario's bytes and\n"
    "writes its output, the fastest of several ways, in the same run.\n"
    "\n"
    "`spread` is the width of the middle half of the times, as a share of the median. A run on a\n"
    "machine that was busy says so at its end: repeat it before believing it.\n"
    "\n"
    "--in-turn times the scenarios in rounds, a repetition of each a round, so that a machine "
    "that\n"
    "is faster in one minute than in the next is so for all of them, and keeps all in memory.\n"
    "`/ first` is then the median of each time over that of the first scenario in the same round.\n"
    "\n"
    "--against compares with an earlier run's --json. Faster or slower is said only where the\n"
    "middle halves of the times do not overlap and the medians differ by more than 2 %. Of "
    "several\n"
    "files of one program each scenario counts with its least median.\n"
    "\n"
    "Examples:\n"
    "  diffkv bench\n"
    "  diffkv bench --scenario 'decode_*' --json before.json\n"
    "  diffkv bench --scenario 'decode_*' --against before.json\n"
    "  diffkv bench --from after-1.json after-2.json --against before-1.json before-2.json\n"
    "  diffkv bench --backend cuda --scenario gpu_decode\n"
    "  diffkv bench --scenario 'decode_8x4096*' --in-turn\n"
    "  diffkv bench --list\n"
    "\n"
    "Exit codes: 0 every scenario was right, 1 a scenario was wrong, 2 bad use or input.";

struct Options {
  std::string scenario;
  std::string scenarios_file;
  std::string backend;
  double seconds = 1.0;
  bool in_turn = false;
  std::string json_file;
  std::vector<std::string> from;
  std::vector<std::string> against;
  bool list = false;
};

constexpr auto kRight = Table::Align::kRight;

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (!file) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("cannot read {}: {}", path, std::strerror(errno)));
  }
  return content;
}

bench::RunResult read_results(const std::vector<std::string>& paths) {
  std::vector<bench::RunResult> runs;
  runs.reserve(paths.size());
  for (const std::string& path : paths) {
    runs.push_back(bench::parse_results(read_file(path), path));
  }
  return bench::best_of(runs);
}

// Those for the backend of that name, "": for any.
std::vector<bench::Scenario> chosen_scenarios(const Options& options, std::string_view backend) {
  const auto all =
      options.scenarios_file.empty()
          ? bench::parse_scenarios(bench::embedded_scenarios(), "bench/scenarios.json")
          : bench::parse_scenarios(read_file(options.scenarios_file), options.scenarios_file);
  return bench::select_scenarios(all, options.scenario, backend);
}

std::string time_text(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  return seconds < 1 ? fmt::format("{:.3f} ms", seconds * 1e3) : fmt::format("{:.3f} s", seconds);
}

std::string time_text(const bench::Timing& timing) {
  return timing.repetitions == 0 ? "-" : time_text(timing.median_s);
}

std::string percent(double share) { return fmt::format("{:.0f} %", share * 100); }

std::string verified_text(const bench::ScenarioResult& result) {
  if (!result.supported) return "not supported";
  if (!result.verification.ok()) return "WRONG";
  return fmt::format("{} rows", result.verification.rows);
}

Table result_table(const bench::RunResult& run) {
  Table table({{"scenario"},
               {"verified", kRight},
               {"median", kRight},
               {"spread", kRight},
               {"GB/s", kRight},
               {"of read", kRight},
               {"GFLOP/s", kRight},
               {"of GEMM", kRight},
               {"plan", kRight},
               {"update", kRight},
               {"noisy"}});
  for (const bench::ScenarioResult& result : run.scenarios) {
    if (result.attend.repetitions == 0) {
      table.add_row({result.name, verified_text(result)});
      continue;
    }
    const double median = result.attend.median_s;
    table.add_row({result.name, verified_text(result), time_text(median),
                   percent(result.attend.spread()),
                   fmt::format("{:.1f}", result.bytes / median / 1e9),
                   percent(run.read_floor_s(result) / median),
                   fmt::format("{:.1f}", result.flops / median / 1e9),
                   percent(run.gemm_floor_s(result) / median), time_text(result.plan),
                   time_text(result.update), run.is_noisy(result) ? "*" : ""});
  }
  return table;
}

// Of a device: what it takes to move the bytes, measured for each scenario.
Table device_table(const bench::RunResult& run) {
  Table table({{"scenario"},
               {"verified", kRight},
               {"floor us", kRight},
               {"median us", kRight},
               {"/ floor", kRight},
               {"spread", kRight},
               {"GB/s", kRight},
               {"TFLOP/s", kRight},
               {"plan us", kRight},
               {"update us", kRight},
               {"noisy"}});
  const auto microseconds = [](double seconds) { return fmt::format("{:.1f}", seconds * 1e6); };
  for (const bench::ScenarioResult& result : run.scenarios) {
    if (result.attend.repetitions == 0) {
      table.add_row({result.name, verified_text(result)});
      continue;
    }
    const double median = result.attend.median_s;
    const double floor = run.read_floor_s(result);
    table.add_row({result.name, verified_text(result), microseconds(floor), microseconds(median),
                   fmt::format("{:.3f}", median / floor), percent(result.attend.spread()),
                   fmt::format("{:.0f}", result.bytes / median / 1e9),
                   fmt::format("{:.1f}", result.flops / median / 1e12),
                   microseconds(result.plan.median_s), microseconds(result.update.median_s),
                   run.is_noisy(result) ? "*" : ""});
  }
  return table;
}

// Of scenarios that were timed in turn.
void print_in_turn(const bench::RunResult& run) {
  Table table({{"in turn"}, {"rounds", kRight}, {"median", kRight}, {"/ first", kRight}});
  for (const bench::ScenarioResult& result : run.scenarios) {
    if (result.attend.repetitions == 0) continue;
    table.add_row({result.name, fmt::format("{}", result.attend.repetitions),
                   time_text(result.attend), fmt::format("{:.3f}", result.attend.to_first)});
  }
  fmt::print("\n{}", table.text());
}

void print_result(const bench::RunResult& run) {
  fmt::print("backend  {}\nmachine  {}, {} threads, {} of last-level cache\n", run.description,
             run.machine.cpu, run.machine.threads,
             human_bytes(static_cast<double>(run.machine.last_level_bytes)));
  if (run.device) {
    fmt::print("limits   read {:.0f} GB/s (1 GiB in one launch)\n\n{}", run.read_rate / 1e9,
               device_table(run).text());
  } else {
    fmt::print("limits   read {:.1f} GB/s ({} buffer), fp32 GEMM {:.1f} GFLOP/s\n\n{}",
               run.read_rate / 1e9, human_bytes(static_cast<double>(run.flush_bytes)),
               run.gemm_rate() / 1e9, result_table(run).text());
  }
  if (run.in_turn) print_in_turn(run);
  for (const bench::ScenarioResult& result : run.scenarios) {
    if (!result.supported) {
      fmt::print("\nnot supported: {}: {}\n", result.name, result.kernel);
    } else if (!result.verification.ok()) {
      fmt::print("\nWRONG {} ({}; {})\n  {}\n", result.name, result.batch, result.layer,
                 result.verification.what);
    }
  }
  const std::vector<std::string> noise = run.noise();
  if (!noise.empty()) fmt::print("\nwarning: the machine was noisy, repeat before believing:\n");
  for (const std::string& line : noise) fmt::print("  {}\n", line);
}

std::string verdict_text(bench::Verdict verdict) {
  switch (verdict) {
    case bench::Verdict::kFaster:
      return "faster";
    case bench::Verdict::kSlower:
      return "slower";
    case bench::Verdict::kWithinNoise:
      return "within noise";
  }
  return {};
}

void print_comparison(const bench::RunResult& now, const bench::RunResult& before) {
  const bench::ComparisonResult comparison = bench::compare(now, before);
  Table table({{"scenario"},
               {"now", kRight},
               {"spread", kRight},
               {"before", kRight},
               {"spread", kRight},
               {"speed-up", kRight},
               {"verdict"}});
  for (const bench::Comparison& row : comparison.scenarios) {
    table.add_row({row.name, time_text(row.now.median_s), percent(row.now.spread()),
                   time_text(row.before.median_s), percent(row.before.spread()),
                   fmt::format("{:.2f}", row.speed_up()), verdict_text(row.verdict)});
  }
  fmt::print("\nagainst  {}, {}\n\n{}", before.description, before.date, table.text());
  for (const std::string& note : comparison.notes) fmt::print("note: {}\n", note);
}

void print_list(const std::vector<bench::Scenario>& scenarios) {
  Table table(
      {{"scenario"}, {"batch"}, {"heads", kRight}, {"MB", kRight}, {"GFLOP", kRight}, {"tags"}});
  for (const bench::Scenario& s : scenarios) {
    std::string tags;
    for (const std::string& tag : s.tags) tags += (tags.empty() ? "" : " ") + tag;
    table.add_row(
        {s.name, bench::describe_batch(s), fmt::format("{}/{}", s.num_heads, s.num_kv_heads),
         fmt::format("{:.1f}", s.bytes() / 1e6), fmt::format("{:.2f}", s.flops() / 1e9), tags});
  }
  fmt::print("{}", table.text());
}

// Which scenario runs, on a terminal: a run takes a minute.
bench::OnScenario progress(const std::vector<bench::Scenario>& scenarios) {
  if (isatty(STDERR_FILENO) != 1) return [](std::size_t) {};
  return [&scenarios](std::size_t i) {
    fmt::print(stderr, "\r\x1b[K{} of {}: {}", i + 1, scenarios.size(), scenarios[i].name);
    if (i + 1 == scenarios.size()) fmt::print(stderr, "\r\x1b[K");
    std::fflush(stderr);
  };
}

int run(const Options& options) {
  if (!(options.seconds >= 0 && options.seconds <= 3600)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--seconds is {}, expected 0 to 3600", options.seconds));
  }
  if (options.list) {
    print_list(chosen_scenarios(options, options.backend));
    return kExitRight;
  }
  // Read before the run, so that a file that cannot be compared with is refused at once.
  bench::RunResult before;
  if (!options.against.empty()) before = read_results(options.against);
  std::vector<NamedFile> files{{"--json", options.json_file},
                               {"--scenarios", options.scenarios_file}};
  for (const std::string& path : options.against) files.push_back({"--against", path});
  refuse_same_file(files);
  OutputFile json_file(options.json_file);
  bench::RunResult now;
  if (!options.from.empty()) {
    now = read_results(options.from);
  } else {
    const Backend& backend = find_backend(options.backend);
    const std::vector<bench::Scenario> scenarios = chosen_scenarios(options, backend.name());
    now = bench::run(backend, scenarios, {.seconds = options.seconds, .in_turn = options.in_turn},
                     progress(scenarios));
  }
  print_result(now);
  if (json_file.given()) json_file.commit(bench::to_json(now));
  if (!options.against.empty()) print_comparison(now, before);
  return now.all_right() ? kExitRight : kExitWrong;
}

}  // namespace

void add_bench(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("bench", kDescription);
  command->footer(kFooter);
  auto options = std::make_shared<Options>();
  auto* scenario = command
                       ->add_option("--scenario", options->scenario,
                                    "Only scenarios whose name or tag matches, with *, ? and [...]")
                       ->type_name("PATTERN");
  auto* file = command
                   ->add_option("--scenarios", options->scenarios_file,
                                "Scenarios of this file in place of the built-in ones")
                   ->type_name("FILE");
  auto* backend =
      command->add_option("--backend", options->backend, "The backend to time")->type_name("NAME");
  command
      ->add_option(
          "--seconds", options->seconds,
          "Time for the repetitions of one scenario; each gets at least five, on a GPU twenty")
      ->capture_default_str();
  auto* in_turn = command->add_flag("--in-turn", options->in_turn,
                                    "Time the scenarios in rounds, for comparisons among them");
  auto* json = add_output_file(*command, "--json", options->json_file,
                               "Also write everything as JSON to this file");
  add_input_files(*command, "--against", options->against,
                  "Compare with these files of earlier --json");
  add_input_files(*command, "--from", options->from,
                  "Run nothing, show these files of earlier --json")
      ->excludes(scenario)
      ->excludes(file)
      ->excludes(backend)
      ->excludes(in_turn)
      ->excludes(json);
  command->add_flag("--list", options->list, "List the scenarios and run nothing");
  command->callback([options, &exit_code] { exit_code = run(*options); });
}

}  // namespace diffkv::cli
