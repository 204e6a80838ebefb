// Checks, plan and choice of dtypes for the norms. Host code only, compiled once and not per architecture.
#include "norm/launch.h"

#include <array>

#include "dispatch.h"
#include "infuse/check.h"

namespace infuse::norm {
namespace {

// x's dtype, or behind a cast the widest of x, weight and bias; a gate behind the norm brings x's dtype back.
DType expected_out(const Tensors& tensors, const Formula& formula) {
  if (!formula.cast_before_weight || formula.operand == Operand::kGateBehindNorm) return tensors.x->dtype;
  for (const TensorArg* vector : {tensors.weight, tensors.bias}) {
    if (vector != nullptr && vector->dtype == DType::kFloat32) return DType::kFloat32;
  }
  return tensors.x->dtype;
}

void check_like_x(const char* op, const TensorArg& tensor, const TensorArg& x, DType dtype) {
  check_dtype(op, tensor, dtype);
  check_same_device(op, tensor, x);
  check_same_shape(op, tensor, x);
  check_last_stride(op, tensor);
}

void check_statistics(const char* op, const TensorArg& tensor, const TensorArg& x, std::int64_t rows) {
  check_dtype(op, tensor, DType::kFloat32);
  check_same_device(op, tensor, x);
  check_contiguous(op, tensor);
  std::int64_t elements = 1;
  for (int i = 0; i < tensor.num_dims; ++i) elements *= tensor.sizes[i];
  check(elements == rows, op, "elements of ", tensor.name, ", got ", elements, ", expected one a row, ", rows);
}

void check_arguments(const char* op, const Tensors& tensors, const Formula& formula, std::int64_t config) {
  const TensorArg& x = *tensors.x;
  check(config >= kHeuristic && config < kNumConfigs, op, "config, got ", config, ", expected -1 to ",
        kNumConfigs - 1);
  check_num_dims(op, x);
  check_last_stride(op, x);
  check(!formula.cast_before_weight || formula.weight_offset == 0.0, op, "weight_offset with cast_before_weight, got ",
        formula.weight_offset, ", expected 0");
  const std::int64_t dim = x.sizes[x.num_dims - 1];
  check(formula.groups >= 1 && dim % formula.groups == 0, op, "groups, got ", formula.groups,
        ", expected a divisor of the last dimension, ", dim);
  for (const TensorArg* vector : {tensors.weight, tensors.bias}) {
    if (vector != nullptr) check_weight(op, *vector, x);
  }
  if (tensors.weight != nullptr && tensors.bias != nullptr) {
    check_dtype(op, *tensors.bias, tensors.weight->dtype);
  }
  check_like_x(op, *tensors.out, x, expected_out(tensors, formula));
  check_rows_apart(op, *tensors.out);
  if (tensors.operand != nullptr) check_like_x(op, *tensors.operand, x, x.dtype);
  if (tensors.sum != nullptr) {
    check_like_x(op, *tensors.sum, x, x.dtype);
    check_contiguous(op, *tensors.sum);
  }
  for (const TensorArg* statistic : {tensors.mean, tensors.rstd}) {
    if (statistic != nullptr) check_statistics(op, *statistic, x, count_rows(x) * formula.groups);
  }
}

// A tensor [..., groups * dim] as [..., groups, dim].
class Grouped {
 public:
  Grouped(const TensorArg& tensor, std::int64_t groups) : arg_(tensor) {
    const int last = tensor.num_dims - 1;
    if (groups == 1) return;
    for (int i = 0; i < last; ++i) {
      sizes_[i] = tensor.sizes[i];
      strides_[i] = tensor.strides[i];
    }
    sizes_[last] = groups;
    sizes_[last + 1] = strides_[last] = tensor.sizes[last] / groups;
    strides_[last + 1] = 1;
    arg_.num_dims = last + 2;
    arg_.sizes = sizes_.data();
    arg_.strides = strides_.data();
  }
  Grouped(const Grouped&) = delete;
  const TensorArg& arg() const { return arg_; }

