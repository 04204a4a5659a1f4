// `diffkv plan`: the schedule of a batch.
#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/batch_spec.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/output.h"
#include "cli/plan_report.h"
#include "cli/planned_batch.h"
#include "diffkv/diffkv.h"
#include "replay/model.h"

namespace diffkv::cli {
namespace {

constexpr const char* kDescription = "Prints the schedule of a batch";

constexpr const char* kFooter =
    "Prints who reads which keys in one step: the tile classes, each worker's share of the work,\n"
    "how even the shares are, and the workspace. Nothing is computed.\n"
    "\n"
    "A tile is up to `rows` query rows, (token, head) pairs that share a KV head. A class's line\n"
    "of tiles is cut into one share for each worker; a tile that is cut leaves partial results in\n"
    "slots, which are merged afterwards.\n"
    "\n"
    "Examples:\n"
    "  diffkv plan --seqs 1x131072\n"
    "  diffkv plan --seqs '1x8192*64,2048x8192' --model mimo-v2-flash --tp 8 --layer window\n"
    "  diffkv plan --seqs 512x512 --num-heads 40 --num-kv-heads 40 --head-size-qk 96 "
    "--head-size-v 64 --items\n"
    "  diffkv plan --seqs '300x300,1x4096' --window 128 --mm-ranges 20-150,160-290\n"
    "\n"
    "Exit codes: 0 right, 2 bad use or input.";

struct Options {
  std::string seqs;
  std::string backend;
  std::string model;
  std::int64_t tp = 1;
  std::string layer = "full";
  PlanKey key;
  std::string query_dtype = "bf16";
  std::string kv_cache_dtype = "auto";
  bool full_attention = false;
  MaskSpec mask;
  std::string causal_per_seq;
  std::string mm_ranges;
  std::string policy = "balanced";
  bool items = false;
  std::string json_file;

