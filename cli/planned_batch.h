// A batch of a command line, its plan, and the memory they live in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cli/batch_spec.h"
#include "device/memory.h"
#include "diffkv/backend.h"
#include "diffkv/batch.h"
#include "diffkv/plan.h"

namespace diffkv::cli {

// What a mask asks of a batch beyond lengths; the key says which of it is there.
struct MaskSpec {
  std::int32_t prefix_len = 0;           // of every sequence
  std::vector<bool> causal;              // of the sequences in turn, again from the first on
  std::vector<PositionRange> mm_ranges;  // of every sequence
};

class PlannedBatch {
 public:
  // Plans where the backend computes; the plan is then here, on the host. Throws Error if the
  // library refuses the batch or it makes too many tiles to list.
  PlannedBatch(const Backend& backend, const PlanKey& key, const std::vector<SeqLengths>& seqs,
               const MaskSpec& mask);
  PlannedBatch(const PlannedBatch&) = delete;
  PlannedBatch& operator=(const PlannedBatch&) = delete;

  const Batch& batch() const { return batch_; }
  const Plan& plan() const { return plan_; }
  std::int64_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  void make_batch(const PlanKey& key, const std::vector<SeqLengths>& seqs, const MaskSpec& mask);
  // Makes the plan in the backend's memory and copies it over the host's.
  void plan_on_device(const Backend& backend, const PlanKey& key);

  std::vector<std::int32_t> query_start_loc_;
  std::vector<std::int32_t> seq_lens_;
  std::vector<std::int32_t> prefix_lens_;
  std::vector<std::int32_t> mm_ranges_;
  std::unique_ptr<bool[]> causal_;
  Batch batch_;
  PlanMaxima maxima_;
  device::Memory workspace_;  // on the host
  Plan plan_;
};

}  // namespace diffkv::cli
