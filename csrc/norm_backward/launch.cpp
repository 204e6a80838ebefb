// Checks, plan and choice of dtypes for the norms' backward. Host code only, compiled once and not per architecture.
#include "norm_backward/launch.h"

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

void check_statistics(const TensorArg& statistics, const TensorArg& x) {
  check_dtype(kOp, statistics, DType::kFloat32);
  check_same_device(kOp, statistics, x);
  bool same = statistics.num_dims == x.num_dims - 1;
  for (int i = 0; same && i < statistics.num_dims; ++i) same = statistics.sizes[i] == x.sizes[i];
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
  check_like_x(*arguments.dy, x);
  if (arguments.dsum != nullptr) check_like_x(*arguments.dsum, x);
  if (arguments.weight != nullptr) check_weight(kOp, *arguments.weight, x);
  if (arguments.bias != nullptr) check_weight(kOp, *arguments.bias, x);
  check(arguments.bias == nullptr || arguments.mean != nullptr, kOp, "bias, got one without mean, expected none");
  if (arguments.mean != nullptr) check_statistics(*arguments.mean, x);
  check_statistics(*arguments.rstd, x);
  check(count_rows(x) <= kMaxRows, kOp, "rows of x, got ", count_rows(x), ", expected at most ", kMaxRows);
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  check(dim <= kMaxRows, kOp, "last dimension of x, got ", dim, ", expected at most ", kMaxRows);
}

Device describe(int device) {
  Device found{};
  check_cuda(cudaDeviceGetAttribute(&found.num_sms, cudaDevAttrMultiProcessorCount, device), kOp, "number of SMs");
  check_cuda(cudaDeviceGetAttribute(&found.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory of a CTA");
  found.max_shared_bytes -= 1024;  // the kernels' static shared memory
  return found;
}

// Fills in what a row tensor of x's shape adds to the parameters and to the problem.
void add_rows(const TensorArg& tensor, std::int64_t num_rows, const void** data, RowMap* rows, Problem* problem) {
  *data = tensor.data;
  *rows = map_rows(kOp, tensor);
  problem->alignment_bytes = smaller(problem->alignment_bytes, alignment_bytes(tensor, *rows, num_rows));
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
  problem.has_dsum = arguments.dsum != nullptr;
  problem.centered = arguments.mean != nullptr;
  add_rows(x, rows, &params.x, &params.x_rows, &problem);
  add_rows(*arguments.dy, rows, &params.dy, &params.dy_rows, &problem);
  if (arguments.dsum != nullptr) add_rows(*arguments.dsum, rows, &params.dsum, &params.dsum_rows, &problem);
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

  const Device device = describe(x.device);
  const Plan plan = make_plan(problem, static_cast<int>(arguments.config), device);
  prepared.plan = plan;
  prepared.num_sms = device.num_sms;
  params.row_vecs = static_cast<std::uint32_t>(dim / plan.vec_elems);
  params.stages = static_cast<std::uint32_t>(kConfigs[plan.config].stages);
  prepared.max_parts = max_parts(plan, problem, device);
  const int gradients = (arguments.weight != nullptr ? 1 : 0) + (arguments.bias != nullptr ? 1 : 0);
  prepared.workspace_floats = gradients * prepared.max_parts * dim + (plan.vecs_per_thread == 0 ? 2 * rows : 0);
  return prepared;
}

void launch(Prepared prepared, float* workspace, void* dx, void* dweight, void* dbias, cudaStream_t stream) {
  Params& params = prepared.params;
  if (params.dim == 0) return;
  params.dx = dx;
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
