#include "replay/row_image.h"

#include <algorithm>

#include "verify/codec.h"
#include "verify/reference.h"

namespace diffkv::replay {

RowImage::RowImage(const Source& source, const AttendArgs& host, const KvCacheSpec& spec,
                   std::int64_t token, std::int64_t head, std::int64_t first_key)
    : args_(host) {
  const verify::RowPlace place = verify::place_row(host.batch, token);
  copy_pages(source, spec, place.seq, first_key, place.position);
  copy_output(source, token, head);
  source.backend->synchronize(device::device_of(*source.backend), {});
}

void RowImage::copy_pages(const Source& source, const KvCacheSpec& spec, std::int64_t seq,
                          std::int64_t first_key, std::int64_t position) {
  const ConstTensorView& table = args_.batch.block_table;
  const std::int64_t page = spec.page_stride_bytes();
  const std::int64_t first = first_key / spec.block_size;
  const std::int64_t end = position / spec.block_size + 1;
  table_.assign(static_cast<std::size_t>(table.shape[1]), -1);
  pages_.assign(static_cast<std::size_t>((end - first) * page), std::byte{0xff});
  for (std::int64_t block = first; block < end; ++block) {
    table_[static_cast<std::size_t>(block)] = static_cast<std::int32_t>(block - first);
    source.cache->download(pages_.data() + (block - first) * page, page,
                           verify::index_at(table, seq, block) * page);
  }
  const KvCacheView stored = args_.cache;
  args_.cache = spec.view(pages_.data(), end - first);
  args_.cache.k_scale = stored.k_scale;
  args_.cache.v_scale = stored.v_scale;
  // Every sequence's row of the table is this one.
  args_.batch.block_table.data = table_.data();
  args_.batch.block_table.strides[0] = 0;
}

void RowImage::copy_output(const Source& source, std::int64_t token, std::int64_t head) {
  const auto at = [](const TensorView& view, std::int64_t i, std::int64_t j) {
    return static_cast<const std::byte*>(view.data) +
           (i * view.strides[0] + j * view.strides[1]) * size_of(view.dtype);
  };
  const TensorView& output = source.args.output;
  output_.resize(static_cast<std::size_t>(output.shape[2] * size_of(output.dtype)));
  source.backend->copy_to_host(output_.data(), at(output, token, head), std::ssize(output_),
                               output.device, {});
  source.backend->copy_to_host(&lse_, at(source.args.lse, head, token), sizeof(lse_),
                               source.args.lse.device, {});
  // Every token and head is this row.
  args_.output =
      TensorView(output_.data(), output.dtype, {output.shape[0], output.shape[1], output.shape[2]});
  args_.output.strides = {0, 0, 1, 0};
  args_.lse = view_of(&lse_, {source.args.lse.shape[0], source.args.lse.shape[1]});
  args_.lse.strides = {0, 0, 0, 0};
}

}  // namespace diffkv::replay
