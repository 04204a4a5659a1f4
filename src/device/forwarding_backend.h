// A backend that asks another for everything, to be changed in part.
#pragma once

#include <string>
#include <string_view>

#include "diffkv/backend.h"

namespace diffkv::device {

class ForwardingBackend : public Backend {
 public:
  // `base` must outlive it.
  explicit ForwardingBackend(const Backend& base) : base_(&base) {}

  const Backend& base() const { return *base_; }

  std::string_view name() const override { return base_->name(); }
  DeviceType device_type() const override { return base_->device_type(); }
  std::string description() const override { return base_->description(); }
  Support available() const override { return base_->available(); }
  Support supports(const Problem& problem) const override { return base_->supports(problem); }
  ScheduleLimits limits(const PlanKey& key, std::int32_t threads) const override {
    return base_->limits(key, threads);
  }
  void* allocate(std::int64_t bytes, const Device& device) const override {
    return base_->allocate(bytes, device);
  }
  void deallocate(void* data, const Device& device) const noexcept override {
    base_->deallocate(data, device);
  }
  void copy_to_device(void* to, const void* from, std::int64_t bytes, const Device& device,
                      Stream stream) const override {
    base_->copy_to_device(to, from, bytes, device, stream);
  }
  void copy_to_host(void* to, const void* from, std::int64_t bytes, const Device& device,
                    Stream stream) const override {
    base_->copy_to_host(to, from, bytes, device, stream);
  }
  void fill_bytes(void* data, std::uint8_t value, std::int64_t bytes, const Device& device,
                  Stream stream) const override {
    base_->fill_bytes(data, value, bytes, device, stream);
  }
  void synchronize(const Device& device, Stream stream) const override {
    base_->synchronize(device, stream);
  }
  void plan(const PlanKey& key, const ScheduleLimits& limits, const Batch& batch,
            detail::PlanTables& tables, Stream stream) const override {
    base_->plan(key, limits, batch, tables, stream);
  }
  void update_cache(const ConstTensorView& key, const ConstTensorView& value,
                    const KvCacheView& cache, const ConstTensorView& slot_mapping,
                    Stream stream) const override {
    base_->update_cache(key, value, cache, slot_mapping, stream);
  }
  bool attend(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
              Stream stream) const override {
    return base_->attend(params, args, plan, stream);
  }
  void combine(const AttentionParams& params, const AttendArgs& args, const Plan& plan,
               Stream stream) const override {
    base_->combine(params, args, plan, stream);
  }
  void merge_attn_states(const AttnState& a, const AttnState& b, const ConstTensorView& sinks,
                         const TensorView& output, const TensorView& lse,
                         Stream stream) const override {
    base_->merge_attn_states(a, b, sinks, output, lse, stream);
  }
  void fill_zero(const TensorView& output, Stream stream) const override {
    base_->fill_zero(output, stream);
  }

 private:
  const Backend* base_;
};

}  // namespace diffkv::device
