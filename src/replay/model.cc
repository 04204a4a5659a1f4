#include "replay/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>

#include "diffkv/error.h"

namespace diffkv::replay {
namespace {

std::optional<std::int64_t> parse_number(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

LayerKind divide(const LayerKind& kind, std::int64_t tp, const std::string& name) {
  LayerKind part = kind;
  const bool divides = tp >= 1 && kind.num_heads % tp == 0 &&
                       (kind.num_kv_heads % tp == 0 || tp % kind.num_kv_heads == 0);
  if (!divides) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("tp is {}, expected a number that divides the {} query heads and "
                            "divides, or is a multiple of, the {} KV heads of {}",
                            tp, kind.num_heads, kind.num_kv_heads, name));
  }
  part.num_heads = kind.num_heads / tp;
  part.num_kv_heads = std::max<std::int64_t>(kind.num_kv_heads / tp, 1);
  return part;
}

}  // namespace

const std::vector<Model>& models() {
  static const float scale = 1.0F / std::sqrt(192.0F);
  static const std::vector<Model> presets = {
      {.name = "mimo-v2-flash",
       .head_size_qk = 192,
       .head_size_v = 128,
       .scale = scale,
       .full = {.num_layers = 9, .num_heads = 64, .num_kv_heads = 4},
       .window =
           {.num_layers = 39, .num_heads = 64, .num_kv_heads = 8, .window = 128, .sinks = true}},
      {.name = "mimo-v2.5-pro",
       .head_size_qk = 192,
       .head_size_v = 128,
       .scale = scale,
       .full = {.num_layers = 10, .num_heads = 128, .num_kv_heads = 8},
       .window =
           {.num_layers = 60, .num_heads = 128, .num_kv_heads = 8, .window = 128, .sinks = true}},
  };
  return presets;
}

const Model& find_model(std::string_view name) {
  std::string known;
  for (const Model& model : models()) {
    if (model.name == name) return model;
    known += (known.empty() ? "" : ", ") + model.name;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("model is \"{}\", expected one of {}", name, known));
}

Model divide_heads(const Model& model, std::int64_t tp) {
  Model part = model;
  part.full = divide(model.full, tp, model.name);
  part.window = divide(model.window, tp, model.name);
  return part;
}

Model choose_layers(const Model& model, const std::string& layers) {
  const std::int64_t all = model.full.num_layers + model.window.num_layers;
  std::optional<std::int64_t> full;
  std::optional<std::int64_t> window;
  if (const std::size_t colon = layers.find(':'); colon != std::string::npos) {
    const std::string_view text = layers;
    full = parse_number(text.substr(0, colon));
    window = parse_number(text.substr(colon + 1));
  } else if (const auto total = parse_number(layers); total && *total >= 2 && *total <= all) {
    full = std::clamp<std::int64_t>((*total * model.full.num_layers + all / 2) / all, 1,
                                    std::min(*total - 1, model.full.num_layers));
    window = *total - *full;
  }
  if (!full || !window || *full < 1 || *full > model.full.num_layers || *window < 1 ||
      *window > model.window.num_layers) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("layers is \"{}\", expected FULL:WINDOW of 1:1 to {}:{}, or a total of "
                    "2 to {}, as {} has",
                    layers, model.full.num_layers, model.window.num_layers, all, model.name));
  }
  Model part = model;
  part.full.num_layers = *full;
  part.window.num_layers = *window;
  return part;
}

}  // namespace diffkv::replay
