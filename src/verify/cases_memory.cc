// Where things lie and how the library is called.
#include <fmt/format.h>

#include <string>
#include <utility>

#include "verify/case_list.h"

namespace diffkv::verify {
namespace {

constexpr std::pair<CaseCache, const char*> kPaged[] = {{CaseCache::kPackedNHD, "nhd"},
                                                        {CaseCache::kPackedHND, "hnd"},
                                                        {CaseCache::kPackedPadded, "padded"},
                                                        {CaseCache::kSeparate, "separate"}};

void add_pages(CaseList& list) {
  for (const auto& [cache, name] : kPaged) {
    for (const std::int64_t block_size : {1, 5, 13, 16, 32, 64, 100, 128}) {
      for (const DType stored : {DType::kBF16, DType::kE4M3}) {
        Case c = base_case();
        c.cache = cache;
        c.block_size = block_size;
        set_dtypes(c, DType::kBF16, stored);
        c.special_values = true;
        list.add(c, block_size == 16 ? "layout" : "block_size",
                 fmt::format("{}_{}_{}", name, block_size, to_string(stored)),
                 (block_size == 16 || cache == CaseCache::kPackedNHD) && stored == DType::kBF16);
      }
    }
  }
}

void add_dense(CaseList& list) {
  const NamedBatch encoder{"encoder", {{30, 30}, {1, 1}, {65, 65}, {7, 7}}};
  const NamedBatch cross{"cross", {{5, 40}, {33, 9}, {1, 70}, {4, 0}, {0, 6}}};
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const std::int64_t heads : {2, 8}) {
      Case c = base_case(encoder);
      c.cache = CaseCache::kDense;
      c.key.mask.causal = false;
      set_heads(c, heads, 2);
      set_dtypes(c, dtype, dtype);
      const std::string detail = fmt::format("{}_{}heads", to_string(dtype), heads);
      const bool quick = dtype == DType::kBF16;
      list.add(c, "dense", "encoder_" + detail, quick);
      c.key.mask.window = 6;
      list.add(c, "dense", "encoder_window_" + detail, quick && heads == 8);
      c.key.mask = {};
      list.add(c, "dense", "causal_" + detail, quick && heads == 8);
      c.key.mask.causal = false;
      c.flow = CaseFlow::kLayer;
      list.add(c, "encoder_layer", detail, quick);
      c.extra_rows = 3;
      list.add(c, "encoder_layer", "padded_" + detail);
      c = base_case(cross);
      c.cache = CaseCache::kDense;
      c.key.mask.causal = false;
      set_heads(c, heads, 2);
      set_dtypes(c, dtype, dtype);
      list.add(c, "cross_attention", "dense_" + detail, quick);
      c.cache = CaseCache::kPackedNHD;
      c.skip_slots = true;
      list.add(c, "cross_attention", "paged_" + detail, quick && heads == 2);
    }
  }
  Case c = base_case(cross);
  c.cache = CaseCache::kDense;
  c.key.mask.causal = false;
  set_dtypes(c, DType::kBF16, DType::kE4M3);
  c.scales = CaseScale::kPerHead;
  list.add(c, "dense", "e4m3_per_head", true);
}

void add_strides(CaseList& list) {
  for (const NamedBatch& batch : {decode_batch(), mixed_batch(), NamedBatch{"one", {{1, 3}}}}) {
    for (const DType stored : {DType::kF32, DType::kBF16, DType::kE4M3}) {
      const DType query = is_fp8(stored) ? DType::kBF16 : stored;
      Case c = base_case(batch);
      set_dtypes(c, query, stored);
      const std::string detail = fmt::format("{}_{}", batch.name, to_string(stored));
      const bool quick = stored != DType::kF32;
      Case fused = c;
      fused.fused_qkv = true;
      list.add(fused, "fused_qkv", detail, quick);
      Case strided = c;
      strided.strided_output = true;
      strided.extra_rows = 2;
      list.add(strided, "strided_output", detail, quick);
      Case unit = c;
      unit.odd_unit_strides = true;
      unit.block_size = 1;
      set_heads(unit, 3, 1);
      unit.scales = is_fp8(stored) ? CaseScale::kPerTensor : CaseScale::kNone;
      list.add(unit, "unit_strides", detail, quick);
      set_heads(unit, 1, 1);
      unit.block_size = 16;
      list.add(unit, "unit_strides", detail + "_one_head", quick);
      Case least = c;
      least.least_alignment = true;
      set_head_sizes(least, 40, 24);
      list.add(least, "alignment", detail, quick);
      least.cache = CaseCache::kPackedPadded;
      set_head_sizes(least, 24, 40);
      list.add(least, "alignment", detail + "_padded");
      // Tiles of four KV heads are planned before anybody sees the rows, of a window.
      set_head_sizes(least, 192, 128);
      set_heads(least, 16, 4);
      least.key.mask.window = 50;
      list.add(least, "alignment", detail + "_four_heads", quick);
    }
  }
}

