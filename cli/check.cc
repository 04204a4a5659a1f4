// `diffkv check`: whether a backend computes right.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/output.h"
#include "diffkv/backend.h"
#include "diffkv/error.h"
#include "verify/cases.h"
#include "verify/run.h"

namespace diffkv::cli {
namespace {

constexpr const char* kDescription = "Compares a backend with a double-precision reference";

constexpr const char* kFooter =
    "Runs the library on made-up problems of every feature and compares the output rows with a\n"
    "double-precision reference. Memory that must not be read is poisoned, and memory that must\n"
    "not be written is guarded. The random numbers are new in each run; the seed is printed.\n"
    "\n"
    "Examples:\n"
    "  diffkv check\n"
    "  diffkv check --suite full --deep\n"
    "  diffkv check --filter sink --seed 7\n"
    "\n"
    "Exit codes: 0 every supported case is right, 1 a case is wrong, 2 bad use or input.";

struct Options {
  std::string backend;
  std::string suite = "quick";
  std::string filter;
  std::string seed;
  bool deep = false;
  std::string json_file;
};

// The cases of one feature.
struct Tally {
  std::string feature;
  std::int64_t cases = 0;
  std::int64_t passed = 0;
  std::int64_t unsupported = 0;
  std::int64_t rows = 0;
  double worst_share = 0.0;  // of an error in its tolerance
  double worst_error = 0.0;
  double worst_tolerance = 0.0;
  std::set<std::string> kernels;

  void add(const verify::CaseResult& result) {
    ++cases;
    if (!result.supported) {
      ++unsupported;
      return;
    }
    passed += result.ok ? 1 : 0;
    rows += result.rows;
    if (!result.kernel.empty()) kernels.insert(result.kernel);
    const double share = result.tolerance > 0 ? result.worst_error / result.tolerance : 0.0;
    if (share >= worst_share) {
      worst_share = share;
      worst_error = result.worst_error;
      worst_tolerance = result.tolerance;
    }
  }
};

std::vector<verify::Case> chosen_cases(const Options& options) {
  std::vector<verify::Case> list =
      verify::cases(options.suite == "full" ? verify::Suite::kFull : verify::Suite::kQuick);
  std::erase_if(list, [&](const verify::Case& c) {
    return c.name.find(options.filter) == std::string::npos &&
           c.feature.find(options.filter) == std::string::npos;
  });
  if (list.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--filter is \"{}\", which is part of no case's or feature's name in "
                            "the {} suite",
                            options.filter, options.suite));
  }
  return list;
}

// In the order in which features first appear.
std::vector<Tally> tallies_of(const std::vector<verify::CaseResult>& results) {
  std::vector<Tally> tallies;
  for (const verify::CaseResult& result : results) {
    auto it = std::find_if(tallies.begin(), tallies.end(),
                           [&](const Tally& t) { return t.feature == result.feature; });
    if (it == tallies.end()) {
      tallies.emplace_back();
      tallies.back().feature = result.feature;
      it = std::prev(tallies.end());
    }
    it->add(result);
  }
  return tallies;
}

Table tally_table(const std::vector<Tally>& tallies) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"feature"},
               {"cases", kRight},
               {"passed", kRight},
               {"unsupported", kRight},
               {"rows", kRight},
               {"worst error", kRight},
               {"tolerance", kRight},
               {"kernels"}});
  for (const Tally& tally : tallies) {
    const bool ran = tally.cases > tally.unsupported;
    table.add_row({tally.feature, fmt::format("{}", tally.cases), fmt::format("{}", tally.passed),
                   fmt::format("{}", tally.unsupported), fmt::format("{}", tally.rows),
                   ran ? fmt::format("{:.1e}", tally.worst_error) : "-",
                   ran ? fmt::format("{:.1e}", tally.worst_tolerance) : "-",
                   fmt::format("{}", fmt::join(tally.kernels, " "))});
  }
  return table;
}

std::string repeat_command(const Options& options, const Backend& backend, std::uint64_t seed,
                           const std::string& case_name) {
  return fmt::format("diffkv check --backend {} --suite {} --seed {}{} --filter '{}'",
                     backend.name(), options.suite, seed, options.deep ? " --deep" : "", case_name);
}

