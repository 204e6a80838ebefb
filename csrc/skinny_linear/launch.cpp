// Checks, plan and choice of dtypes for linears of few rows. Host code only, compiled once.
#include "skinny_linear/launch.h"

#include "infuse/check.h"
#include "infuse/launch.h"
#include "norm/launch.h"

namespace infuse::skinny_linear {
namespace {

constexpr std::int64_t kMaxFeatures = (std::int64_t{1} << 31) - 1 - 2 * kMaxGroups * kGroupRows;
constexpr int kStaticSharedBytes = 1024;  // that a kernel declares itself, at most, and what the driver reserves

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp, "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes - kStaticSharedBytes, major == 9};
}

Activation activation_of(std::string_view name) {
  if (name.empty()) return Activation::kNone;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu_erf") return Activation::kGeluErf;
  fail(kOp, "activation, got ", std::string(name), ", expected silu, gelu_tanh, gelu_erf or an empty name");
}

void check_layout(const TensorArg& tensor, const TensorArg& x, std::int64_t rows, std::int64_t columns) {
  check_same_device(kOp, tensor, x);
  check(tensor.num_dims == 2 && tensor.sizes[0] == rows && tensor.sizes[1] == columns, kOp, "shape of ", tensor.name,
        ", got ", shape_text(tensor), ", expected [", rows, ", ", columns, "]");
  check_last_stride(kOp, tensor);
}

void check_matrix(const TensorArg& tensor, const TensorArg& x, std::int64_t rows, std::int64_t columns) {
  check_dtype(kOp, tensor, x.dtype);
  check_layout(tensor, x, rows, columns);
}

bool is_aligned_by_16(const TensorArg& tensor) {
  const bool rows = tensor.num_dims < 2 || tensor.sizes[0] <= 1 || tensor.strides[0] * size_bytes(tensor.dtype) % 16 == 0;
  return rows && reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
}

// What is read in pieces of 16 bytes; the copy engine knows no rows that are expanded.
void check_readable(const TensorArg& tensor) {
  check(is_aligned_by_16(tensor), kOp, "rows of ", tensor.name, ", got strides ",
        shape_text(tensor.strides, tensor.num_dims), " behind an address that ends in ",
        reinterpret_cast<std::uintptr_t>(tensor.data) % 16, ", expected multiples of 16 bytes");
  check(tensor.sizes[0] <= 1 || tensor.strides[0] > 0, kOp, "stride of the rows of ", tensor.name, ", got ",
        tensor.strides[0], ", expected one above 0");
}

void check_out(const TensorArg& out, const TensorArg& x, std::int64_t features) {
  check(out.dtype == x.dtype || out.dtype == DType::kFloat32, kOp, "dtype of ", out.name, ", got ", name(out.dtype),
        ", expected ", name(x.dtype), " or float32");
  check_layout(out, x, x.sizes[0], features);
  check_rows_apart(kOp, out);
}

void check_norm(const Arguments& a) {
  const TensorArg& x = *a.x;
  check(a.has_norm || (a.residual == nullptr && (a.norm_weight == nullptr || a.scaled != nullptr)), kOp,
        "residual or norm_weight, got one without a norm, expected none");
  check((a.residual == nullptr) == (a.sum == nullptr), kOp, "sum_out, expected one with a residual and none without");
  if (a.residual != nullptr) {
    check_matrix(*a.residual, x, x.sizes[0], x.sizes[1]);
    check_readable(*a.residual);
    check_matrix(*a.sum, x, x.sizes[0], x.sizes[1]);
    check_contiguous(kOp, *a.sum);
    check(is_aligned_by_16(*a.sum), kOp, "address of sum_out, expected a multiple of 16 bytes");
  }
  check(!a.cast_before_weight || a.weight_offset == 0.0, kOp, "weight_offset with cast_before_weight, got ",
        a.weight_offset, ", expected 0");
  if (a.norm_weight == nullptr || a.scaled != nullptr) return;
  check_weight(kOp, *a.norm_weight, x);
  check(is_aligned_by_16(*a.norm_weight), kOp, "address of norm_weight, expected a multiple of 16 bytes");
  check(!a.cast_before_weight || a.norm_weight->dtype == x.dtype, kOp, "dtype of norm_weight with cast_before_weight, got ",
        name(a.norm_weight->dtype), ", expected ", name(x.dtype));
}

// Returns the number of weights.
int check_linears(const Arguments& a, bool gated) {
  const TensorArg& x = *a.x;
  int count = 0;
  for (int i = 0; i < kMaxWeights; ++i) {
    const TensorArg* weight = a.weights[i];
    check(weight != nullptr || a.biases[i] == nullptr, kOp, "bias of weight ", i, ", got one without a weight");
    if (weight == nullptr) continue;
    check(count == i, kOp, "weights, got number ", i, " without those before it");
    ++count;
    check(weight->num_dims == 2, kOp, "dimensions of ", weight->name, ", got ", weight->num_dims, ", expected 2");
    const std::int64_t features = weight->sizes[0];
    check(features <= kMaxFeatures, kOp, "features of ", weight->name, ", got ", features, ", expected at most ",
          kMaxFeatures);
    check_matrix(*weight, x, features, x.sizes[1]);
    if (features > 0) check_readable(*weight);
    if (const TensorArg* bias = a.biases[i]) {
      check_dtype(kOp, *bias, x.dtype);
      check_same_device(kOp, *bias, x);
      check(bias->num_dims == 1 && bias->sizes[0] == features, kOp, "shape of ", bias->name, ", got ",
            shape_text(*bias), ", expected [", features, "]");
      check_last_stride(kOp, *bias);
    }
    const bool has_out = !gated || i == 0;
    check((a.outs[i] != nullptr) == has_out, kOp, "out", i, has_out ? ", got none" : ", got one, expected none");
    if (has_out) check_out(*a.outs[i], x, features);
  }
  check(!gated || (count == 2 && a.weights[1]->sizes[0] == a.weights[0]->sizes[0]), kOp,
        "weights of an activation, got ", count, ", expected two of one shape, gate and up");
  for (int i = count; i < kMaxWeights; ++i) check(a.outs[i] == nullptr, kOp, "out", i, ", got one, expected none");
  return count;
}

void check_squares(const TensorArg& squares, const TensorArg& x, std::int64_t features) {
  check_dtype(kOp, squares, DType::kFloat32);
  check_layout(squares, x, x.sizes[0], features / kSquaresWidth);
  check_contiguous(kOp, squares);
  check(is_aligned_by_16(squares), kOp, "address of ", squares.name, ", expected a multiple of 16 bytes");
}

// A norm that begins or ends in this launch.
void check_split_norm(const Arguments& a, const Plan& plan) {
  const TensorArg& x = *a.x;
  check((a.scaled == nullptr) == (a.squares_out == nullptr), kOp, "squares_out, expected one with scaled_out only");
  if (a.scaled == nullptr && a.squares == nullptr) return;
  check(!a.has_norm, kOp, "norm, got one beside half of another, expected none");
  check(plan.is_wgmma && plan.columns > kMaxKeptRows, kOp, "rows of x beside half a norm, got ", x.sizes[0],
        " on this device or in this configuration, expected ", kMaxKeptRows + 1, " to ", kMaxRows, " on one of 9.0");
  constexpr int kStep = 4 * kSquaresWidth;  // features whose sums of squares fill 16 bytes
  if (a.squares != nullptr) {
    check(x.sizes[1] % kStep == 0, kOp, "columns of x with squares, got ", x.sizes[1], ", expected a multiple of ", kStep);
    check_squares(*a.squares, x, x.sizes[1]);
  }
  if (a.scaled == nullptr) return;
  const std::int64_t features = a.weights[0]->sizes[0];
  check(a.weights[1] == nullptr && features % kStep == 0, kOp, "weights with scaled_out, expected one, of a multiple of ",
        kStep, " features");
  check_matrix(*a.scaled, x, x.sizes[0], features);
  check_contiguous(kOp, *a.scaled);
  check(is_aligned_by_16(*a.scaled), kOp, "address of scaled_out, expected a multiple of 16 bytes");
  check_squares(*a.squares_out, x, features);
  if (a.norm_weight == nullptr) return;
  check_dtype(kOp, *a.norm_weight, x.dtype);
  check_same_device(kOp, *a.norm_weight, x);
  check(a.norm_weight->num_dims == 1 && a.norm_weight->sizes[0] == features, kOp, "shape of norm_weight, got ",
        shape_text(*a.norm_weight), ", expected [", features, "]");
  check_last_stride(kOp, *a.norm_weight);
  check(is_aligned_by_16(*a.norm_weight), kOp, "address of norm_weight, expected a multiple of 16 bytes");
}

int check_arguments(const Arguments& a) {
  const TensorArg& x = *a.x;
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
  check(x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16, kOp, "dtype of x, got ", name(x.dtype),
        ", expected bfloat16 or float16");
  check(x.num_dims == 2, kOp, "dimensions of x, got ", x.num_dims, ", expected 2");
  check(x.sizes[0] <= kMaxRows, kOp, "rows of x, got ", x.sizes[0], ", expected at most ", kMaxRows);
  check(x.sizes[1] > 0 && x.sizes[1] % 8 == 0 && x.sizes[1] <= (std::int64_t{1} << 30), kOp,
        "last dimension of x, got ", x.sizes[1], ", expected a multiple of 8");
  check_last_stride(kOp, x);
  if (x.sizes[0] > 0) check_readable(x);
  check_norm(a);
  const int count = check_linears(a, !a.activation.empty());
  if (a.addend != nullptr) check_matrix(*a.addend, x, x.sizes[0], a.weights[0]->sizes[0]);
  return count;
}

Linear describe_linear(const Arguments& a, int i, const Plan& plan) {
  Linear linear{};
  linear.first_tile = static_cast<std::uint32_t>(plan.first_tile[i]);
  const TensorArg* weight = a.weights[i];
  if (weight == nullptr) return linear;
  linear.weight = weight->data;
  linear.weight_stride = weight->strides[0];
  linear.features = static_cast<std::uint32_t>(weight->sizes[0]);
  linear.is_wide = true;
  if (const TensorArg* out = a.outs[i]) {
    linear.out = out->data;
    linear.out_stride = out->strides[0];
    linear.is_wide = is_aligned_by_16(*out);
    linear.out_is_fp32 = out->dtype == DType::kFloat32;
  }
  if (const TensorArg* bias = a.biases[i]) {
    linear.bias = bias->data;
    linear.is_wide = linear.is_wide && is_aligned_by_16(*bias);
  }
  if (i == 0 && a.addend != nullptr) linear.is_wide = linear.is_wide && is_aligned_by_16(*a.addend);
  return linear;
}

Norm describe_norm(const Arguments& a) {
  Norm norm{};
  norm.exists = a.has_norm;
  if (a.residual != nullptr) {
    norm.residual = a.residual->data;
    norm.residual_stride = a.residual->strides[0];
    norm.sum = a.sum->data;
  }
  norm.weight = a.norm_weight != nullptr ? a.norm_weight->data : nullptr;
  norm.weight_is_fp32 = a.norm_weight != nullptr && a.norm_weight->dtype == DType::kFloat32;
  norm.eps = static_cast<float>(a.eps);
  norm.weight_offset = a.norm_weight != nullptr ? static_cast<float>(a.weight_offset) : 1.0f;
  norm.inv_dim = static_cast<float>(1.0 / static_cast<double>(a.x->sizes[1]));
  norm.cast_before_weight = a.cast_before_weight;
  norm.eps_as_minimum = a.eps_as_minimum;
  return norm;
}

SplitNorm describe_split_norm(const Arguments& a) {
  SplitNorm norm{};
  if (a.squares != nullptr) norm.squares = static_cast<const float*>(a.squares->data);
  if (a.scaled == nullptr) return norm;
  norm.scaled = a.scaled->data;
  norm.squares_out = static_cast<float*>(a.squares_out->data);
  return norm;
}

// The norm of rows that are too long for the kernel of this family.
void launch_long_norm(const Arguments& a, void* workspace, cudaStream_t stream) {
  const TensorArg& x = *a.x;
  const std::int64_t strides[2] = {x.sizes[1], 1};
  const TensorArg y{"y", workspace, x.dtype, x.device, 2, x.sizes, strides};
  norm::Tensors tensors{&x, a.norm_weight, nullptr, &y};
  tensors.operand = a.residual;
  tensors.sum = a.sum;
  norm::Formula formula{a.eps};
  formula.weight_offset = a.weight_offset;
  formula.operand = a.residual != nullptr ? norm::Operand::kResidual : norm::Operand::kNone;
  formula.eps_as_minimum = a.eps_as_minimum;
  formula.cast_before_weight = a.cast_before_weight;
  norm::launch({kOp, x.device, stream}, tensors, formula, norm::kHeuristic);
}

template <DType kDType>
void launch_kernels(const Arguments& arguments, Prepared& prepared, void* workspace, cudaStream_t stream) {
  Params& params = prepared.params;
  if (prepared.plan.norms_first) {
    if (prepared.plan.norm_bytes > 0) {
      launch_norm<kDType>(prepared.plan, params, workspace, prepared.device, stream);
    } else {
      launch_long_norm(arguments, workspace, stream);
    }
    params.x = workspace;
    params.x_stride = params.dim;
  }
  if (prepared.plan.tiles > 0) launch_planned<kDType>(prepared.plan, params, prepared.device, stream);
}

}  // namespace

