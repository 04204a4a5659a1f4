// The spine: what happens in one step, stage by stage.
//
//   Batch -> validate -> plan -> update_cache -> attend (work -> partials) -> combine -> output
//
// make_plan, in plan/plan.cc, is the second stage; it runs once a step for all layers of one kind.
#include "core/validate.h"
#include "diffkv/attention.h"
#include "diffkv/backend.h"
#include "diffkv/plan.h"

namespace diffkv {

void update_cache(const Backend& backend, const ConstTensorView& key, const ConstTensorView& value,
                  const KvCacheView& cache, const ConstTensorView& slot_mapping, Stream stream) {
  core::validate_device(backend, "the cache", cache.device);
  core::validate_update_cache(key, value, cache, slot_mapping);
  backend.update_cache(key, value, cache, slot_mapping, stream);
}

void attend(const Backend& backend, const AttentionParams& params, const AttendArgs& args,
            const Plan& plan, Stream stream) {
  core::validate_device(backend, "the cache", args.cache.device);
  core::validate_attend(params, args, plan);
  if (backend.attend(params, args, plan, stream)) backend.combine(params, args, plan, stream);
}

void merge_attn_states(const Backend& backend, const AttnState& a, const AttnState& b,
                       const ConstTensorView& sinks, const TensorView& output,
                       const TensorView& lse, Stream stream) {
  core::validate_device(backend, "output", output.device);
  core::validate_merge(a, b, sinks, output, lse);
  backend.merge_attn_states(a, b, sinks, output, lse, stream);
}

void fill_zero(const Backend& backend, const TensorView& output, Stream stream) {
  core::validate_device(backend, "output", output.device);
  core::validate_output(output);
  backend.fill_zero(output, stream);
}

}  // namespace diffkv