  // Without a model: MiMo-V2-Flash's full layers.
  Options() {
    key.num_heads = 64;
    key.num_kv_heads = 4;
    key.head_size_qk = 192;
    key.head_size_v = 128;
  }
};

std::string model_names() {
  std::string names;
  for (const replay::Model& model : replay::models()) {
    names += (names.empty() ? "" : ", ") + model.name;
  }
  return names;
}

PlanKey key_of(const Options& options) {
  PlanKey key = options.key;
  if (!options.model.empty()) {
    const replay::Model model = replay::divide_heads(replay::find_model(options.model), options.tp);
    const replay::LayerKind& kind = options.layer == "window" ? model.window : model.full;
    key.num_heads = kind.num_heads;
    key.num_kv_heads = kind.num_kv_heads;
    key.head_size_qk = model.head_size_qk;
    key.head_size_v = model.head_size_v;
    key.mask.window = static_cast<std::int32_t>(kind.window);
  }
  key.mask.causal = !options.full_attention;
  key.causal_per_seq = !options.causal_per_seq.empty();
  key.mm_ranges = !options.mm_ranges.empty();
  key.query_dtype = parse_dtype_option("--dtype", options.query_dtype,
                                       {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3});
  key.key_dtype = parse_dtype_option("--kv-cache-dtype", options.kv_cache_dtype, cache_dtypes(),
                                     key.query_dtype);
  key.value_dtype = key.key_dtype;
  key.policy =
      options.policy == "invariant" ? SchedulePolicy::kBatchInvariant : SchedulePolicy::kBalanced;
  return key;
}

void run(const Options& options) {
  OutputFile json_file(options.json_file);
  const std::vector<SeqLengths> seqs = parse_batch(options.seqs);
  const PlanKey key = key_of(options);
  const Backend& backend = find_backend(options.backend);
  MaskSpec mask = options.mask;
  if (key.causal_per_seq) mask.causal = parse_causal(options.causal_per_seq);
  if (key.mm_ranges) mask.mm_ranges = parse_ranges(options.mm_ranges);
  const PlannedBatch planned(backend, key, seqs, mask);
  const PlanReport report(planned.plan(), planned.batch(), planned.workspace_bytes(),
                          options.items);
  fmt::print("{}", report.text());
  if (json_file.given()) json_file.commit(json_text(report.json()));
}

// Returns the option of the model, which brings its heads and its mask.
CLI::Option* add_layer_options(CLI::App& command, Options& options) {
  const std::string group = "The layer";
  auto* model = command
                    .add_option("--model", options.model,
                                "A model's heads, head sizes and windows: " + model_names())
                    ->type_name("NAME")
                    ->group(group);
  command.add_option("--tp", options.tp, "Tensor-parallel size that divides the model's heads")
      ->check(whole_number(1, 1 << 16))
      ->needs(model)
      ->group(group);
  command.add_option("--layer", options.layer, "The model's full or window layers")
      ->check(CLI::IsMember({"full", "window"}))
      ->needs(model)
      ->group(group);
  PlanKey& key = options.key;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const auto size = [&](const char* flag, std::int64_t& value, std::int64_t least,
                        std::int64_t most, const char* help) {
    command.add_option(flag, value, help)
        ->check(whole_number(least, most))
        ->type_name("INT")
        ->excludes(model)
        ->capture_default_str()
        ->group(group);
  };
  size("--num-heads", key.num_heads, 1, kMost, "Query heads, a multiple of --num-kv-heads");
  size("--num-kv-heads", key.num_kv_heads, 1, kMost, "KV heads");
  size("--head-size-qk", key.head_size_qk, 8, 576, "Size of a query and key head, a multiple of 8");
  size("--head-size-v", key.head_size_v, 8, 576, "Size of a value head, a multiple of 8");
  command
      .add_option("--dtype", options.query_dtype,
                  "Type of the queries: fp32, fp16, bf16 or fp8_e4m3")
      ->capture_default_str()
      ->group(group);
  command
      .add_option("--kv-cache-dtype", options.kv_cache_dtype,
                  "Type of the cache: auto (as --dtype), fp32, fp16, bf16, fp8_e4m3 or fp8_e5m2")
      ->capture_default_str()
      ->group(group);
  return model;
}

// What has no effect beside another option is refused beside it.
void add_mask_options(CLI::App& command, CLI::Option* model, Options& options) {
  Mask& mask = options.key.mask;
  const auto number = [&](const char* flag, std::int32_t& value, std::int32_t least,
                          const char* help) {
    return command.add_option(flag, value, help)
        ->check(whole_number(least, std::numeric_limits<std::int32_t>::max()))
        ->type_name("INT")
        ->group("The mask");
  };
  auto* full = command.add_flag("--full", options.full_attention, "Full attention, not causal")
                   ->excludes(model)
                   ->group("The mask");
  auto* window =
      number("--window", mask.window, 1, "Sliding window; with --full in both directions")
          ->excludes(model);
  auto* chunk =
      number("--chunk-size", mask.chunk_size, 1, "Chunk size")->excludes(model)->excludes(window);
  number("--chunk-lookback", mask.chunk_lookback, 0, "Chunks before its own that a row sees")
      ->needs(chunk);
  auto* prefix_window = number("--prefix-window", mask.prefix_window, 1, "Window beside a prefix")
                            ->excludes(model)
                            ->excludes(window)
                            ->excludes(chunk);
  number("--prefix-len", options.mask.prefix_len, 0, "The prefix of every sequence")
      ->needs(prefix_window);
  command
      .add_option("--causal-per-seq", options.causal_per_seq,
                  "Whether each sequence is causal, in turn and again from the first on: yes,no")
      ->type_name("LIST")
      ->excludes(full)
      ->group("The mask");
  auto* ranges =
      command
          .add_option("--mm-ranges", options.mm_ranges,
                      "Multimodal ranges of every sequence, FIRST-LAST with commas between")
          ->type_name("LIST")
          ->group("The mask");
  command
      .add_flag("--clamp-mm-ranges", mask.clamp_mm_ranges,
                "Inside a range a row sees back only as far as its window")
      ->needs(ranges)
      ->needs(window)
      ->group("The mask");
}

}  // namespace

void add_plan(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("plan", kDescription);
  command->footer(kFooter);
  auto options = std::make_shared<Options>();
  command
      ->add_option("--seqs", options->seqs,
                   "The batch: QUERY_LENxSEQ_LEN or QUERY_LENxSEQ_LEN*COUNT, with commas between")
      ->required()
      ->type_name("LIST");
  command->add_option("--backend", options->backend, "The backend that plans")->type_name("NAME");
  command->add_option("--policy", options->policy, "How keys are cut among workers")
      ->check(CLI::IsMember({"balanced", "invariant"}))
      ->capture_default_str();
  command->add_flag("--items", options->items, "List every piece of work");
  add_output_file(*command, "--json", options->json_file,
                  "Also write everything as JSON to this file");
  add_mask_options(*command, add_layer_options(*command, *options), *options);
  command->callback([options, &exit_code] {
    run(*options);
    exit_code = kExitRight;
  });
}

}  // namespace diffkv::cli
