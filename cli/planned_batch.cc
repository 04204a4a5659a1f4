#include "cli/planned_batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "device/forwarding_backend.h"
#include "device/mirror.h"
#include "diffkv/error.h"

namespace diffkv::cli {
namespace {

// Tiles that a plan may have and still be listed in memory.
constexpr std::int64_t kMaxTiles = std::int64_t{1} << 24;

// Plans on the host for another backend's kernels. The tables are left to be filled.
class HostTwin final : public device::ForwardingBackend {
 public:
  HostTwin(const Backend& host, const Backend& planner)
      : ForwardingBackend(host), planner_(&planner) {}
  using Backend::limits;
  ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const override {
    return planner_->limits(key, threads);
  }
  void plan(const PlanKey&, const ScheduleLimits&, const Batch&, detail::PlanTables&,
            Stream) const override {}

 private:
  const Backend* planner_;
};

void refuse_too_many_tiles(const ScheduleLimits& limits, const PlanKey& key,
                           const std::vector<SeqLengths>& seqs) {
  std::int64_t least_rows = limits.classes[0].tile_rows;
  for (std::int32_t c = 1; c < limits.num_classes; ++c) {
    least_rows =
        std::min<std::int64_t>(least_rows, limits.classes[static_cast<std::size_t>(c)].tile_rows);
  }
  std::int64_t tiles = 0;
  for (const SeqLengths& seq : seqs) {
    tiles += (seq.query_len * key.group() / least_rows + 1) * key.num_kv_heads;
    if (tiles <= kMaxTiles) continue;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--seqs makes more than {} tiles, too many to list", kMaxTiles));
  }
}

}  // namespace

PlannedBatch::PlannedBatch(const Backend& backend, const PlanKey& key,
                           const std::vector<SeqLengths>& seqs, const MaskSpec& mask) {
  make_batch(key, seqs, mask);
  const std::int64_t bytes = diffkv::workspace_bytes(backend, key, maxima_);
  refuse_too_many_tiles(backend.limits(key), key, seqs);
  const Backend& host = find_backend("cpu");
  workspace_ = device::Memory(host, bytes);
  const TensorView view(workspace_.data(), DType::kU8, {bytes});
  if (device::computes_on_host(backend)) {
    plan_ = make_plan(backend, key, maxima_, batch_, view);
  } else {
    plan_ = make_plan(HostTwin(host, backend), key, maxima_, batch_, view);
    plan_on_device(backend, key);
  }
}

void PlannedBatch::make_batch(const PlanKey& key, const std::vector<SeqLengths>& seqs,
                              const MaskSpec& mask) {
  const std::size_t n = seqs.size();
  query_start_loc_ = {0};
  for (const SeqLengths& seq : seqs) {
    query_start_loc_.push_back(query_start_loc_.back() + seq.query_len);
    seq_lens_.push_back(seq.seq_len);
    maxima_.max_seq_len = std::max<std::int64_t>(maxima_.max_seq_len, seq.seq_len);
    batch_.max_query_len = std::max<std::int64_t>(batch_.max_query_len, seq.query_len);
  }
  batch_.num_seqs = static_cast<std::int64_t>(n);
  batch_.num_actual_tokens = query_start_loc_.back();
  batch_.query_start_loc = view_of(query_start_loc_.data(), {batch_.num_seqs + 1});
  batch_.seq_lens = view_of(seq_lens_.data(), {batch_.num_seqs});
  if (key.mask.prefix_window > 0) {
    prefix_lens_.assign(n, mask.prefix_len);
    batch_.prefix_lens = view_of(prefix_lens_.data(), {batch_.num_seqs});
  }
  if (key.causal_per_seq) {
    causal_ = std::make_unique<bool[]>(n);
    for (std::size_t s = 0; s < n; ++s) causal_[s] = mask.causal[s % mask.causal.size()];
    batch_.causal_per_seq = view_of(causal_.get(), {batch_.num_seqs});
  }
  if (key.mm_ranges) {
    for (std::size_t s = 0; s < n; ++s) {
      for (const PositionRange& range : mask.mm_ranges) {
        mm_ranges_.insert(mm_ranges_.end(), {range.first, range.last});
      }
    }
    maxima_.max_mm_ranges = std::ssize(mask.mm_ranges);
    batch_.mm_ranges = view_of(mm_ranges_.data(), {batch_.num_seqs, maxima_.max_mm_ranges, 2});
  }
  maxima_.max_seqs = batch_.num_seqs;
  maxima_.max_tokens = batch_.num_actual_tokens;
}

void PlannedBatch::plan_on_device(const Backend& backend, const PlanKey& key) {
  device::Mirror mirror(backend);
  for (auto* values : {&query_start_loc_, &seq_lens_, &prefix_lens_, &mm_ranges_}) {
    if (!values->empty()) mirror.add(values->data(), std::ssize(*values) * size_of(DType::kI32));
  }
  if (causal_) mirror.add(causal_.get(), batch_.num_seqs);
  mirror.upload();
  const device::Memory memory(backend, workspace_.bytes());
  // What the planner does not fill is the same in every run.
  memory.fill(0);
  make_plan(backend, key, maxima_, mirror.on_device(batch_),
            TensorView(memory.data(), DType::kU8, {memory.bytes()}, device::device_of(backend)));
  memory.download(workspace_.data(), workspace_.bytes());
  backend.synchronize(device::device_of(backend), {});
}

}  // namespace diffkv::cli