 private:
  TensorArg arg_;
  std::array<std::int64_t, kMaxDims + 1> sizes_, strides_;
};

// The map of a tensor's rows, and how they may be accessed.
Rows map_tensor(const char* op, const TensorArg& tensor, const Formula& formula, std::int64_t rows, Access* access) {
  const Grouped grouped(tensor, formula.groups);
  const Rows mapped{tensor.data, map_rows(op, grouped.arg())};
  *access = {size_bytes(tensor.dtype), alignment_bytes(tensor, mapped.map, rows)};
  return mapped;
}

// Of a tensor whose rows are contiguous.
Access access_contiguous(const TensorArg* tensor, std::int64_t rows, std::int64_t dim) {
  if (tensor == nullptr) return {};
  RowMap map;
  map.stride[0] = dim;
  return {size_bytes(tensor->dtype), alignment_bytes(*tensor, map, rows)};
}

Device describe(const char* op, int device) {
  Device description{};
  check_cuda(cudaDeviceGetAttribute(&description.num_sms, cudaDevAttrMultiProcessorCount, device), op, "number of SMs");
  check_cuda(cudaDeviceGetAttribute(&description.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op,
             "shared memory");
  description.max_shared_bytes -= kStaticSharedBytes;
  return description;
}

const void* data_of(const TensorArg* tensor) { return tensor != nullptr ? tensor->data : nullptr; }
void* written_data_of(const TensorArg* tensor) { return tensor != nullptr ? tensor->data : nullptr; }

}  // namespace

void launch(const Target& target, const Tensors& tensors, const Formula& formula, std::int64_t config) {
  const char* op = target.op;
  check_arguments(op, tensors, formula, config);
  const TensorArg& x = *tensors.x;
  const std::int64_t dim = x.sizes[x.num_dims - 1] / formula.groups;
  const std::int64_t rows = count_rows(x) * formula.groups;
  if (rows == 0 || dim == 0) return;
  check(rows <= kMaxRows, op, "rows of x, got ", rows, ", expected at most ", kMaxRows);
  check(dim <= kMaxRows, op, "last dimension of x, got ", dim, ", expected at most ", kMaxRows);

  Problem problem{};
  problem.rows = rows;
  problem.dim = dim;
  problem.operand = formula.operand;
  problem.center = formula.center;
  Params params{};
  params.x = map_tensor(op, x, formula, rows, &problem.x);
  params.out = map_tensor(op, *tensors.out, formula, rows, &problem.others[0]);
  if (tensors.operand != nullptr) {
    params.operand = map_tensor(op, *tensors.operand, formula, rows, &problem.others[1]);
  }
  problem.others[2] = access_contiguous(tensors.sum, rows, dim);
  problem.others[3] = access_contiguous(tensors.weight, formula.groups, dim);
  problem.others[4] = access_contiguous(tensors.bias, formula.groups, dim);
  params.sum = written_data_of(tensors.sum);
  params.weight = data_of(tensors.weight);
  params.bias = data_of(tensors.bias);
  params.mean = static_cast<float*>(written_data_of(tensors.mean));
  params.rstd = static_cast<float*>(written_data_of(tensors.rstd));
  params.rows = static_cast<std::uint32_t>(rows);
  params.dim = static_cast<std::uint32_t>(dim);
  params.groups = FastDivisor(static_cast<std::uint32_t>(formula.groups));
  params.inv_dim = static_cast<float>(1.0 / static_cast<double>(dim));
  params.sum_scale = 1.0f;
  while (params.sum_scale * static_cast<float>(dim) > 1.0f) params.sum_scale /= 2;
  params.scaled_dim = params.sum_scale * static_cast<float>(dim);
  params.eps = static_cast<float>(formula.eps);
  params.weight_offset = tensors.weight != nullptr ? static_cast<float>(formula.weight_offset) : 1.0f;
  params.eps_as_minimum = formula.eps_as_minimum;
  // Where nothing follows it, the cast is the last rounding anyway.
  params.cast_before_weight = formula.cast_before_weight && (tensors.weight != nullptr || tensors.bias != nullptr ||
                                                             formula.operand == Operand::kGateBehindNorm);
  params.out_is_fp32 = tensors.out->dtype == DType::kFloat32;
  params.cast_before_gate = formula.cast_before_gate;
  params.gate_is_silu = formula.gate_is_silu;

  const Plan plan = make_plan(problem, static_cast<int>(config), describe(op, target.device));
  params.row_vecs = static_cast<std::uint32_t>(dim / plan.vec_elems);
  params.lets_next_start = plan.lets_next_start;
  params.thread_vecs = static_cast<std::uint32_t>(plan.vecs_per_thread);
  const TensorArg* vector = tensors.weight != nullptr ? tensors.weight : tensors.bias;
  const bool wide_weight = vector != nullptr && vector->dtype == DType::kFloat32;
  dispatch_dtype(op, "x", x.dtype, [&](auto dtype) {
    constexpr DType kX = decltype(dtype)::value;
    if (wide_weight) {
      launch_planned<kX, DType::kFloat32>(target, formula.operand, formula.center, plan, params);
    } else {
      launch_planned<kX, kX>(target, formula.operand, formula.center, plan, params);
    }
  });
}

}  // namespace infuse::norm
