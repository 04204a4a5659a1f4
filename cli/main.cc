// The `diffkv` command.
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "diffkv/error.h"
#include "diffkv/version.h"

namespace {

constexpr const char* kDescription =
    "DiffKV paged attention: keys and values of different head sizes over one packed, paged KV "
    "cache.\n\n"
    "Start with `diffkv info` (what this machine and build can do) and `diffkv check` (whether it "
    "computes right).";

constexpr const char* kFooter =
    "Examples:\n"
    "  diffkv info\n"
    "  diffkv check --suite full\n"
    "  diffkv plan --model mimo-v2-flash --tp 8 --seqs '1x8192*64,2048x8192'\n"
    "  diffkv replay examples/traces/sample.csv --verify 200\n"
    "  diffkv bench --scenario 'decode_*'\n"
    "\n"
    "Exit codes: 0 right, 1 a result was wrong, 2 bad use or input.\n"
    "`diffkv COMMAND --help` explains a command.";

int fail(const std::string& message) {
  fmt::print(stderr, "diffkv: error: {}\n", message);
  return diffkv::cli::kExitBadUse;
}

int fail_use(const std::string& message) {
  return fail(message + "\nRun `diffkv --help` or `diffkv COMMAND --help` for how to use it.");
}

int run(int argc, char** argv) {
  CLI::App app(kDescription, "diffkv");
  app.footer(kFooter);
  app.set_version_flag("--version", fmt::format("diffkv {}.{}.{}", DIFFKV_VERSION_MAJOR,
                                                DIFFKV_VERSION_MINOR, DIFFKV_VERSION_PATCH));
  app.require_subcommand(1);
  int exit_code = diffkv::cli::kExitRight;
  diffkv::cli::add_info(app, exit_code);
  diffkv::cli::add_check(app, exit_code);
  diffkv::cli::add_plan(app, exit_code);
  diffkv::cli::add_replay(app, exit_code);
  diffkv::cli::add_bench(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help, --version
    app.exit(request);
    return diffkv::cli::kExitRight;
  } catch (const CLI::RequiredError& error) {
    const std::vector<std::string> unknown = app.remaining();
    return unknown.empty()
               ? fail_use(error.what())
               : fail_use(fmt::format("there is no command or option \"{}\"", unknown.front()));
  } catch (const CLI::ParseError& error) {
    return fail_use(error.what());
  }
  return exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const int exit_code = run(argc, argv);
    // A full disk or a closed pipe behind stdout must not look like success.
    if (std::fflush(stdout) != 0) return fail("cannot write to the standard output");
    return exit_code;
  } catch (const std::bad_alloc&) {
    return fail("out of memory: the problem is too large for this machine");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
