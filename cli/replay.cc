// `diffkv replay`: runs a request trace through the library as a serving engine would.
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/output.h"
#include "diffkv/error.h"
#include "replay/replay.h"
#include "replay/report.h"

namespace diffkv::cli {
namespace {

struct Flags {
  std::string trace;
  std::string model = "mimo-v2-flash";
  std::int64_t tp = 8;
  std::string layers = "1:1";
  std::string dtype = "bf16";
  std::string kv_cache_dtype = "auto";
  double cache_gib = 0.5;
  std::int64_t requests = 0;
  double seconds = 0.0;
  double speed_up = 0.0;
  std::string seed = "0";
  std::string json;
  std::string report;
  replay::ReplayOptions options;
};

constexpr const char* kNotes =
    "Each step schedules tokens (decodes first, prompts in chunks, preemption by recomputation), "
    "then runs every layer: metadata, cache update, attention. Queries, keys and values are "
    "random; only attention is run, not the rest of a model.\n"
    "\n"
    "Examples:\n"
    "  diffkv replay examples/traces/sample.csv --verify 200\n"
    "  diffkv replay trace.csv --requests 500 --tp 4 --report report.html\n"
    "  diffkv replay trace.csv --kv-cache-dtype fp8_e4m3 --speed-up 20 --seconds 60\n"
    "  diffkv replay trace.csv --backend cuda --graphs --layers 9:39 --cache-gib 60 --verify 200\n"
    "\n"
    "The defaults are one rank of 8 (MiMo-V2-Flash: 8 query heads and 1 KV head a layer) and one "
    "layer of each kind, so times are of 2 of the model's 48 layers; --layers 9:39 runs all.\n"
    "\"% of peak\" is the rate at which attention reads the keys and values that a step's rows "
    "see, "
    "each once a layer, as a share of the peak read bandwidth, which is measured at the start "
    "(on the CPU 256 MiB read by all threads, on a GPU 1 GiB by one launch). A KV cache that fits "
    "the caches may beat it.\n"
    "On a GPU times are by its own clock, and a step's metadata is copied to it before they start. "
    "With --graphs the sequences, tokens and rows that pad a step to its recorded shape are empty, "
    "and rows are verified after the step's last layer.\n"
    "Ctrl-C stops after the current step, and verifies no more rows; the summary and files are "
    "still written.\n"
    "Exit codes: 0 every verified row was right (also when stopped), 1 a row was wrong, 2 bad use "
    "or input.";

// Set by SIGINT, read between steps.
volatile std::sig_atomic_t interrupted = 0;

void on_interrupt(int /*signal*/) {
  interrupted = 1;
  std::signal(SIGINT, SIG_DFL);  // a second Ctrl-C ends the process at once
}

// Restores the way SIGINT was handled.
class InterruptGuard {
 public:
  InterruptGuard() : previous_(std::signal(SIGINT, on_interrupt)) { interrupted = 0; }
  ~InterruptGuard() { std::signal(SIGINT, previous_); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  void (*previous_)(int);
};

// One line on a terminal, rewritten a few times a second; nothing in a pipe.
class ProgressLine {
 public:
  ProgressLine() : terminal_(isatty(STDERR_FILENO) == 1) {}
  ~ProgressLine() {
    if (shown_) std::fputs("\r\x1b[K", stderr);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void update(const replay::Progress& progress) {
    constexpr auto kPeriod = std::chrono::milliseconds(200);
    const auto now = std::chrono::steady_clock::now();
    if (!terminal_ || (shown_ && now - last_ < kPeriod)) return;
    last_ = now;
    shown_ = true;
    winsize size{};
    const bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    fmt::print(stderr, "\r{}\x1b[K", replay::progress_line(progress, known ? size.ws_col - 1 : 79));
    std::fflush(stderr);
  }

 private:
  bool terminal_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point last_;
};

void print_table(const replay::Cells& cells, Table::Align align) {
  std::vector<Table::Column> columns;
  for (const std::string& name : cells.front()) {
    columns.push_back({name, columns.empty() ? Table::Align::kLeft : align});
  }
  Table table(columns);
  for (std::size_t i = 1; i < cells.size(); ++i) table.add_row(cells[i]);
  fmt::print("{}", table.text());
}

// The options of the library from the flags; throws Error.
replay::ReplayOptions make_options(const Flags& flags) {
  constexpr double kGib = 1 << 30;
  constexpr double kMaxGib = 4096;
  replay::ReplayOptions options = flags.options;
  options.model = replay::choose_layers(
      replay::divide_heads(replay::find_model(flags.model), flags.tp), flags.layers);
  options.dtype =
      parse_dtype_option("--dtype", flags.dtype, {DType::kF32, DType::kF16, DType::kBF16});
  options.cache_dtype =
      parse_dtype_option("--kv-cache-dtype", flags.kv_cache_dtype, cache_dtypes(), options.dtype);
  options.seed = parse_seed(flags.seed, 0);
  // CLI::Range lets a NaN pass.
  const auto check = [](bool ok, const char* flag, double value, const std::string& expected) {
    if (ok) return;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{} is {}, expected {}", flag, value, expected));
  };
  check(flags.cache_gib > 0 && flags.cache_gib <= kMaxGib, "--cache-gib", flags.cache_gib,
        fmt::format("more than 0 and at most {}", kMaxGib));
  check(flags.seconds >= 0 && std::isfinite(flags.seconds), "--seconds", flags.seconds,
        "a number of seconds, or 0 for no limit");
  check(flags.speed_up >= 0 && std::isfinite(flags.speed_up), "--speed-up", flags.speed_up,
        "a positive factor, or 0 for all requests at once");
  options.cache_bytes = flags.cache_gib * kGib;
  options.seconds = flags.seconds;
  options.speed_up = flags.speed_up;
  return options;
}

// "1 layer with 8 query / 1 KV heads".
std::string layers_text(const replay::LayerKind& kind, const std::string& name) {
  return fmt::format("{} {} layer{} with {} query / {} KV heads", kind.num_layers, name,
                     kind.num_layers == 1 ? "" : "s", kind.num_heads, kind.num_kv_heads);
}

std::string title(const Flags& flags, const replay::ReplayOptions& options) {
  const replay::Model& model = options.model;
  return fmt::format("{}, rank of {}: {}, {}; {} with {} cache, blocks of {}", model.name, flags.tp,
                     layers_text(model.full, "full-attention"),
                     layers_text(model.window, fmt::format("window-{}", model.window.window)),
                     to_string(options.dtype), to_string(options.cache_dtype), options.block_size);
}

int run_replay(const Flags& flags) {
  const replay::ReplayOptions options = make_options(flags);
  refuse_same_file(
      {{"the trace", flags.trace}, {"--json", flags.json}, {"--report", flags.report}});
  std::vector<replay::TraceRequest> requests = replay::read_trace_file(flags.trace);
  if (flags.requests > 0 && requests.size() > static_cast<std::size_t>(flags.requests)) {
    requests.resize(static_cast<std::size_t>(flags.requests));
  }
  OutputFile json(flags.json);
  OutputFile report(flags.report);

  replay::ReplayResult result;
  {
    const InterruptGuard guard;
    ProgressLine line;
    result = replay::replay(requests, options, [&](const replay::Progress& progress) {
      line.update(progress);
      return interrupted == 0;
    });
  }
  const replay::Summary summary = replay::summarize(result);
  const std::string heading = title(flags, options);
  fmt::print("{}\n{}\n\n", flags.trace, heading);
  replay::Cells overall = {{"replay", ""}};
  for (auto& row : replay::overall_table(result, summary)) overall.push_back(row);
  print_table(overall, Table::Align::kLeft);
  fmt::print("\n");
  print_table(replay::step_table(summary), Table::Align::kRight);
  if (json.given()) json.commit(replay::to_json(result, summary));
  if (report.given()) {
    report.commit(replay::html_report(result, summary, {flags.trace, heading}));
  }
  return result.verify.rows_wrong == 0 ? kExitRight : kExitWrong;
}

}  // namespace

void add_replay(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<Flags>();
  replay::ReplayOptions& options = flags->options;
  CLI::App* command = app.add_subcommand(
      "replay", "Replay a request trace: continuous batching over both kinds of layer");
  command->footer(kNotes);
  const auto option = [&](const char* name, auto& value, const char* help) {
    return command->add_option(name, value, help)->capture_default_str();
  };
  const auto number = [&](const char* name, std::int64_t& value, std::int64_t least,
                          std::int64_t most, const char* help) {
    option(name, value, help)->check(whole_number(least, most))->type_name("INT");
  };
  command
      ->add_option("trace", flags->trace,
                   "CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens")
      ->required();
  option("--model", flags->model, "mimo-v2-flash or mimo-v2.5-pro");
  number("--tp", flags->tp, 1, 1 << 16,
         "Tensor-parallel size: this rank has its share of the heads");
  option("--layers", flags->layers, "Layers to run: FULL:WINDOW, or a total in the model's ratio");
  option("--dtype", flags->dtype, "Of queries, keys, values and outputs: fp32, fp16 or bf16");
  option("--kv-cache-dtype", flags->kv_cache_dtype,
         "auto (as --dtype), fp32, fp16, bf16, fp8_e4m3 or fp8_e5m2");
  number("--block-size", options.block_size, 1, 1 << 16, "Tokens in a cache block");
  option("--cache-gib", flags->cache_gib, "Cache of all layers that run, in GiB");
  number("--max-num-batched-tokens", options.max_num_batched_tokens, 1, 1 << 20,
         "Token budget of a step");
  number("--max-num-seqs", options.max_num_seqs, 1, 1 << 16, "Requests that run at the same time");
  number("--requests", flags->requests, 0, std::numeric_limits<std::int32_t>::max(),
         "Only the first N requests; 0: all");
  option("--seconds", flags->seconds, "Stop after so many seconds of wall time; 0: never");
  option("--speed-up", flags->speed_up,
         "Requests arrive at the trace's times divided by this, on a simulated clock that runs "
         "while steps run and skips idle times; 0: all are there at the start");
  option("--seed", flags->seed, "Of the random inputs and of the rows to verify")
      ->type_name("NUMBER");
  option("--backend", options.backend, "As `diffkv info` lists them; default: the best");
  number("--verify", options.verify_rows, 0, replay::kMaxVerifyRows,
         "Compare so many random rows, both layer kinds, no token twice, with the fp64 reference, "
         "and every key and value they see with what was written");
  command->add_flag("--graphs", options.graphs,
                    "Record a step of each padded number of sequences and tokens as a CUDA graph "
                    "once and launch that for later steps");
  add_output_file(*command, "--json", flags->json, "Write the figures to this file");
  add_output_file(*command, "--report", flags->report,
                  "Write a self-contained HTML page with plots to this file");
  command->callback([flags, &exit_code] { exit_code = run_replay(*flags); });
}

}  // namespace diffkv::cli