Prepared prepare(const Arguments& a) {
  Prepared prepared;
  const int count = check_arguments(a);
  const TensorArg& x = *a.x;
  prepared.dtype = x.dtype;
  prepared.device = x.device;
  Problem problem{};
  problem.rows = x.sizes[0];
  problem.dim = x.sizes[1];
  problem.num_weights = count;
  std::int64_t features = 0;
  for (int i = 0; i < count; ++i) features += problem.features[i] = a.weights[i]->sizes[0];
  problem.is_gated = !a.activation.empty();
  problem.has_norm = a.has_norm;
  problem.norm_weight_is_fp32 = a.norm_weight != nullptr && a.norm_weight->dtype == DType::kFloat32;
  prepared.empty = problem.rows == 0 || (features == 0 && a.sum == nullptr);
  if (prepared.empty) return prepared;
  prepared.plan = make_plan(problem, static_cast<int>(a.config), describe(x.device));
  const Plan& plan = prepared.plan;
  check_split_norm(a, plan);
  if (plan.norms_first) prepared.workspace_elements = problem.rows * problem.dim;

  Params& params = prepared.params;
  params.x = x.data;
  params.x_stride = x.strides[0];
  if (a.addend != nullptr) {
    params.addend = a.addend->data;
    params.addend_stride = a.addend->strides[0];
  }
  for (int i = 0; i < kMaxWeights; ++i) params.linears[i] = describe_linear(a, i, plan);
  params.norm = describe_norm(a);
  params.split_norm = describe_split_norm(a);
  params.activation = activation_of(a.activation);
  params.rows = static_cast<std::uint32_t>(problem.rows);
  params.dim = static_cast<std::uint32_t>(problem.dim);
  params.tile_rows = static_cast<std::uint32_t>(plan.tile_rows);
  params.splits = static_cast<std::uint32_t>(plan.splits);
  params.column_groups = static_cast<std::uint32_t>(plan.column_groups);
  params.iterations = static_cast<std::uint32_t>(plan.iterations);
  params.blocks = static_cast<std::uint32_t>(plan.blocks);
  params.stages = static_cast<std::uint32_t>(plan.stages);
  params.stage_bytes = static_cast<std::uint32_t>(plan.stage_bytes);
  params.x_offset = static_cast<std::uint32_t>(plan.x_offset);
  params.kept_x_offset = static_cast<std::uint32_t>(plan.kept_x_offset);
  params.norm_weight_offset = static_cast<std::uint32_t>(plan.norm_weight_offset);
  params.barrier_offset = static_cast<std::uint32_t>(plan.barrier_offset);
  return prepared;
}

void launch(const Arguments& arguments, Prepared prepared, void* workspace, cudaStream_t stream) {
  if (prepared.empty) return;
  if (prepared.dtype == DType::kBFloat16) {
    launch_kernels<DType::kBFloat16>(arguments, prepared, workspace, stream);
  } else {
    launch_kernels<DType::kFloat16>(arguments, prepared, workspace, stream);
  }
}

}  // namespace infuse::skinny_linear
