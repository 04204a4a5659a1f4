#include "verify/rows.h"

#include <algorithm>
#include <vector>

#include "verify/generate.h"

namespace diffkv::verify {
namespace {

// Indices token * num_heads + head of the rows to compare, rising.
std::vector<std::int64_t> choose_rows(const PlanKey& key, const Batch& batch, std::int64_t max_work,
                                      std::uint64_t seed) {
  const std::int64_t tokens = covered_tokens(batch);
  const std::int64_t all = tokens * key.num_heads;
  std::int64_t work = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    work += place_row(batch, t).seq_len * (key.head_size_qk + key.head_size_v) * key.num_heads;
  }
  const double share =
      work <= max_work ? 1 : static_cast<double>(max_work) / static_cast<double>(work);
  Random random(seed);
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < all; ++row) {
    if (random.uniform() < share || row == 0 || row == all - 1) rows.push_back(row);
  }
  return rows;
}

}  // namespace

RowsCheck check_rows(const PlanKey& key, const AttentionParams& params, const AttendArgs& args,
                     const Tolerance& tolerance, std::int64_t max_work, std::uint64_t seed) {
  const std::vector<std::int64_t> rows = choose_rows(key, args.batch, max_work, seed);
  std::vector<RowCheck> checks(rows.size());
#pragma omp parallel for schedule(dynamic)
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t token = rows[i] / key.num_heads;
    const std::int64_t head = rows[i] % key.num_heads;
    checks[i] =
        check_row(reference_row(key, params, args, token, head), args, token, head, tolerance);
  }
  RowsCheck result;
  result.rows = static_cast<std::int64_t>(rows.size());
  for (const RowCheck& check : checks) {
    result.worst_error = std::max(result.worst_error, check.error);
    if (check.ok) continue;
    if (result.wrong++ == 0) result.what = check.what;
  }
  return result;
}

}  // namespace diffkv::verify
