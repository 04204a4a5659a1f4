// The three classes: a thin layer over the stages.
#include "diffkv/layer.h"

#include <fmt/format.h>

#include "core/problem.h"
#include "core/validate.h"
#include "diffkv/error.h"

namespace diffkv {

namespace {

// What num_blocks pages of a good spec take. Throws Error.
std::int64_t cache_bytes(const KvCacheSpec& spec, std::int64_t num_blocks) {
  spec.check();
  std::int64_t bytes = 0;
  if (num_blocks < 0) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("num_blocks is {}, expected 0 or more", num_blocks));
  }
  if (__builtin_mul_overflow(spec.page_stride_bytes(), num_blocks, &bytes)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("num_blocks is {}, of {} bytes each: more bytes than int64 holds",
                            num_blocks, spec.page_stride_bytes()));
  }
  return bytes;
}

// Refuses a problem that the backend does not run.
void check_supported(const Backend& backend, const Problem& problem) {
  const Support support = backend.supports(problem);
  if (!support) core::refuse_problem(backend.name(), problem.key, support.reason);
}

}  // namespace

DiffKVBackend::DiffKVBackend(std::string_view backend) : compute_(&find_backend(backend)) {}

std::array<std::int64_t, 4> DiffKVBackend::get_kv_cache_shape(const KvCacheSpec& spec,
                                                              std::int64_t num_blocks) {
  cache_bytes(spec, num_blocks);  // for its checks
  return spec.shape(num_blocks);
}

std::array<std::int64_t, 4> DiffKVBackend::get_kv_cache_strides(const KvCacheSpec& spec) {
  spec.check();
  return spec.strides();
}

std::int64_t DiffKVBackend::get_kv_cache_bytes(const KvCacheSpec& spec, std::int64_t num_blocks) {
  return cache_bytes(spec, num_blocks);
}

const std::vector<DType>& DiffKVBackend::supported_dtypes() {
  static const std::vector<DType> dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3};
  return dtypes;
}

const std::vector<DType>& DiffKVBackend::supported_kv_cache_dtypes() {
  static const std::vector<DType> dtypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3,
                                            DType::kE5M2};
  return dtypes;
}

DiffKVMetadataBuilder::DiffKVMetadataBuilder(const DiffKVBackend& backend, const PlanKey& key,
                                             const PlanMaxima& maxima, Device device)
    : compute_(&backend.compute()),
      key_(core::normalised(key)),
      maxima_(maxima),
      builds_(std::make_shared<std::uint64_t>(0)) {
  core::validate_device(*compute_, "the builder", device);
  core::validate_key(key);
  maxima_.threads = compute_->limits(key_, maxima.threads).threads;
  const std::int64_t bytes = diffkv::workspace_bytes(*compute_, key_, maxima_);
  workspace_ = TensorView(compute_->allocate(bytes, device), DType::kU8, {bytes}, device);
}

DiffKVMetadataBuilder::~DiffKVMetadataBuilder() {
  ++*builds_;  // metadata that outlives its builder is stale
  compute_->deallocate(workspace_.data, workspace_.device);
}

DiffKVMetadata DiffKVMetadataBuilder::build(const Batch& batch, Stream stream) {
  DiffKVMetadata metadata;
  metadata.plan_ = make_plan(*compute_, key_, maxima_, batch, workspace_, stream);
  metadata.batch_ = batch;
  metadata.current_ = builds_;
  metadata.build_ = ++*builds_;
  return metadata;
}

DiffKVMetadata DiffKVMetadataBuilder::build_for_cudagraph_capture(const Batch& batch,
                                                                  Stream stream) {
  return build(batch, stream);
}

DiffKVAttention::DiffKVAttention(const DiffKVBackend& backend, const PlanKey& key,
                                 const AttentionParams& params, DType output_dtype)
    : compute_(&backend.compute()),
      key_(core::normalised(key)),
      params_(params),
      output_dtype_(output_dtype) {
  core::validate_key(key);
  core::validate_params(key, params, output_dtype);
  check_supported(*compute_, core::problem_of(key_, params, output_dtype));
}

void DiffKVAttention::do_kv_cache_update(const ConstTensorView& key, const ConstTensorView& value,
                                         const KvCacheView& cache,
                                         const ConstTensorView& slot_mapping, Stream stream) const {
  core::validate_cache_of(key_, cache);
  update_cache(*compute_, key, value, cache, slot_mapping, stream);
}

void DiffKVAttention::forward(const ForwardArgs& args, Stream stream) const {
  if (args.metadata == nullptr) {
    core::validate_output_of(key_, args.output, output_dtype_);
    fill_zero(*compute_, args.output, stream);
    return;
  }
  const DiffKVMetadata& metadata = *args.metadata;
  if (metadata.current_ == nullptr) {
    throw Error(ErrorCode::kInvalidArgument,
                "the metadata is empty, expected what DiffKVMetadataBuilder::build returned");
  }
  if (*metadata.current_ != metadata.build_) {
    throw Error(ErrorCode::kInvalidArgument,
                "the metadata is stale: its builder has built again since, or is gone");
  }
  if (metadata.plan_.key() != key_) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("the metadata was built for {}, the layer is {}",
                            to_string(metadata.plan_.key()), to_string(key_)));
  }
  if (args.output.dtype != output_dtype_) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("output is {}, the layer was built for {}",
                            to_string(args.output.dtype), to_string(output_dtype_)));
  }
  AttendArgs attend_args;
  attend_args.query = args.query;
  attend_args.batch = metadata.batch_;
  attend_args.output = args.output;
  attend_args.lse = args.lse;
  if (args.cache != nullptr) {
    attend_args.cache = *args.cache;
  } else {
    attend_args.cache = KvCacheView::dense_tokens(args.key, args.value);
    // Without starts of their own, keys lie where their sequence's queries do.
    if (!attend_args.batch.kv_start.given()) {
      attend_args.batch.kv_start = attend_args.batch.query_start_loc;
      attend_args.batch.kv_start.shape[0] = attend_args.batch.num_seqs;
    }
  }
  AttentionParams params = params_;
  if (args.qq_bias.given()) params.qq_bias = args.qq_bias;
  attend(*compute_, params, attend_args, metadata.plan_, stream);
}

}  // namespace diffkv
