// A layer group's rows against the reference.
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

#include "replay/layer_group.h"
#include "replay/row_image.h"
#include "verify/codec.h"
#include "verify/compare.h"
#include "verify/reference.h"

namespace diffkv::replay {

void LayerGroup::verify_row(const Step& step, const RowToVerify& row, VerifyResult& verify) const {
  const verify::RowPlace place = verify::place_row(batch_, row.token);
  const std::int64_t first_key =
      config_.kind.window > 0 ? std::max<std::int64_t>(place.position - config_.kind.window + 1, 0)
                              : 0;
  const RowImage image({.backend = &session_->backend(),
                        .cache = &memory_[static_cast<std::size_t>(row.layer)],
                        .args = device_args(row.layer, tensors())},
                       host_args(row.layer), spec_, row.token, row.head, first_key);
  const AttendArgs& layer_args = image.args();
  const verify::Tolerance tolerance = verify::tolerance(key_, config_.dtype);
  const verify::RowRef reference =
      verify::reference_row(key_, params_, layer_args, row.token, row.head);
  const verify::RowCheck check =
      verify::check_row(reference, layer_args, row.token, row.head, tolerance);
  (config_.kind.window > 0 ? verify.rows_window : verify.rows_full) += 1;
  verify.worst_error = std::max(verify.worst_error, check.error);
  verify.worst_lse_error = std::max(verify.worst_lse_error, check.lse_error);
  verify.tolerance = std::max(verify.tolerance, tolerance.output);
  verify.lse_tolerance = std::max(verify.lse_tolerance, tolerance.lse);
  std::string wrong = check_stored(step, row, layer_args);
  if (!check.ok) wrong = wrong.empty() ? check.what : check.what + "; " + wrong;
  if (wrong.empty()) return;
  ++verify.rows_wrong;
  if (verify.first_wrong.empty()) {
    verify.first_wrong = fmt::format(
        "{} layer {}: {}", config_.kind.window > 0 ? "window" : "full-attention", row.layer, wrong);
  }
}

std::string LayerGroup::check_stored(const Step& step, const RowToVerify& row,
                                     const AttendArgs& args) const {
  const verify::RowPlace place = verify::place_row(batch_, row.token);
  const Sequence& sequence = *step.seqs[static_cast<std::size_t>(place.seq)].sequence;
  const std::vector<Source>& sources = sources_.at(sequence.id);
  const KvCacheView& cache = args.cache;
  const std::int64_t head = row.head / key_.group();
  const std::int64_t bytes = size_of(config_.cache_dtype);
  for (std::int64_t j = 0; j <= place.position; ++j) {
    if (!verify::sees(key_.mask, batch_, place, j)) continue;
    const verify::KeyPlace stored = verify::place_key(cache, args.batch, place.seq, j);
    const Source source = sources[static_cast<std::size_t>(j)];
    const std::int64_t input = offset_of(row.layer, source.offset) + source.index;
    const auto differs = [&](const KvPlane& plane, const ConstTensorView& from, std::int64_t size) {
      const std::int64_t at = stored.block * plane.stride_block +
                              stored.token * plane.stride_token + head * plane.stride_head;
      const std::byte* have = static_cast<const std::byte*>(plane.data) + at * bytes;
      const std::byte* given =
          static_cast<const std::byte*>(from.data) + head * size * size_of(config_.dtype);
      for (std::int64_t d = 0; d < size; ++d) {
        const double value = verify::load(given, config_.dtype, d);
        const std::uint32_t expected = verify::cache_bits(config_.cache_dtype, value, kv_scale_);
        const std::uint32_t bits = verify::load_bits(have, config_.cache_dtype, d);
        if (bits != expected) return true;
      }
      return false;
    };
    const bool key_differs = differs(cache.key, inputs_.key(input, 1), key_.head_size_qk);
    if (key_differs || differs(cache.value, inputs_.value(input, 1), key_.head_size_v)) {
      return fmt::format("the {} of token {} of request {} is not in the cache as it was written",
                         key_differs ? "key" : "value", j, sequence.id);
    }
  }
  return {};
}

}  // namespace diffkv::replay
