// Masks, and what is done to scores.
#include <fmt/format.h>

#include <functional>
#include <string>
#include <utility>

#include "verify/case_list.h"

namespace diffkv::verify {
namespace {

// The feature that a mask belongs to.
std::string group_of(const NamedMask& mask) {
  if (mask.mm_ranges) return "mm_ranges";
  if (mask.causal_per_seq) return "causal_per_seq";
  if (mask.mask.chunk_size > 0) return "chunk";
  if (mask.mask.prefix_window > 0) return "prefix_window";
  if (mask.mask.window > 0) return "window";
  return mask.mask.causal ? "causal" : "full";
}

// Every mask with every kind of batch, and with KV heads that a backend may take four at a time;
// then with each way to change scores.
void add_with_masks(CaseList& list, const std::string& feature,
                    const std::function<void(Case&)>& change) {
  for (const NamedMask& mask : all_masks()) {
    for (const NamedBatch& batch : {multi_batch(), mixed_batch(), decode_batch()}) {
      Case c = base_case(batch);
      const bool decode = std::string(batch.name) == "decode";
      if (decode) set_heads(c, 12, 4);
      set_mask(c, mask);
      change(c);
      const std::string name = mask.name;
      list.add(
          c, feature, fmt::format("{}_{}{}", name, batch.name, decode ? "_12on4" : ""),
          std::string(batch.name) != "multi" && (name == "causal" || name == "full" ||
                                                 name == "window7" || name == "mm_window7_clamp"));
    }
  }
}

}  // namespace

void add_mask_cases(CaseList& list) {
  for (const NamedMask& mask : all_masks()) {
    for (const NamedBatch& batch : all_batches()) {
      for (const std::int64_t heads : {2, 10, 20}) {
        Case c = base_case(batch);
        set_mask(c, mask);
        set_heads(c, heads, heads == 20 ? 4 : 2);
        set_dtypes(c, heads == 2 ? DType::kF32 : DType::kBF16,
                   heads == 2 ? DType::kF32 : DType::kBF16);
        c.null_blocks = true;
        c.block_size = 5;
        list.add(c, group_of(mask), fmt::format("{}_{}_{}heads", mask.name, batch.name, heads),
                 heads == 2 && std::string(batch.name) == "mixed");
      }
    }
  }
}

void add_score_cases(CaseList& list) {
  // Kernels may compute large caps in a way of their own.
  for (const float cap : {0.5F, 4.0F, 50.0F, 1000.0F, 3e38F}) {
    const std::string feature = "soft_cap";
    for (const NamedBatch& batch : all_batches()) {
      Case c = base_case(batch);
      c.soft_cap = cap;
      set_dtypes(c, DType::kF32, DType::kF32);
      list.add(c, feature, fmt::format("{}_{}", cap, batch.name), cap == 4.0F);
      set_dtypes(c, DType::kBF16, DType::kBF16);
      list.add(c, feature, fmt::format("{}_{}_bf16", cap, batch.name), cap > 4.0F);
    }
  }
  add_with_masks(list, "soft_cap", [](Case& c) { c.soft_cap = 3.0F; });
  add_with_masks(list, "alibi", [](Case& c) { c.alibi = true; });
  add_with_masks(list, "alibi_sqrt", [](Case& c) {
    c.alibi = true;
    c.alibi_sqrt = true;
  });
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const std::int64_t n : {1, 4, 9, 64}) {
      for (const bool masks : {false, true}) {
        for (const NamedBatch& batch : {multi_batch(), prefill_batch(), degenerate_batch()}) {
          Case c = base_case(batch);
          c.qq_bias = n;
          c.qq_bias_dtype = dtype;
          c.qq_bias_masks = masks;
          c.key.mask.causal = !masks;
          list.add(
              c, "qq_bias",
              fmt::format("{}_{}{}_{}", to_string(dtype), n, masks ? "_masks" : "", batch.name),
              n == 4);
        }
      }
    }
  }
  add_with_masks(list, "qq_bias", [](Case& c) {
    c.qq_bias = 8;
    c.qq_bias_masks = true;
  });
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const SinkMode mode : {SinkMode::kIn, SinkMode::kOut}) {
      for (const bool none : {false, true}) {
        for (const NamedBatch& batch : all_batches()) {
          Case c = base_case(batch);
          c.sinks = dtype;
          c.sinks_none = none;
          c.sink_mode = mode;
          list.add(c, mode == SinkMode::kIn ? "sinks" : "sinks_out",
                   fmt::format("{}{}_{}", to_string(dtype), none ? "_none" : "", batch.name),
                   none && std::string(batch.name) == "mixed");
        }
      }
    }
  }
  add_with_masks(list, "sinks", [](Case& c) { c.sinks = DType::kBF16; });
  // Scales of one and of the other sign, as layers without a square root have them.
  for (const float scale : {1.0F, 0.01F, -0.1F}) {
    Case c = base_case();
    c.scale = scale;
    set_dtypes(c, DType::kF32, DType::kF32);
    list.add(c, "scale", fmt::format("{}", scale), true);
  }
}

}  // namespace diffkv::verify
