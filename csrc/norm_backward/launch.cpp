// Checks, plan and choice of dtypes for the norms' backward. Host code only, compiled once and not per architecture.
#include "norm_backward/launch.h"

#include <cmath>
#include <limits>

#include "dispatch.h"
#include "infuse/check.h"

namespace infuse::norm_backward {
namespace {

void check_like_x(const TensorArg& tensor, const TensorArg& x) {
  check_dtype(kOp, tensor, x.dtype);
  check_same_device(kOp, tensor, x);
  check_same_shape(kOp, tensor, x);
  check_last_stride(kOp, tensor);
}

// Of x's leading dimensions, and one of size 1 may follow.
void check_statistics(const TensorArg& statistics, const TensorArg& x) {
  check_dtype(kOp, statistics, DType::kFloat32);
  check_same_device(kOp, statistics, x);
  const int leading = x.num_dims - 1;
  bool same = statistics.num_dims == leading || (statistics.num_dims == leading + 1 && statistics.sizes[leading] == 1);
  for (int i = 0; same && i < leading; ++i) same = statistics.sizes[i] == x.sizes[i];
  check(same, kOp, "shape of ", statistics.name, ", got ", shape_text(statistics), ", expected ",
        shape_text(x.sizes, x.num_dims - 1));
  check_contiguous(kOp, statistics);
}

void check_arguments(const Arguments& arguments) {
  const TensorArg& x = *arguments.x;
  check(arguments.config >= kHeuristic && arguments.config < kNumConfigs, kOp, "config, got ", arguments.config,
        ", expected -1 to ", kNumConfigs - 1);
  check_num_dims(kOp, x);
  check_last_stride(kOp, x);
  for (const TensorArg* tensor : {arguments.dy[0], arguments.dy[1], arguments.dy[2], arguments.dsum, arguments.gate}) {
    if (tensor != nullptr) check_like_x(*tensor, x);
  }
  if (arguments.weight != nullptr) check_weight(kOp, *arguments.weight, x);
  if (arguments.bias != nullptr) check_weight(kOp, *arguments.bias, x);
  check(arguments.bias == nullptr || arguments.mean != nullptr, kOp, "bias, got one without mean, expected none");
  check(arguments.gate == nullptr || arguments.mean == nullptr, kOp, "gate, got one with mean, expected none");
  if (arguments.mean != nullptr) check_statistics(*arguments.mean, x);
  check_statistics(*arguments.rstd, x);
  check(count_rows(x) <= kMaxRows, kOp, "rows of x, got ", count_rows(x), ", expected at most ", kMaxRows);
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  check(dim <= kMaxRows, kOp, "last dimension of x, got ", dim, ", expected at most ", kMaxRows);
}

// A mean of squares below the minimum gives 1 / sqrt(minimum) but for the rounding of the two that computed it.
float constant_rstd(double minimum) {
  if (minimum <= 0.0) return std::numeric_limits<float>::infinity();
  return static_cast<float>((1.0 - 1e-6) / std::sqrt(minimum));
}

Device describe(int device) {
  Device found{};
  check_cuda(cudaDeviceGetAttribute(&found.num_sms, cudaDevAttrMultiProcessorCount, device), kOp, "number of SMs");
  check_cuda(cudaDeviceGetAttribute(&found.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory of a CTA");
  found.max_shared_bytes -= 1024;  // the kernels' static shared memory
  return found;
}

// Appends a tensor with rows, if it is there, to the parameters and to the problem.
void add_rows(const TensorArg* tensor, Params* params, Problem* problem) {
  if (tensor == nullptr) return;
  Rows& rows = params->tensors[params->num_tensors++];
  rows.data = tensor->data;
  rows.map = map_rows(kOp, *tensor);
  problem->alignment_bytes = smaller(problem->alignment_bytes, alignment_bytes(*tensor, rows.map, problem->rows));
}

void add_all_rows(const Arguments& arguments, Params* params, Problem* problem) {
  for (const TensorArg* tensor : {arguments.x, arguments.dy[0], arguments.gate}) add_rows(tensor, params, problem);
  params->more_dy = params->num_tensors;
  for (int i = 1; i < kMaxDyTerms; ++i) add_rows(arguments.dy[i], params, problem);
  params->dsum = params->num_tensors;
  add_rows(arguments.dsum, params, problem);
  problem->num_tensors = static_cast<int>(params->num_tensors);
}

DType dtype_or_none(const TensorArg* tensor) { return tensor != nullptr ? tensor->dtype : DType::kNone; }

int launch_for_x(const Prepared& prepared, cudaStream_t stream) {
  int num_parts = 0;
  dispatch_dtype(kOp, "x", prepared.dtype, [&](auto dtype) {
    constexpr DType kX = decltype(dtype)::value;
    if (prepared.plan.vecs_per_thread == 0) {
      num_parts = launch_two_pass<kX>(prepared, stream);
    } else if (prepared.weight_dtype == DType::kFloat32) {
      num_parts = launch_ring<kX, DType::kFloat32>(prepared, stream);
    } else {
      num_parts = launch_ring<kX, kX>(prepared, stream);
    }
  });
  return num_parts;
}

}  // namespace

Prepared prepare(const Arguments& arguments) {
  check_arguments(arguments);
  const TensorArg& x = *arguments.x;
  const std::int64_t rows = count_rows(x), dim = x.sizes[x.num_dims - 1];
  Prepared prepared{};
  prepared.dtype = x.dtype;
  prepared.weight_dtype = dtype_or_none(arguments.weight);
  prepared.bias_dtype = dtype_or_none(arguments.bias);
  prepared.form = arguments.gate != nullptr   ? Form::kGatedRmsNorm
                  : arguments.mean != nullptr ? Form::kLayerNorm
                                              : Form::kRmsNorm;
  prepared.device = x.device;
  Params& params = prepared.params;
  params.rows = static_cast<std::uint32_t>(rows);
  params.dim = static_cast<std::uint32_t>(dim);
  if (rows == 0 || dim == 0) return prepared;

  Problem problem{};
  problem.rows = rows;
  problem.dim = dim;
  problem.size_bytes = size_bytes(x.dtype);
  problem.alignment_bytes = kVectorBytes;
  problem.form = prepared.form;
  add_all_rows(arguments, &params, &problem);
  if (arguments.weight != nullptr) {
    params.weight = arguments.weight->data;
    problem.weight_size_bytes = size_bytes(arguments.weight->dtype);
    problem.weight_alignment_bytes = alignment_bytes(*arguments.weight, RowMap{}, 1);
  }
  params.mean = arguments.mean != nullptr ? static_cast<const float*>(arguments.mean->data) : nullptr;
  params.rstd = static_cast<const float*>(arguments.rstd->data);
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(dim));
  params.weight_offset = arguments.weight != nullptr ? static_cast<float>(arguments.weight_offset) : 1.0f;
  params.weight_dtype = prepared.weight_dtype;
  params.constant_rstd = constant_rstd(arguments.minimum);
  params.gate_first = arguments.gate_first;
  params.gate_is_silu = arguments.gate_is_silu;

  const Device device = describe(x.device);
  const Plan plan = make_plan(problem, static_cast<int>(arguments.config), device);
  prepared.plan = plan;
  prepared.num_sms = device.num_sms;
  params.row_vecs = static_cast<std::uint32_t>(dim / plan.vec_elems);
  params.stages = static_cast<std::uint32_t>(kConfigs[plan.config].stages);
  params.late = kConfigs[plan.config].late;
  prepared.max_parts = max_parts(plan, problem, device);
  const int gradients = (arguments.weight != nullptr ? 1 : 0) + (arguments.bias != nullptr ? 1 : 0);
  prepared.workspace_floats = gradients * prepared.max_parts * dim + (plan.vecs_per_thread == 0 ? 2 * rows : 0);
  return prepared;
}

void launch(Prepared prepared, float* workspace, void* dx, void* dgate, void* dweight, void* dbias, cudaStream_t stream) {
  Params& params = prepared.params;
  if (params.dim == 0) return;
  params.dx = dx;
  params.dgate = prepared.form == Form::kGatedRmsNorm ? dgate : nullptr;
  const std::size_t part_floats = static_cast<std::size_t>(prepared.max_parts) * params.dim;
  SumPartsParams sums{};
  int count = 0;
  const auto add = [&](DType dtype, void* out, float** parts) {
    if (dtype == DType::kNone) return;
    *parts = workspace;
    workspace += part_floats;
    sums.parts[count] = *parts;
    sums.out[count] = out;
    sums.dtype[count++] = dtype;
  };
  add(prepared.weight_dtype, dweight, &params.weight_parts);
  add(prepared.bias_dtype, dbias, &params.bias_parts);
  params.row_means = workspace;

  sums.num_parts = params.rows == 0 ? 0 : static_cast<std::uint32_t>(launch_for_x(prepared, stream));
  sums.dim = params.dim;
  if (count > 0) launch_sum_parts(sums, count, prepared.device, stream);
}

}  // namespace infuse::norm_backward
