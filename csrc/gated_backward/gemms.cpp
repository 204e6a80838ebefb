// Checks of the GEMMs of a gated MLP's backward. Host code only, compiled once.
#include "gated_backward/gemms.h"

#include "infuse/access.h"
#include "infuse/check.h"
#include "infuse/rows.h"

namespace infuse::gated_backward {
namespace {

constexpr char kPairOp[] = "linear_pair_out", kLinearGatedOp[] = "linear_gated_backward_out";

void check_matrix(const char* op, const TensorArg& tensor, const TensorArg& like, std::int64_t rows,
                  std::int64_t columns) {
  check_dtype(op, tensor, like.dtype);
  check_same_device(op, tensor, like);
  const std::int64_t expected[2] = {rows, columns};
  check(tensor.num_dims == 2 && tensor.sizes[0] == rows && tensor.sizes[1] == columns, op, "shape of ", tensor.name,
        ", got ", shape_text(tensor), ", expected ", shape_text(expected, 2));
  check_last_stride(op, tensor);
}

// The copy engine reads rows that begin at multiples of 16 bytes.
void check_rows(const char* op, const TensorArg& tensor) {
  check(reinterpret_cast<std::uintptr_t>(tensor.data) % kVectorBytes == 0, op, "address of ", tensor.name,
        ", got one that is no multiple of 16, expected one that is");
  const std::int64_t step = kVectorBytes / size_bytes(tensor.dtype);
  check(tensor.sizes[0] <= 1 || (tensor.strides[0] > 0 && tensor.strides[0] % step == 0), op,
        "stride of dimension 0 of ", tensor.name, ", got ", tensor.strides[0], ", expected a positive multiple of ",
        step);
}

void check_operands(const char* op, const Operands& operands) {
  const TensorArg& a = operands.a;
  check(a.dtype == DType::kBFloat16 || a.dtype == DType::kFloat16, op, "dtype of ", a.name, ", got ", name(a.dtype),
        ", expected bfloat16 or float16");
  check(a.num_dims == 2, op, "dimensions of ", a.name, ", got ", a.num_dims, ", expected 2");
  check_last_stride(op, a);
  const TensorArg& first = operands.b[0];
  check(first.num_dims == 2, op, "dimensions of ", first.name, ", got ", first.num_dims, ", expected 2");
  const std::int64_t depth = a.sizes[1] / operands.count, columns = first.sizes[1];
  check(depth * operands.count == a.sizes[1] && depth > 0 && depth % 8 == 0 && columns % 8 == 0, op, "sizes of ",
        a.name, " and ", first.name, ", got ", a.sizes[1], " and ", columns, " columns, expected multiples of ",
        8 * operands.count, " and 8, the first above 0");
  for (int i = 0; i < operands.count; ++i) check_matrix(op, operands.b[i], a, depth, columns);
  check(a.sizes[0] <= kMaxRows && 2 * columns <= kMaxRows && a.sizes[1] <= kMaxRows, op, "sizes, got ", a.sizes[0],
        ", ", columns, " and ", a.sizes[1], ", expected less than 2^30");
}

GemmProblem make_problem(const char* op, const Operands& operands, std::int64_t config) {
  check(config >= kGemmHeuristic && config < kNumGemmConfigs, op, "config, got ", config, ", expected -1 to ",
        kNumGemmConfigs - 1);
  GemmProblem problem{};
  problem.dtype = operands.a.dtype;
  problem.device = operands.a.device;
  problem.rows = operands.a.sizes[0];
  problem.columns = operands.b[0].sizes[1];
  problem.depth = operands.a.sizes[1] / operands.count;
  problem.pairs = operands.count;
  problem.a = operands.a.data;
  problem.a_stride = operands.a.strides[0];
  for (int i = 0; i < operands.count; ++i) {
    problem.b[i] = operands.b[i].data;
    problem.b_stride[i] = operands.b[i].strides[0];
  }
  problem.config = kGemmConfigs[config == kGemmHeuristic ? 0 : config];
  return problem;
}

void launch(const char* op, const GemmProblem& problem, cudaStream_t stream) {
  check(has_wgmma(problem.device), op, "device, got one of other than compute capability 9.0, or a library without ",
        "9.0a, expected both");
  if (problem.dtype == DType::kBFloat16) {
    launch_wgmma<DType::kBFloat16>(problem, stream);
  } else {
    launch_wgmma<DType::kFloat16>(problem, stream);
  }
}

}  // namespace

void launch_pair(const PairArguments& a, cudaStream_t stream) {
  check_operands(kPairOp, a.operands);
  GemmProblem problem = make_problem(kPairOp, a.operands, a.config);
  check_matrix(kPairOp, a.dx, a.operands.a, problem.rows, problem.columns);
  check_contiguous(kPairOp, a.dx);
  if (problem.rows == 0 || problem.columns == 0) return;
  const Operands& operands = a.operands;
  for (const TensorArg* tensor : {&operands.a, &operands.b[0], &operands.b[1], &a.dx}) check_rows(kPairOp, *tensor);
  problem.dx = a.dx.data;
  launch(kPairOp, problem, stream);
}

void launch_linear_gated(const LinearGatedArguments& a, cudaStream_t stream) {
  constexpr auto kOp = kLinearGatedOp;
  check_operands(kOp, a.operands);
  GemmProblem problem = make_problem(kOp, a.operands, a.config);
  check_matrix(kOp, a.gate_up, a.operands.a, problem.rows, 2 * problem.columns);
  check_matrix(kOp, a.dgate_up, a.operands.a, problem.rows, 2 * problem.columns);
  check_contiguous(kOp, a.dgate_up);
  if (a.out != nullptr) {
    check_matrix(kOp, *a.out, a.operands.a, problem.rows, problem.columns);
    check_contiguous(kOp, *a.out);
  }
  if (problem.rows == 0 || problem.columns == 0) return;
  for (const TensorArg* tensor : {&a.operands.a, &a.operands.b[0], &a.gate_up, &a.dgate_up, a.out}) {
    if (tensor != nullptr) check_rows(kOp, *tensor);
  }
  problem.gate_up = a.gate_up.data;
  problem.gate_up_stride = a.gate_up.strides[0];
  problem.dgate_up = a.dgate_up.data;
  problem.out = a.out == nullptr ? nullptr : a.out->data;
  problem.activation = a.activation;
  launch(kOp, problem, stream);
}

}  // namespace infuse::gated_backward
