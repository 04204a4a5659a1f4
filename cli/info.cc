// `diffkv info`: what this build and machine can do.
#include <fmt/format.h>

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/features.h"
#include "cli/options.h"
#include "cli/output.h"
#include "cpu/targets.h"
#include "diffkv/diffkv.h"

namespace diffkv::cli {
namespace {

constexpr const char* kFooter =
    "Shows the version, how it was built, the backends, the SIMD targets, the environment\n"
    "variables that matter, and which features each backend has.\n"
    "\n"
    "Examples:\n"
    "  diffkv info\n"
    "  diffkv info --json info.json\n"
    "  diffkv info --features-markdown   the feature table as it stands in README.md\n"
    "\n"
    "Exit codes: 0 right, 2 bad use or input.";

struct Variable {
  const char* name;
  const char* meaning;
};

constexpr Variable kVariables[] = {
    {"DIFFKV_BACKEND", "the backend used where none is named"},
    {"DIFFKV_CPU_TARGET", "the SIMD target of the cpu backend, in place of the best"},
    {"OMP_NUM_THREADS", "threads of the cpu backend"},
};

struct Options {
  bool features_markdown = false;
  std::string json_file;
};

std::string version() {
  return fmt::format("{}.{}.{}", DIFFKV_VERSION_MAJOR, DIFFKV_VERSION_MINOR, DIFFKV_VERSION_PATCH);
}

std::string compiler() {
#ifdef __clang__
  return fmt::format("clang {}", __clang_version__);
#else
  return fmt::format("gcc {}", __VERSION__);
#endif
}

// Threads that a backend works with, as its planner is told.
int threads_of(const Backend& backend) {
  const Problem problem = features().front().problems.front();
  return backend.limits(problem.key).threads;
}

nlohmann::json to_json(const std::vector<const Backend*>& list) {
  nlohmann::json info;
  info["version"] = version();
  info["build"] = {
      {"type", DIFFKV_BUILD_TYPE}, {"flags", DIFFKV_BUILD_FLAGS}, {"compiler", compiler()}};
  info["simd_targets"] = cpu::supported_targets();
  info["simd_target"] = cpu::current_target();
  for (const Variable& variable : kVariables) {
    const char* value = std::getenv(variable.name);
    info["environment"][variable.name] =
        value == nullptr ? nlohmann::json() : nlohmann::json(value);
  }
  info["backends"] = nlohmann::json::array();
  for (const Backend* backend : list) {
    const Support available = backend->available();
    nlohmann::json entry = {{"name", backend->name()},
                            {"description", backend->description()},
                            {"available", available.ok},
                            {"reason", available.reason}};
    if (available.ok) entry["threads"] = threads_of(*backend);
    for (const Feature& feature : features()) {
      entry["features"].push_back({{"group", feature.group},
                                   {"name", feature.name},
                                   {"support", support_of(*backend, feature)}});
    }
    info["backends"].push_back(std::move(entry));
  }
  return info;
}

void print(const std::vector<const Backend*>& list) {
  fmt::print("diffkv {}\n\nbuild     {} {}\ncompiler  {}\n", version(), DIFFKV_BUILD_TYPE,
             DIFFKV_BUILD_FLAGS, compiler());

  fmt::print("\nBackends, best first\n\n");
  Table backends_table(
      {{"name"}, {"available"}, {"threads", Table::Align::kRight}, {"what it is"}});
  for (const Backend* backend : list) {
    const Support available = backend->available();
    backends_table.add_row({std::string(backend->name()), available.ok ? "yes" : "no",
                            available.ok ? fmt::format("{}", threads_of(*backend)) : "",
                            available.ok ? backend->description() : available.reason});
  }
  fmt::print("{}", backends_table.text());

  fmt::print("\nSIMD targets of the cpu backend on this machine, best first\n\n");
  for (const std::string& target : cpu::supported_targets()) {
    fmt::print("{}{}\n", target, target == cpu::current_target() ? "  (used)" : "");
  }

  fmt::print("\nEnvironment\n\n");
  Table environment({{"variable"}, {"value"}, {"meaning"}});
  for (const Variable& variable : kVariables) {
    const char* value = std::getenv(variable.name);
    environment.add_row({variable.name, value == nullptr ? "(not set)" : value, variable.meaning});
  }
  fmt::print("{}", environment.text());

  fmt::print("\nFeatures\n\n{}", feature_table(list).text());
}

void run(const Options& options) {
  OutputFile json_file(options.json_file);
  // A variable with which every other command would fail is refused before anything is printed.
  cpu::current_target();
  if (const char* wanted = std::getenv("DIFFKV_BACKEND"); wanted != nullptr) find_backend(wanted);
  const std::vector<const Backend*> list = backends();
  if (options.features_markdown) {
    fmt::print("{}", feature_table(list).markdown());
  } else {
    print(list);
  }
  if (json_file.given()) json_file.commit(json_text(to_json(list)));
}

}  // namespace

void add_info(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("info", "Shows what this build and machine can do");
  command->footer(kFooter);
  auto options = std::make_shared<Options>();
  command->add_flag("--features-markdown", options->features_markdown,
                    "Print only the feature table, as Markdown");
  add_output_file(*command, "--json", options->json_file,
                  "Also write everything as JSON to this file");
  command->callback([options, &exit_code] {
    run(*options);
    exit_code = kExitRight;
  });
}

}  // namespace diffkv::cli
