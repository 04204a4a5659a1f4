// Which rows of a replay are compared with the reference.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "replay/layer_group.h"
#include "replay/model.h"
#include "replay/scheduler.h"
#include "replay/trace.h"

namespace diffkv::replay {

struct SampledRows {
  std::vector<RowToVerify> full;    // of full-attention layers
  std::vector<RowToVerify> window;  // of sliding-window layers
};

// Picks, before the first step, which prefill tokens and which decode tokens of the whole replay to
// check, counted in the order steps compute them. No token is picked twice, so a short trace has
// fewer rows than were asked for. Half of the rows are decode tokens (fewer where a trace has few
// decodes): drawn from all tokens alike there would hardly be one among the prompts. A preempted
// sequence computes some of its decode tokens as prefill; the last tenth of the decode tokens is
// not drawn from to make room for that.
class RowSampler {
 public:
  RowSampler(const std::vector<TraceRequest>& requests, Model model, std::int64_t num_rows,
             std::uint64_t seed);

  // The rows of this step; a random layer and head each, layer kinds in turn.
  SampledRows rows_of(const Step& step);

 private:
  struct Stream {
    std::vector<std::int64_t> picked;  // positions in the stream, sorted
    std::size_t next = 0;
    std::int64_t seen = 0;
  };

  // `count` different numbers from 0 to total - 1, count <= total.
  void draw(Stream& stream, std::int64_t count, std::int64_t total);
  void add_row(std::int64_t token, SampledRows& rows);

  Model model_;
  std::mt19937_64 random_;
  Stream prefill_;
  Stream decode_;
  bool window_next_ = false;
};

}  // namespace diffkv::replay
