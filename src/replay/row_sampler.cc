#include "replay/row_sampler.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

namespace diffkv::replay {

RowSampler::RowSampler(const std::vector<TraceRequest>& requests, Model model,
                       std::int64_t num_rows, std::uint64_t seed)
    : model_(std::move(model)), random_(seed) {
  std::int64_t prefill_tokens = 0;
  std::int64_t decode_tokens = 0;
  for (const TraceRequest& request : requests) {
    prefill_tokens += request.prompt_tokens;
    decode_tokens += request.generated_tokens - 1;  // the first comes of the prefill
  }
  decode_tokens -= decode_tokens / 10;  // preemption makes some of them prefill
  // Half of each, and where one kind has too few, more of the other.
  const std::int64_t decodes =
      std::min(std::max(num_rows / 2, num_rows - prefill_tokens), decode_tokens);
  draw(decode_, decodes, decode_tokens);
  draw(prefill_, std::min(num_rows - decodes, prefill_tokens), prefill_tokens);
}

void RowSampler::draw(Stream& stream, std::int64_t count, std::int64_t total) {
  // Each of the last `count` numbers below `total` is drawn from those up to itself, or taken
  // itself if the number drawn is taken already: all sets are equally likely, in memory for
  // `count`.
  std::unordered_set<std::int64_t> taken;
  for (std::int64_t last = total - count; last < total; ++last) {
    const auto drawn = static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(last + 1));
    if (!taken.insert(drawn).second) taken.insert(last);
  }
  stream.picked.assign(taken.begin(), taken.end());
  std::sort(stream.picked.begin(), stream.picked.end());
}

void RowSampler::add_row(std::int64_t token, SampledRows& rows) {
  const LayerKind& kind = window_next_ ? model_.window : model_.full;
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(n));
  };
  RowToVerify row;
  row.token = token;
  row.layer = below(kind.num_layers);
  row.head = below(kind.num_heads);
  (window_next_ ? rows.window : rows.full).push_back(row);
  window_next_ = !window_next_;
}

SampledRows RowSampler::rows_of(const Step& step) {
  SampledRows rows;
  std::int64_t token = 0;
  for (const ScheduledSeq& seq : step.seqs) {
    Stream& stream = seq.decode ? decode_ : prefill_;
    const std::int64_t end = stream.seen + seq.query_len;
    for (; stream.next < stream.picked.size() && stream.picked[stream.next] < end; ++stream.next) {
      add_row(token + stream.picked[stream.next] - stream.seen, rows);
    }
    stream.seen = end;
    token += seq.query_len;
  }
  return rows;
}

}  // namespace diffkv::replay
