// `diffkv replay`: runs a request trace through the library as a serving engine would.
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
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
    "\n"
    "The defaults are one rank of 8 (MiMo-V2-Flash: 8 query heads and 1 KV head a layer) and one "
    "layer of each kind, so times are of 2 of the model's 48 layers; --layers 9:39 runs all.\n"
    "The floor is the time to read the keys and values that a step's rows see, each once a layer, "
    "at the bandwidth measured at the start (256 MiB read by all threads). Caches that fit the "
    "processor's own may beat it.\n"
    "Ctrl-C stops after the current step; the summary and files are still written.\n"
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
  options.dtype = parse_dtype(flags.dtype);
  if (options.dtype != DType::kF32 && options.dtype != DType::kF16 &&
      options.dtype != DType::kBF16) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--dtype is {}, expected fp32, fp16 or bf16", flags.dtype));
  }
  options.cache_dtype =
      flags.kv_cache_dtype == "auto" ? options.dtype : parse_dtype(flags.kv_cache_dtype);
  if (!(flags.cache_gib > 0 && flags.cache_gib <= kMaxGib)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--cache-gib is {}, expected more than 0 and at most {}",
                            flags.cache_gib, kMaxGib));
  }
  options.cache_bytes = flags.cache_gib * kGib;
  options.seconds = flags.seconds;
  options.speed_up = flags.speed_up;
  return options;
}

std::string title(const Flags& flags, const replay::ReplayOptions& options) {
  const replay::Model& model = options.model;
  return fmt::format(
      "{}, rank of {}: full-attention layers: {} of {}/{} heads, window-{} layers: {} of {}/{}; {} "
      "with {} "
      "cache, blocks of {}",
      model.name, flags.tp, model.full.num_layers, model.full.num_heads, model.full.num_kv_heads,
      model.window.window, model.window.num_layers, model.window.num_heads,
      model.window.num_kv_heads, to_string(options.dtype), to_string(options.cache_dtype),
      options.block_size);
}

int run_replay(const Flags& flags) {
  const replay::ReplayOptions options = make_options(flags);
  if (flags.requests < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--requests is {}, expected 0 (all) or more", flags.requests));
  }
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
  command
      ->add_option("trace", flags->trace,
                   "CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens")
      ->required();
  option("--model", flags->model, "mimo-v2-flash or mimo-v2.5-pro");
  option("--tp", flags->tp, "Tensor-parallel size: this rank has its share of the heads");
  option("--layers", flags->layers, "Layers to run: FULL:WINDOW, or a total in the model's ratio");
  option("--dtype", flags->dtype, "Of queries, keys, values and outputs: fp32, fp16 or bf16");
  option("--kv-cache-dtype", flags->kv_cache_dtype,
         "auto (as --dtype), fp32, fp16, bf16, fp8_e4m3 or fp8_e5m2");
  option("--block-size", options.block_size, "Tokens in a cache block");
  option("--cache-gib", flags->cache_gib, "Cache of all layers that run, in GiB");
  option("--max-num-batched-tokens", options.max_num_batched_tokens, "Token budget of a step");
  option("--max-num-seqs", options.max_num_seqs, "Requests that run at the same time");
  option("--requests", flags->requests, "Only the first N requests; 0: all");
  option("--seconds", flags->seconds, "Stop after so many seconds of wall time; 0: never");
  option("--speed-up", flags->speed_up,
         "Requests arrive at the trace's times divided by this, on a simulated clock that runs "
         "while steps run and skips idle times; 0: all are there at the start");
  option("--seed", options.seed, "Of the random inputs and of the rows to verify");
  option("--backend", options.backend, "As `diffkv info` lists them; default: the best");
  option("--verify", options.verify_rows,
         "Compare so many random rows, both layer kinds, with the fp64 reference, and every key "
         "and value they see with what was written");
  option("--json", flags->json, "Write the figures to this file");
  option("--report", flags->report, "Write a self-contained HTML page with plots to this file");
  command->callback([flags, &exit_code] { exit_code = run_replay(*flags); });
}

}  // namespace diffkv::cli
