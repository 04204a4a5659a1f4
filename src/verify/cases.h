// The cases that every backend is judged by: all features of the library, built from small tables.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "diffkv/attention.h"

namespace diffkv::verify {

// One sequence of a step.
struct SeqShape {
  std::int64_t query_len = 0;
  std::int64_t seq_len = 0;
};

// How K and V lie in memory.
enum class CaseCache : std::uint8_t {
  kPackedNHD,
  kPackedHND,
  kPackedPadded,  // NHD with unused bytes behind every page
  kSeparate,      // a pool for K, another with other strides for V
  kDense,         // no pages, a kv_start per sequence; no update
};

// Scales of stored K and V.
enum class CaseScale : std::uint8_t { kNone, kPerTensor, kPerHead, kPerHeadStrided };

// What else than attention over one cache is done.
enum class CaseFlow : std::uint8_t {
  kStages,   // update_cache, make_plan, attend
  kLayer,    // the same by the three classes of layer.h
  kSharing,  // the classes, without key and value: another layer wrote the cache
  kMerge,    // two parts, below and above a cut through every sequence, and merge_attn_states
};

// Everything that decides a problem but its random numbers.
struct Case {
  std::string name;     // unique
  std::string feature;  // the group it belongs to
  PlanKey key;
  std::vector<SeqShape> seqs;
  CaseFlow flow = CaseFlow::kStages;

  // Memory.
  CaseCache cache = CaseCache::kPackedNHD;
  std::int64_t block_size = 16;
  CaseScale scales = CaseScale::kNone;
  DType new_dtype = DType::kBF16;  // of this step's key and value
  DType output_dtype = DType::kBF16;
  bool uint8_cache = false;       // an fp8 cache that is passed as raw bytes
  bool fused_qkv = false;         // query, key and value are slices of one buffer
  bool strided_output = false;    // output and lse rows have gaps
  bool least_alignment = false;   // rows start at odd multiples of the least alignment allowed
  bool odd_unit_strides = false;  // dimensions of size 1 have meaningless strides
  bool null_blocks = false;       // block-table entries that no row can read are 0
  bool skip_slots = false;        // some of this step's tokens are in the cache already, slot -1
  bool special_values = false;    // NaN, infinities, ties written to an unread page
  bool duplicate_slots = true;    // with special_values: two tokens for one slot, the later wins
  bool merge_in_place = false;    // kMerge: the merged output and lse are the first part's
  float value_gain = 1;           // V is multiplied by it
  bool nan_keys = false;          // a NaN in one key and in one value of every sequence
  std::int64_t extra_rows = 0;    // rows of query and output past the sequences' tokens
  std::int64_t actual_delta = 0;  // num_actual_tokens - query_start_loc[num_seqs]

  // Scores.
  float scale = 0;  // 0: head_size_qk^-0.5
  float soft_cap = 0;
  bool alibi = false;
  bool alibi_sqrt = false;
  std::int64_t qq_bias = 0;  // rows and columns of the query-query bias, 0: none
  DType qq_bias_dtype = DType::kF32;
  bool qq_bias_masks = false;  // some of its entries are -inf
  std::optional<DType> sinks;
  bool sinks_none = false;  // every second sink is -inf
  SinkMode sink_mode = SinkMode::kIn;
  bool lse = false;
  bool output_scale = false;
};

// kQuick has every feature and runs in seconds; kFull has every feature with its neighbours.
enum class Suite : std::uint8_t { kQuick, kFull };

// The cases of a suite, in an order that does not change. kQuick is a subset of kFull by name.
std::vector<Case> cases(Suite suite);

// The feature groups, in order of first appearance in the full suite.
std::vector<std::string> features();

}  // namespace diffkv::verify
