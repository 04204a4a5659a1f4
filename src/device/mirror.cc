#include "device/mirror.h"

#include <stdexcept>
#include <utility>

namespace diffkv::device {
namespace {

constexpr std::int64_t kAlignment = 64;

}  // namespace

void Mirror::add(void* data, std::int64_t bytes) {
  if (on_host()) return;
  const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data) % kAlignment);
  Memory memory(*backend_, bytes + past, device_);
  std::byte* device = memory.data() + past;
  ranges_.push_back({static_cast<std::byte*>(data), bytes, std::move(memory), device});
}

const Mirror::Range& Mirror::range_of(const void* data) const {
  const auto* at = static_cast<const std::byte*>(data);
  for (const Range& range : ranges_) {
    // A tensor of no elements may start where its memory ends.
    if (at >= range.host && at <= range.host + range.bytes) return range;
  }
  throw std::logic_error("a tensor lies in memory that its mirror does not have");
}

std::byte* Mirror::address(const void* data) const {
  const Range& range = range_of(data);
  return range.device + (static_cast<const std::byte*>(data) - range.host);
}

void Mirror::upload(Stream stream) const {
  for (const Range& range : ranges_) upload(range.host, range.bytes, stream);
}

void Mirror::upload(const void* data, std::int64_t bytes, Stream stream) const {
  if (on_host()) return;
  backend_->copy_to_device(address(data), data, bytes, device_, stream);
}

void Mirror::download(Stream stream) const {
  if (on_host()) return;
  for (const Range& range : ranges_) {
    backend_->copy_to_host(range.host, range.device, range.bytes, device_, stream);
  }
  backend_->synchronize(device_, stream);
}

void Mirror::download(void* data, std::int64_t bytes, Stream stream) const {
  if (on_host()) return;
  backend_->copy_to_host(data, address(data), bytes, device_, stream);
  backend_->synchronize(device_, stream);
}

TensorView Mirror::on_device(TensorView view) const {
  if (on_host() || !view.given()) return view;
  view.data = address(view.data);
  view.device = device_;
  return view;
}

ConstTensorView Mirror::on_device(ConstTensorView view) const {
  if (on_host() || !view.given()) return view;
  view.data = address(view.data);
  view.device = device_;
  return view;
}

KvCacheView Mirror::on_device(KvCacheView cache) const {
  if (on_host()) return cache;
  cache.key.data = address(cache.key.data);
  cache.value.data = address(cache.value.data);
  cache.k_scale = on_device(cache.k_scale);
  cache.v_scale = on_device(cache.v_scale);
  cache.device = device_;
  return cache;
}

Batch Mirror::on_device(Batch batch) const {
  for (ConstTensorView* view :
       {&batch.query_start_loc, &batch.seq_lens, &batch.block_table, &batch.kv_start,
        &batch.causal_per_seq, &batch.prefix_lens, &batch.mm_ranges}) {
    *view = on_device(*view);
  }
  return batch;
}

AttentionParams Mirror::on_device(AttentionParams params) const {
  for (ConstTensorView* view :
       {&params.alibi_slopes, &params.qq_bias, &params.sinks, &params.q_scale, &params.output_scale,
        &params.output_block_scale}) {
    *view = on_device(*view);
  }
  return params;
}

AttendArgs Mirror::on_device(AttendArgs args) const {
  args.query = on_device(args.query);
  args.cache = on_device(args.cache);
  args.batch = on_device(args.batch);
  args.output = on_device(args.output);
  args.lse = on_device(args.lse);
  return args;
}

}  // namespace diffkv::device
