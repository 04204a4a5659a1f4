// Heads, head sizes, batches, types and memory: what a problem is made of.
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <utility>

#include "verify/case_list.h"

namespace diffkv::verify {
namespace {

constexpr DType kStored[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kE5M2};
constexpr DType kActivations[] = {DType::kF32, DType::kF16, DType::kBF16};

void add_heads(CaseList& list) {
  for (const auto& [heads, kv_heads] : {std::pair{1, 1},
                                        {2, 2},
                                        {7, 7},
                                        {2, 1},
                                        {6, 2},
                                        {4, 1},
                                        {10, 2},
                                        {8, 1},
                                        {12, 1},
                                        {24, 2},
                                        {16, 1},
                                        {32, 2},
                                        {40, 1},
                                        {64, 4},
                                        {128, 1},
                                        {96, 8}}) {
    for (const NamedBatch& batch : {decode_batch(), multi_batch(), mixed_batch()}) {
      Case c = base_case(batch);
      set_heads(c, heads, kv_heads);
      const bool quick = std::string(batch.name) != "multi";
      const std::string detail = fmt::format("{}on{}_{}", heads, kv_heads, batch.name);
      list.add(c, "heads", detail,
               quick && (heads == 128 || heads == 10 || heads == 7 || heads == 16));
      if (kv_heads % 4 != 0) continue;
      c.key.mask.window = 50;
      list.add(c, "heads", detail + "_window", quick && heads == 64);
    }
  }
}

void add_head_sizes(CaseList& list) {
  for (const auto& [qk, v] : {std::pair{8, 8},
                              {8, 576},
                              {576, 8},
                              {576, 512},
                              {512, 576},
                              {192, 128},
                              {128, 192},
                              {96, 64},
                              {64, 96},
                              {40, 24},
                              {72, 136},
                              {256, 256},
                              {64, 80},
                              {104, 88},
                              {120, 16},
                              {16, 120},
                              {24, 24},
                              {320, 200}}) {
    for (const NamedBatch& batch : {decode_batch(), mixed_batch()}) {
      for (const DType dtype : {DType::kBF16, DType::kF32}) {
        Case c = base_case(batch);
        set_head_sizes(c, qk, v);
        set_dtypes(c, dtype, dtype);
        const bool quick = dtype == DType::kBF16 && (qk == 8 || qk == 576 || qk == 72 || qk == 192);
        list.add(c, "head_size", fmt::format("{}x{}_{}_{}", qk, v, batch.name, to_string(dtype)),
                 quick);
      }
    }
  }
}

// Head sizes that fill what a kernel has room for, and some that do not, with every type of cache
// and with queries of each kind of kernel: few rows a sequence, some, many.
void add_kernel_sizes(CaseList& list) {
  for (const auto& [qk, v] :
       {std::pair{64, 64}, {128, 128}, {128, 96}, {192, 128}, {256, 256}, {208, 144}}) {
    for (const DType query : {DType::kBF16, DType::kF16, DType::kE4M3}) {
      for (const DType stored : {DType::kBF16, DType::kF16, DType::kE4M3, DType::kE5M2}) {
        if (query != stored && !is_fp8(stored)) continue;
        for (const NamedBatch& batch : {decode_batch(), multi_batch(), prefill_batch()}) {
          for (const bool four_heads : {false, true}) {
            if (four_heads && std::string(batch.name) == "prefill") continue;
            Case c = base_case(batch);
            set_heads(c, four_heads ? 24 : 16, four_heads ? 4 : 1);
            set_head_sizes(c, qk, v);
            set_dtypes(c, query, stored);
            c.block_size = 64;
            c.special_values = true;
            if (is_fp8(stored)) {
              c.scales = four_heads ? CaseScale::kPerHead : CaseScale::kPerTensor;
            }
            list.add(c, "kernel_size",
                     fmt::format("{}x{}_{}_in_{}_{}{}", qk, v, to_string(query), to_string(stored),
                                 batch.name, four_heads ? "_24on4" : ""),
                     query == DType::kBF16 && stored == DType::kE4M3);
          }
        }
      }
    }
  }
}

// More tiles of many rows than a GPU has workers, so that workers go from one to the next, where
// keys are copied in boxes and where pages leave only rows; and tiles of decode likewise.
void add_many_tiles(CaseList& list) {
  const NamedBatch batch{"prefill", {{640, 700}}};
  for (const auto& [qk, v] : {std::pair{192, 128}, {256, 256}}) {
    for (const DType stored : {DType::kBF16, DType::kE4M3}) {
      for (const std::int64_t block_size : {24, 64}) {
        Case c = base_case(batch);
        set_heads(c, 64, 4);
        set_head_sizes(c, qk, v);
        set_dtypes(c, DType::kBF16, stored);
        c.key.mask.window = 40;
        c.block_size = block_size;
        if (is_fp8(stored)) c.scales = CaseScale::kPerTensor;
        list.add(c, "many_tiles",
                 fmt::format("{}x{}_{}_pages_of_{}", qk, v, to_string(stored), block_size),
                 qk == 192 && is_fp8(stored) && block_size == 24);
      }
    }
  }
  // Few rows, and most shares end one cut tile and start another.
  NamedBatch decode{"decode", {}};
  for (int i = 0; i < 200; ++i) decode.seqs.push_back({1, 1400 + i * 37 % 300});
  Case c = base_case(decode);
  set_heads(c, 2, 1);
  set_head_sizes(c, 64, 64);
  set_dtypes(c, DType::kBF16, DType::kBF16);
  c.block_size = 64;
  list.add(c, "many_tiles", "64x64_bf16_decode", false);
}

void add_batches(CaseList& list) {
  for (const NamedBatch& batch : all_batches()) {
    for (const DType dtype : kActivations) {
      for (const bool causal : {true, false}) {
        for (const int heads : {2, 12}) {
          Case c = base_case(batch);
          set_heads(c, heads, 2);
          set_dtypes(c, dtype, dtype);
          c.key.mask.causal = causal;
          c.null_blocks = true;
          list.add(c, causal ? "causal" : "full",
                   fmt::format("{}_{}_{}heads", batch.name, to_string(dtype), heads),
                   heads == 12 && dtype == DType::kBF16);
        }
      }
    }
  }
}

void add_kv_dtypes(CaseList& list) {
  for (const DType query : kActivations) {
    for (const DType stored : kStored) {
      for (const NamedBatch& batch : {decode_batch(), mixed_batch()}) {
        Case c = base_case(batch);
        set_dtypes(c, query, stored);
        c.special_values = true;
        list.add(c, "kv_dtype",
                 fmt::format("{}_in_{}_{}", to_string(query), to_string(stored), batch.name),
                 query == DType::kBF16 || stored == DType::kE4M3);
        if (!is_fp8(stored)) continue;
        const std::pair<CaseScale, const char*> scales[] = {
            {CaseScale::kPerTensor, "per_tensor"},
            {CaseScale::kPerHead, "per_head"},
            {CaseScale::kPerHeadStrided, "per_head_strided"}};
        for (const auto& [scale, name] : scales) {
          c.scales = scale;
          list.add(
              c, "kv_scale",
              fmt::format("{}_{}_{}_{}", name, to_string(query), to_string(stored), batch.name),
              query == DType::kBF16 && stored == DType::kE4M3);
        }
        c.uint8_cache = true;
        list.add(c, "uint8_cache",
                 fmt::format("{}_{}_{}", to_string(query), to_string(stored), batch.name),
                 query == DType::kBF16);
      }
    }
  }
  Case c = base_case();
  c.cache = CaseCache::kSeparate;
  c.key.key_dtype = DType::kE4M3;
  list.add(c, "kv_dtype", "key_e4m3_value_bf16", true);
  c.key.key_dtype = DType::kF16;
  c.key.value_dtype = DType::kE5M2;
  list.add(c, "kv_dtype", "key_fp16_value_e5m2", false);
  c = base_case();
  set_dtypes(c, DType::kBF16, DType::kE4M3);
  c.new_dtype = DType::kE4M3;
  c.scales = CaseScale::kPerHead;
  c.special_values = true;
  list.add(c, "kv_dtype", "copied_e4m3", true);
}

void add_fp8_queries(CaseList& list) {
  for (const NamedBatch& batch : all_batches()) {
    for (const DType stored : {DType::kE4M3, DType::kE5M2, DType::kBF16}) {
      for (const DType output : {DType::kBF16, DType::kF16}) {
        Case c = base_case(batch);
        set_dtypes(c, DType::kE4M3, stored);
        c.output_dtype = output;
        if (is_fp8(stored)) c.scales = CaseScale::kPerTensor;
        list.add(c, "fp8_query",
                 fmt::format("{}_{}_out_{}", batch.name, to_string(stored), to_string(output)),
                 stored == DType::kE4M3 && output == DType::kBF16);
      }
    }
  }
}

void add_outputs(CaseList& list) {
  for (const DType query : {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3}) {
    for (const NamedBatch& batch : {decode_batch(), mixed_batch(), degenerate_batch()}) {
      Case c = base_case(batch);
      set_dtypes(c, query, is_fp8(query) ? DType::kE4M3 : query);
      c.output_scale = true;
      c.output_dtype = DType::kE4M3;
      list.add(c, "output_scale", fmt::format("{}_{}", to_string(query), batch.name),
               query == DType::kBF16);
    }
  }
  for (const bool causal : {true, false}) {
    for (const NamedBatch& batch : all_batches()) {
      Case c = base_case(batch);
      set_dtypes(c, DType::kF16, DType::kF16);
      c.key.mask.causal = causal;
      c.strided_output = true;
      list.add(c, "lse", fmt::format("{}_{}", causal ? "causal" : "full", batch.name), causal);
      c.lse = false;
      list.add(c, "no_lse", fmt::format("{}_{}", causal ? "causal" : "full", batch.name),
               causal && std::string(batch.name) == "mixed");
    }
  }
}

// Values that a cache of a wider type holds but an fp16 or e4m3 output does not.
void add_overflows(CaseList& list) {
  for (const NamedBatch& batch : {decode_batch(), mixed_batch()}) {
    for (const DType output : {DType::kF16, DType::kE4M3}) {
      Case c = base_case(batch);
      set_dtypes(c, DType::kF16, DType::kF32);
      c.flow = CaseFlow::kSharing;  // the cache is written by a layer of wider activations
      c.value_gain = 7e4F;
      c.output_dtype = output;
      c.output_scale = output == DType::kE4M3;
      list.add(c, "overflow", fmt::format("{}_{}", to_string(output), batch.name), true);
    }
  }
}

void add_models(CaseList& list) {
  struct Model {
    const char* name;
    std::int64_t heads, kv_heads, qk, v;
    std::int32_t window;
  };
  constexpr Model kModels[] = {{"mimo_full", 64, 4, 192, 128, 0},
                               {"mimo_window", 64, 8, 192, 128, 128},
                               {"mimo_full_tp4", 16, 1, 192, 128, 0},
                               {"mimo_window_tp4", 16, 2, 192, 128, 128},
                               {"mimo_full_tp8", 8, 1, 192, 128, 0},
                               {"mimo_pro_full", 128, 8, 192, 128, 0},
                               {"mimo_pro_window", 128, 8, 192, 128, 128},
                               {"minicpm3", 40, 40, 96, 64, 0},
                               {"deepseek_v3_prefill", 128, 128, 192, 128, 0}};
  const NamedBatch batches[] = {{"decode", {{1, 200}, {1, 31}}},
                                {"multi", {{4, 150}}},
                                {"mixed", {{20, 150}, {1, 140}, {9, 9}}}};
  for (const Model& model : kModels) {
    for (const NamedBatch& batch : batches) {
      for (const DType stored : {DType::kBF16, DType::kE4M3}) {
        for (const std::int64_t block_size : {16, 64}) {
          Case c = base_case(batch);
          // The memory of so many KV heads is what such a case costs.
          for (SeqShape& seq : c.seqs) {
            if (model.kv_heads > 16) seq.seq_len = std::min(seq.seq_len, seq.query_len + 40);
          }
          set_heads(c, model.heads, model.kv_heads);
          set_head_sizes(c, model.qk, model.v);
          set_dtypes(c, DType::kBF16, stored);
          c.key.mask.window = model.window;
          c.block_size = block_size;
          c.fused_qkv = true;
          c.lse = false;
          if (model.window > 0) c.sinks = DType::kBF16;
          c.null_blocks = model.window > 0;
          list.add(
              c, "model",
              fmt::format("{}_{}_{}_page{}", model.name, batch.name, to_string(stored), block_size),
              stored == DType::kBF16 && block_size == 64 && batch.seqs.size() == 3);
        }
      }
    }
  }
}

void add_long(CaseList& list) {
  // So many that a GPU's workers share each tile among few.
  NamedBatch many{"decode_many", {}};
  for (int i = 0; i < 40; ++i) many.seqs.push_back({1, 500 + 61 * i});
  const NamedBatch batches[] = {
      many,
      {"decode_16k", {{1, 16000}, {1, 77}}},
      {"decode_ragged", {{1, 5000}, {1, 100}, {1, 2048}, {1, 1}, {1, 900}}},
      {"multi_6k", {{4, 6001}, {2, 3000}}},
      {"chunk_4k", {{48, 4096}}},
      {"mixed_8k", {{32, 3000}, {1, 8000}, {1, 2049}, {60, 60}}},
      {"window_far", {{1, 9000}, {3, 2100}}}};
  for (const NamedBatch& batch : batches) {
    for (const SchedulePolicy policy :
         {SchedulePolicy::kBalanced, SchedulePolicy::kBatchInvariant}) {
      for (const bool sinks : {false, true}) {
        Case c = base_case(batch);
        set_heads(c, 8, 1);
        set_head_sizes(c, 64, 40);
        const bool fp32 = std::string(batch.name) == "decode_ragged";
        if (fp32) set_dtypes(c, DType::kF32, DType::kF32);
        if (std::string(batch.name) == "window_far") c.key.mask.window = 1500;
        c.null_blocks = c.key.mask.window > 0;
        c.key.policy = policy;
        c.block_size = 64;
        if (sinks) c.sinks = DType::kF32;
        const bool invariant = policy == SchedulePolicy::kBatchInvariant;
        list.add(c, invariant ? "batch_invariant" : "long",
                 fmt::format("{}{}", batch.name, sinks ? "_sinks" : ""), sinks);
      }
    }
  }
}

}  // namespace

void add_shape_cases(CaseList& list) {
  add_heads(list);
  add_head_sizes(list);
  add_kernel_sizes(list);
  add_many_tiles(list);
  add_batches(list);
  add_kv_dtypes(list);
  add_fp8_queries(list);
  add_outputs(list);
  add_overflows(list);
  add_models(list);
  add_long(list);
}

}  // namespace diffkv::verify
