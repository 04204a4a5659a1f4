// The subcommands of `diffkv`. Each function registers one on the app; its callback does the work
// and sets exit_code (kExitRight or kExitWrong). A callback throws diffkv::Error on bad use or
// input, which main prints and turns into kExitBadUse. Both arguments outlive the parsing.
#pragma once

#include <CLI/CLI.hpp>

namespace diffkv::cli {

inline constexpr int kExitRight = 0;   // everything asked for was done and was right
inline constexpr int kExitWrong = 1;   // a result was wrong
inline constexpr int kExitBadUse = 2;  // bad use or input, or something is lacking

void add_info(CLI::App& app, int& exit_code);
void add_check(CLI::App& app, int& exit_code);
void add_plan(CLI::App& app, int& exit_code);
void add_replay(CLI::App& app, int& exit_code);
void add_bench(CLI::App& app, int& exit_code);

}  // namespace diffkv::cli
