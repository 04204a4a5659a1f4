// Every rule about what callers pass, once. All functions throw Error with what was passed, what
// was expected and where, and touch no memory but the host-side index tensors they check.
#pragma once

#include <cstdint>
#include <string_view>

#include "diffkv/attention.h"
#include "diffkv/backend.h"
#include "diffkv/batch.h"
#include "diffkv/cache.h"
#include "diffkv/plan.h"

namespace diffkv::core {

// Head counts and sizes, dtypes, mask combinations.
void validate_key(const PlanKey& key);

// Non-negative maxima that int32 arithmetic can hold.
void validate_maxima(const PlanKey& key, const PlanMaxima& maxima);

// Pointers, dtypes, alignment of rows, scales. `what` names the view in messages.
void validate_cache(const KvCacheView& cache);

// Shapes and dtypes of the batch's tensors against the key and maxima; where they are on the host
// also their values: query_start_loc, seq_lens, and that optional tensors are there exactly where
// the key says so. Not the block table: whether its ids are in range depends on the cache.
void validate_batch(const PlanKey& key, const PlanMaxima& maxima, const Batch& batch);

// A workspace that make_plan may use.
void validate_workspace(const TensorView& workspace, std::int64_t bytes, const Device& device);

void validate_update_cache(const ConstTensorView& key, const ConstTensorView& value,
                           const KvCacheView& cache, const ConstTensorView& slot_mapping);

// Everything about a call of attend, including that the plan was made for this batch (the lengths
// it recorded, on the host) and key, and that block ids of visible pages are in the pool.
void validate_attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan);

void validate_merge(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                    const TensorView& output, const TensorView& lse);

void validate_output(const TensorView& output);  // of fill_zero

// Tensors that a backend is given are on its kind of device. `what` stands for all of them; the
// other rules hold a call's tensors on one device.
void validate_device(const Backend& backend, std::string_view what, const Device& device);

// The batch is the one that the plan was made for: counts, and on the host lengths and masks.
void validate_planned(const Batch& batch, const Plan& plan);

// A cache and an output of a layer with that key.
void validate_cache_of(const PlanKey& key, const KvCacheView& cache);
void validate_output_of(const PlanKey& key, const TensorView& output, DType output_dtype);

// A hash of causal_per_seq, prefix_lens and mm_ranges; 0 where they are not on the host.
std::uint64_t mask_fingerprint(const Batch& batch);

// The same mask in the one way that equality knows: what is off is 0, what does nothing is default.
PlanKey normalised(PlanKey key);

// Output type and output_scale against the query type.
void validate_output_dtype(const PlanKey& key, bool output_scale, DType output_dtype);

// A layer's constants against its key (before there is a batch).
void validate_params(const PlanKey& key, const AttentionParams& params, DType output_dtype);

}  // namespace diffkv::core