nlohmann::json to_json(const Backend& backend, const Options& options, std::uint64_t seed,
                       const std::vector<verify::CaseResult>& results) {
  nlohmann::json json = {{"backend", backend.name()},
                         {"description", backend.description()},
                         {"suite", options.suite},
                         {"deep", options.deep},
                         {"seed", seed},
                         {"cases", nlohmann::json::array()}};
  for (const verify::CaseResult& result : results) {
    json["cases"].push_back({{"name", result.name},
                             {"feature", result.feature},
                             {"supported", result.supported},
                             {"ok", result.ok},
                             {"rows", result.rows},
                             {"worst_error", result.worst_error},
                             {"tolerance", result.tolerance},
                             {"kernel", result.kernel},
                             {"message", result.message}});
  }
  return json;
}

verify::CaseResult threw(const verify::Case& c, const std::exception& error) {
  verify::CaseResult result{};
  result.name = c.name;
  result.feature = c.feature;
  result.supported = true;
  result.message = fmt::format("threw: {}", error.what());
  return result;
}

// What a case throws is its failure and does not end the run, except where the machine lacks what
// the case needs: that says nothing about the backend.
verify::CaseResult run_one(const Backend& backend, const verify::Case& c, std::uint64_t seed,
                           bool deep) {
  try {
    return verify::run_case(backend, c, seed, deep);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kUnavailable, fmt::format("case {}: out of memory", c.name));
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kUnavailable) {
      throw Error(ErrorCode::kUnavailable, fmt::format("case {}: {}", c.name, error.what()));
    }
    return threw(c, error);
  } catch (const std::exception& error) {
    return threw(c, error);
  }
}

int run(const Options& options) {
  const std::uint64_t seed = parse_seed(options.seed, std::random_device{}());
  OutputFile json_file(options.json_file);
  const std::vector<verify::Case> list = chosen_cases(options);
  const Backend& backend = find_backend(options.backend);
  if (const Support available = backend.available(); !available) {
    throw Error(ErrorCode::kUnavailable,
                fmt::format("backend {} is not available: {}", backend.name(), available.reason));
  }
  fmt::print("backend  {}\nsuite    {}, {} cases{}\nseed     {}\n\n", backend.description(),
             options.suite, list.size(), options.deep ? ", deep" : "", seed);
  std::fflush(stdout);

  std::vector<verify::CaseResult> results;
  results.reserve(list.size());
  for (const verify::Case& c : list) results.push_back(run_one(backend, c, seed, options.deep));

  fmt::print("{}", tally_table(tallies_of(results)).text());
  std::int64_t unsupported = 0;
  std::int64_t failed = 0;
  for (const verify::CaseResult& result : results) {
    if (!result.supported) {
      ++unsupported;
    } else if (!result.ok) {
      ++failed;
      fmt::print("\nFAILED {} ({})\n  {}\n  repeat with: {}\n", result.name, result.feature,
                 result.message, repeat_command(options, backend, seed, result.name));
    }
  }
  fmt::print("\n{} passed, {} failed, {} unsupported\n",
             static_cast<std::int64_t>(results.size()) - failed - unsupported, failed, unsupported);
  if (json_file.given()) json_file.commit(json_text(to_json(backend, options, seed, results)));
  return failed == 0 ? kExitRight : kExitWrong;
}

}  // namespace

void add_check(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("check", kDescription);
  command->footer(kFooter);
  auto options = std::make_shared<Options>();
  command->add_option("--backend", options->backend, "The backend to check")->type_name("NAME");
  command
      ->add_option("--suite", options->suite,
                   "quick: every feature, in seconds; full: every feature with its neighbours")
      ->check(CLI::IsMember({"quick", "full"}))
      ->capture_default_str();
  command->add_flag("--deep", options->deep,
                    "Also compare every row, run both policies, and run twice for equal bits");
  command->add_option("--seed", options->seed, "Seed of the random numbers (default: a new one)")
      ->type_name("NUMBER");
  command
      ->add_option("--filter", options->filter,
                   "Only cases whose name or feature contains this text")
      ->type_name("TEXT");
  add_output_file(*command, "--json", options->json_file,
                  "Also write every result as JSON to this file");
  command->callback([options, &exit_code] { exit_code = run(*options); });
}

}  // namespace diffkv::cli