void add_padding(CaseList& list) {
  for (const NamedBatch& batch : all_batches()) {
    for (const int delta : {-2, 0, 1, 3}) {
      Case c = base_case(batch);
      c.extra_rows = 3;
      c.actual_delta = delta;
      c.key.mask.window = 20;
      c.null_blocks = true;
      list.add(c, "padding", fmt::format("{}_actual{:+}", batch.name, delta),
               std::string(batch.name) == "mixed" || std::string(batch.name) == "degenerate");
      if (delta != 0) continue;
      c.skip_slots = true;
      list.add(c, "skipped_slots", batch.name, std::string(batch.name) == "multi");
    }
  }
  for (const NamedMask& mask : all_masks()) {
    Case c = base_case(degenerate_batch());
    set_mask(c, mask);
    c.null_blocks = true;
    c.sinks = DType::kF32;
    list.add(c, "degenerate", mask.name, mask.mask.window != 33);
  }
}

void add_nans(CaseList& list) {
  for (const NamedMask& mask : all_masks()) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kE4M3}) {
      Case c = base_case();
      set_mask(c, mask);
      set_dtypes(c, is_fp8(dtype) ? DType::kBF16 : dtype, dtype);
      c.nan_keys = true;
      c.sinks = DType::kF32;
      const std::string name = mask.name;
      list.add(c, "nan", fmt::format("{}_{}", name, to_string(dtype)),
               dtype == DType::kBF16 && (name == "causal" || name == "window7" || name == "mm"));
    }
  }
}

void add_flows(CaseList& list) {
  for (const NamedBatch& batch : all_batches()) {
    for (const DType stored : {DType::kBF16, DType::kE4M3}) {
      Case c = base_case(batch);
      set_dtypes(c, DType::kBF16, stored);
      const std::string detail = fmt::format("{}_{}", batch.name, to_string(stored));
      const bool quick = stored == DType::kBF16;
      c.flow = CaseFlow::kLayer;
      c.special_values = true;
      list.add(c, "layer", detail, quick);
      c.qq_bias = 5;
      c.sinks = DType::kBF16;
      list.add(c, "layer", detail + "_bias_sinks", !quick);
      c.special_values = false;
      c.flow = CaseFlow::kSharing;
      list.add(c, "kv_sharing", detail, quick);
    }
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const bool sinks : {false, true}) {
        Case c = base_case(batch);
        c.flow = CaseFlow::kMerge;
        set_dtypes(c, dtype, dtype);
        c.extra_rows = sinks ? 2 : 0;
        if (sinks) c.sinks = DType::kF32;
        list.add(c, "merge",
                 fmt::format("{}_{}{}", batch.name, to_string(dtype), sinks ? "_sinks" : ""),
                 dtype == DType::kBF16);
        c.merge_in_place = true;
        list.add(
            c, "merge",
            fmt::format("{}_{}{}_in_place", batch.name, to_string(dtype), sinks ? "_sinks" : ""),
            dtype == DType::kBF16 && sinks);
        c.sinks_none = true;
        if (sinks) {
          list.add(c, "merge", fmt::format("{}_{}_sinks_none", batch.name, to_string(dtype)));
        }
      }
    }
  }
}

}  // namespace

void add_memory_cases(CaseList& list) {
  add_pages(list);
  add_dense(list);
  add_strides(list);
  add_padding(list);
  add_nans(list);
  add_flows(list);
}

}  // namespace diffkv::verify
