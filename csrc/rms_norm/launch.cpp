// Checks, plan and choice of dtypes for RMSNorm forward. Host code only, compiled once and not per architecture.
#include "rms_norm/launch.h"

#include <string>

#include "dispatch.h"
#include "infuse/check.h"

namespace infuse::rms_norm {
namespace {

std::string shape_of(const std::int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// The largest power of two up to 16 that divides all row starts of a tensor, in bytes.
int alignment_bytes(const TensorArg& tensor, const RowMap& rows, std::int64_t num_rows) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor.data) | kVectorBytes;
  const int used = num_rows > 1 ? rows.num_dims : 0;
  for (int i = 0; i < used; ++i) bits |= static_cast<std::uint64_t>(rows.stride[i]) * size_bytes(tensor.dtype);
  return static_cast<int>(bits & (~bits + 1));
}

RowMap map_rows(const TensorArg& tensor, const char* what) {
  RowMap map;
  const int left = collapse_rows(tensor.sizes, tensor.strides, tensor.num_dims - 1, &map);
  check(left <= kMaxRowDims, kOp, "leading dimensions of ", what, " that can't be merged, got ", left, " (shape ",
        shape_of(tensor.sizes, tensor.num_dims), ", strides ", shape_of(tensor.strides, tensor.num_dims),
        "), expected at most ", kMaxRowDims);
  return map;
}

void check_last_stride(const TensorArg& tensor, const char* what) {
  const int last = tensor.num_dims - 1;
  check(tensor.sizes[last] <= 1 || tensor.strides[last] == 1, kOp, "stride of the last dimension of ", what, ", got ",
        tensor.strides[last], ", expected 1");
}

void check_arguments(const TensorArg& x, const TensorArg* weight, double weight_offset, bool cast_before_weight,
                     std::int64_t config, const TensorArg& out) {
  check(config >= kHeuristic && config < kNumConfigs, kOp, "config, got ", config, ", expected -1 to ",
        kNumConfigs - 1);
  check(x.num_dims >= 1 && x.num_dims <= kMaxDims, kOp, "dimensions of x, got ", x.num_dims, ", expected 1 to ",
        kMaxDims);
  check(!cast_before_weight || weight_offset == 0.0, kOp, "weight_offset with cast_before_weight, got ",
        weight_offset, ", expected 0");
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  DType expected_out = x.dtype;
  if (weight != nullptr) {
    check(weight->dtype == x.dtype || weight->dtype == DType::kFloat32, kOp, "dtype of weight, got ",
          name(weight->dtype), ", expected ", name(x.dtype), " (as x) or float32");
    check(weight->num_dims == 1 && weight->sizes[0] == dim, kOp, "shape of weight, got ",
          shape_of(weight->sizes, weight->num_dims), ", expected [", dim, "]");
    check_last_stride(*weight, "weight");
    check(weight->device == x.device, kOp, "device of weight, got cuda:", weight->device, ", expected cuda:",
          x.device, " (as x)");
    if (cast_before_weight) expected_out = weight->dtype;
  }
  check(out.dtype == expected_out, kOp, "dtype of out, got ", name(out.dtype), ", expected ", name(expected_out));
  check(out.device == x.device, kOp, "device of out, got cuda:", out.device, ", expected cuda:", x.device, " (as x)");
  bool same_shape = out.num_dims == x.num_dims;
  for (int i = 0; same_shape && i < x.num_dims; ++i) same_shape = out.sizes[i] == x.sizes[i];
  check(same_shape, kOp, "shape of out, got ", shape_of(out.sizes, out.num_dims), ", expected ",
        shape_of(x.sizes, x.num_dims));
  check_last_stride(x, "x");
  check_last_stride(out, "out");
  for (int i = 0; i + 1 < out.num_dims; ++i) {
    check(out.sizes[i] <= 1 || out.strides[i] != 0, kOp, "stride of dimension ", i,
          " of out, got 0, expected rows that do not overlap");
  }
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
  std::int64_t rows = 1;
  for (int i = 0; i + 1 < x.num_dims; ++i) rows *= x.sizes[i];
  if (rows == 0 || dim == 0) return;
  check(rows <= kMaxRows, kOp, "rows of x, got ", rows, ", expected at most ", kMaxRows);
  check(dim <= kMaxRows, kOp, "last dimension of x, got ", dim, ", expected at most ", kMaxRows);

  Params params{};
  params.x = x.data;
  params.weight = weight != nullptr ? weight->data : nullptr;
  params.out = out.data;
  params.x_rows = map_rows(x, "x");
  params.out_rows = map_rows(out, "out");
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
