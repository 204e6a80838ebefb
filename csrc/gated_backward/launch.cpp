// Checks and plan of the backward of a gated activation. Host code only, compiled once.
#include "gated_backward/launch.h"

#include "infuse/check.h"

namespace infuse::gated_backward {
namespace {

void check_like(const TensorArg& tensor, const TensorArg& dout, std::int64_t columns) {
  check_dtype(kOp, tensor, dout.dtype);
  check_same_device(kOp, tensor, dout);
  const std::int64_t expected[2] = {dout.sizes[0], columns};
  check(tensor.num_dims == 2 && tensor.sizes[0] == expected[0] && tensor.sizes[1] == columns, kOp, "shape of ",
        tensor.name, ", got ", shape_text(tensor), ", expected ", shape_text(expected, 2));
  check_last_stride(kOp, tensor);
}

void check_arguments(const Arguments& a) {
  const TensorArg& dout = a.dout;
  check(dout.dtype == DType::kBFloat16 || dout.dtype == DType::kFloat16, kOp, "dtype of dout, got ", name(dout.dtype),
        ", expected bfloat16 or float16");
  check(dout.num_dims == 2, kOp, "dimensions of dout, got ", dout.num_dims, ", expected 2");
  check_last_stride(kOp, dout);
  check_like(a.gate_up, dout, 2 * dout.sizes[1]);
  check_like(a.dgate_up, dout, 2 * dout.sizes[1]);
  check_contiguous(kOp, a.dgate_up);
  if (a.out != nullptr) {
    check_like(*a.out, dout, dout.sizes[1]);
    check_contiguous(kOp, *a.out);
  }
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
}

int alignment_of_rows(const TensorArg& tensor) {
  RowMap rows;
  rows.stride[0] = tensor.strides[0];
  return alignment_bytes(tensor, rows, tensor.sizes[0]);
}

}  // namespace

void launch(const Arguments& a, cudaStream_t stream) {
  check_arguments(a);
  const std::int64_t rows = a.dout.sizes[0], dim = a.dout.sizes[1];
  if (rows == 0 || dim == 0) return;
  int alignment = kVectorBytes;
  for (const TensorArg* tensor : {&a.dout, &a.gate_up, &a.dgate_up, a.out}) {
    if (tensor != nullptr) alignment = smaller(alignment, alignment_of_rows(*tensor));
  }
  const Plan plan = make_plan(rows, dim, alignment, static_cast<int>(a.config));
  check(plan.vecs <= kMaxRows, kOp, "vectors of dout, got ", plan.vecs, ", expected at most ", kMaxRows);
  Params params{};
  params.dout = a.dout.data;
  params.gate_up = a.gate_up.data;
  params.dgate_up = a.dgate_up.data;
  params.out = a.out == nullptr ? nullptr : a.out->data;
  params.dout_stride = a.dout.strides[0];
  params.gate_up_stride = a.gate_up.strides[0];
  params.dim = static_cast<std::uint32_t>(dim);
  params.vecs = static_cast<std::uint32_t>(plan.vecs);
  params.row_vecs = FastDivisor(static_cast<std::uint32_t>(dim / plan.elems));
  params.activation = a.activation;
  if (a.dout.dtype == DType::kBFloat16) {
    launch_planned<DType::kBFloat16>(plan, params, a.dout.device, stream);
  } else {
    launch_planned<DType::kFloat16>(plan, params, a.dout.device, stream);
  }
}

}  // namespace infuse::gated_backward
