// Problems small enough to be computed by hand: fp32, one sequence, one page for all keys.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "verify/reference.h"

namespace diffkv::verify {

// One KV head, head sizes of 8. Query row i is (q[i], 0, ...), key j is (k[j], 0, ...), value j is
// (v[j], 0, ...), so that with scale 1 the score is q[i] * k[j] and the output sum p v. Page 1 of
// the cache holds the keys; page 0 is all zeros.
class Tiny {
 public:
  Tiny(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v)
      : query(q.size() * kSize),
        output(q.size() * kSize, -1),
        lse(q.size(), -1),
        cache(2 * k.size() * 2 * kSize),
        query_start_loc{0, static_cast<std::int32_t>(q.size())},
        seq_lens{static_cast<std::int32_t>(k.size())} {
    const auto rows = static_cast<std::int64_t>(q.size());
    const auto keys = static_cast<std::int64_t>(k.size());
    for (std::size_t i = 0; i < q.size(); ++i) query[i * kSize] = q[i];
    for (std::size_t j = 0; j < k.size(); ++j) {
      cache[(k.size() + j) * 2 * kSize] = k[j];
      cache[(k.size() + j) * 2 * kSize + kSize] = v[j];
    }
    key.num_heads = key.num_kv_heads = 1;
    key.head_size_qk = key.head_size_v = kSize;
    key.query_dtype = key.key_dtype = key.value_dtype = DType::kF32;
    args.query = view_of(query.data(), {rows, 1, kSize});
    args.output = view_of(output.data(), {rows, 1, kSize});
    args.lse = view_of(lse.data(), {1, rows});
    const KvPlane plane{cache.data(), DType::kF32, keys * 2 * kSize, 2 * kSize, 2 * kSize};
    args.cache.key = args.cache.value = plane;
    args.cache.value.data = cache.data() + kSize;
    args.cache.num_blocks = 2;
    args.cache.block_size = keys;
    args.cache.num_kv_heads = 1;
    args.cache.head_size_qk = args.cache.head_size_v = kSize;
    args.batch.num_seqs = 1;
    args.batch.num_actual_tokens = rows;
    args.batch.query_start_loc = view_of(query_start_loc.data(), {2});
    args.batch.seq_lens = view_of(seq_lens.data(), {1});
    args.batch.block_table = view_of(block_table.data(), {1, 1});
  }
  Tiny(const Tiny&) = delete;
  Tiny& operator=(const Tiny&) = delete;

  RowRef row(std::int64_t token) const { return reference_row(key, params, args, token, 0); }

  // The keys that the row sees, by the mask.
  std::vector<int> seen(std::int64_t token) const {
    std::vector<int> keys;
    for (int j = -2; j < seq_lens[0] + 2; ++j) {
      if (sees(key.mask, args.batch, place_row(args.batch, token), j)) keys.push_back(j);
    }
    return keys;
  }

  static constexpr std::int64_t kSize = 8;
  std::vector<float> query, output, lse, cache;
  std::vector<std::int32_t> query_start_loc, seq_lens, block_table{1};
  PlanKey key;
  AttentionParams params;
  AttendArgs args;
};

}  // namespace diffkv::verify
