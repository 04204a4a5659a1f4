// The models whose attention a replay runs: heads, head sizes and layers of both kinds.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace diffkv::replay {

// The layers of a model that share heads and mask.
struct LayerKind {
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t window = 0;  // 0: full attention
  bool sinks = false;
};

struct Model {
  std::string name;
  std::int64_t head_size_qk = 0;
  std::int64_t head_size_v = 0;
  float scale = 0.0F;
  LayerKind full;
  LayerKind window;
};

// The presets, whole models (not divided).
const std::vector<Model>& models();

// The preset of that name. Throws Error that lists the known names.
const Model& find_model(std::string_view name);

// One rank's part: query and KV heads divided by `tp`, KV heads shared by ranks where there are
// fewer of them than ranks (then each rank has 1). Throws Error where heads do not divide.
Model divide_heads(const Model& model, std::int64_t tp);

// The layers to run of "F:W" (full and window layers), or of "N" in the model's ratio with at
// least one of each. Throws Error if that is not a number of layers the model has.
Model choose_layers(const Model& model, const std::string& layers);

}  // namespace diffkv::replay
