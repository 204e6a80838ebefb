// Checks, plan and choice of dtypes for RMSNorm forward. Host code only, compiled once and not per architecture.
#include "rms_norm/launch.h"

#include "dispatch.h"
#include "infuse/check.h"

namespace infuse::rms_norm {
namespace {

void check_arguments(const TensorArg& x, const TensorArg* weight, double weight_offset, bool cast_before_weight,
                     std::int64_t config, const TensorArg& out) {
  check(config >= kHeuristic && config < kNumConfigs, kOp, "config, got ", config, ", expected -1 to ",
        kNumConfigs - 1);
  check_num_dims(kOp, x);
  check(!cast_before_weight || weight_offset == 0.0, kOp, "weight_offset with cast_before_weight, got ",
        weight_offset, ", expected 0");
  if (weight != nullptr) check_weight(kOp, *weight, x);
  check_dtype(kOp, out, weight != nullptr && cast_before_weight ? weight->dtype : x.dtype);
  check_same_device(kOp, out, x);
  check_same_shape(kOp, out, x);
  check_last_stride(kOp, x);
  check_last_stride(kOp, out);
  check_rows_apart(kOp, out);
}

template <DType kX>
void launch_for_x(const TensorArg* weight, const TensorArg& out, const Plan& plan, const Params& params, int device,
                  cudaStream_t stream) {
  constexpr DType kFloat32 = DType::kFloat32;
  const bool fp32_weight = weight != nullptr && weight->dtype == kFloat32;
  if constexpr (kX == kFloat32) {
    launch_planned<kX, kX, kX>(plan, params, device, stream);
  } else if (!fp32_weight) {
    launch_planned<kX, kX, kX>(plan, params, device, stream);
  } else if (out.dtype == kFloat32) {
    launch_planned<kX, kFloat32, kFloat32>(plan, params, device, stream);
  } else {
    launch_planned<kX, kFloat32, kX>(plan, params, device, stream);
  }
}

}  // namespace

void launch(const TensorArg& x, const TensorArg* weight, double eps, double weight_offset, bool cast_before_weight,
            std::int64_t config, const TensorArg& out, cudaStream_t stream) {
  check_arguments(x, weight, weight_offset, cast_before_weight, config, out);
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  const std::int64_t rows = count_rows(x);
  if (rows == 0 || dim == 0) return;
  check(rows <= kMaxRows, kOp, "rows of x, got ", rows, ", expected at most ", kMaxRows);
  check(dim <= kMaxRows, kOp, "last dimension of x, got ", dim, ", expected at most ", kMaxRows);

  Params params{};
  params.x = x.data;
  params.weight = weight != nullptr ? weight->data : nullptr;
  params.out = out.data;
  params.x_rows = map_rows(kOp, x);
  params.out_rows = map_rows(kOp, out);
  params.rows = static_cast<std::uint32_t>(rows);
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(dim));
  params.eps = static_cast<float>(eps);
  params.weight_offset = static_cast<float>(weight_offset);
  params.cast_before_weight = cast_before_weight;

  Problem problem{};
  problem.rows = rows;
  problem.dim = dim;
  problem.x_size_bytes = size_bytes(x.dtype);
  problem.x_alignment_bytes = alignment_bytes(x, params.x_rows, rows);
  problem.out_size_bytes = size_bytes(out.dtype);
  problem.out_alignment_bytes = alignment_bytes(out, params.out_rows, rows);
  if (weight != nullptr) {
    problem.weight_size_bytes = size_bytes(weight->dtype);
    problem.weight_alignment_bytes = alignment_bytes(*weight, RowMap{}, 1);
  }
  int num_sms = 0;
  check_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, x.device), kOp, "number of SMs");
  const Plan plan = make_plan(problem, static_cast<int>(config), num_sms);
  params.row_vecs = static_cast<std::uint32_t>(dim / plan.vec_elems);

  dispatch_dtype(kOp, "x", x.dtype, [&](auto dtype) {
    launch_for_x<decltype(dtype)::value>(weight, out, plan, params, x.device, stream);
  });
}

}  // namespace infuse::rms_norm
