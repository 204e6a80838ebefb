// Checks and choice of kernels for gated linears. Host code only, compiled once.
#include "gated_linear/launch.h"

#include "infuse/check.h"
#include "infuse/launch.h"

namespace infuse::gated_linear {
namespace {

constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;
constexpr int kRowAlignment = 16;  // bytes

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes, major == 9 && has_wgmma(device)};
}

void check_shape(const TensorArg& tensor, std::initializer_list<std::int64_t> expected) {
  bool fits = tensor.num_dims == static_cast<int>(expected.size());
  int i = 0;
  for (const std::int64_t size : expected) {
    fits = fits && tensor.sizes[i] == size;
    ++i;
  }
  check(fits, kOp, "shape of ", tensor.name, ", got ", shape_text(tensor), ", expected ",
        shape_text(expected.begin(), static_cast<int>(expected.size())));
}

void check_operand(const TensorArg& tensor, const TensorArg& x) {
  check_dtype(kOp, tensor, x.dtype);
  check_same_device(kOp, tensor, x);
}

// The copy engine reads rows that begin at multiples of 16 bytes. `row` is the dimension whose stride is not 1.
void check_alignment(const TensorArg& tensor, int row) {
  const std::int64_t bytes = size_bytes(tensor.dtype);
  check(reinterpret_cast<std::uintptr_t>(tensor.data) % kRowAlignment == 0, kOp, "address of ", tensor.name,
        ", got one that is no multiple of 16, expected one that is");
  for (int i = 0; i < tensor.num_dims; ++i) {
    const bool is_used = i == row || (tensor.num_dims == 3 && i == 0);
    if (!is_used || tensor.sizes[i] <= 1) continue;
    check(tensor.strides[i] > 0 && tensor.strides[i] * bytes % kRowAlignment == 0, kOp, "stride of dimension ", i,
          " of ", tensor.name, ", got ", tensor.strides[i], ", expected a positive multiple of ",
          kRowAlignment / bytes);
  }
}

bool has_adjacent(const TensorArg& tensor, int dim) { return tensor.sizes[dim] <= 1 || tensor.strides[dim] == 1; }

// Whether the weights lie as [dim, columns].
bool lie_by_columns(const Arguments& a) {
  const int last = a.gate_weight.num_dims - 1;
  const bool by_rows = has_adjacent(a.gate_weight, last) && has_adjacent(a.up_weight, last);
  const bool by_columns = has_adjacent(a.gate_weight, last - 1) && has_adjacent(a.up_weight, last - 1);
  check(by_rows || by_columns, kOp, "strides of the weights, got ", shape_text(a.gate_weight.strides, last + 1),
        " and ", shape_text(a.up_weight.strides, last + 1),
        ", expected 1 for the last dimension of both, or for the last but one of both");
  return !by_rows;
}

void check_bias(const TensorArg* bias, const TensorArg& x, std::int64_t columns) {
  if (bias == nullptr) return;
  check_operand(*bias, x);
  check_shape(*bias, {columns});
  check_last_stride(kOp, *bias);
  check(reinterpret_cast<std::uintptr_t>(bias->data) % 4 == 0, kOp, "address of ", bias->name,
        ", got one that is no multiple of 4, expected one that is");
}

void check_arguments(const Arguments& a) {
  check(a.x.dtype == DType::kBFloat16 || a.x.dtype == DType::kFloat16, kOp, "dtype of x, got ", name(a.x.dtype),
        ", expected bfloat16 or float16");
  check(a.x.num_dims == 2, kOp, "dimensions of x, got ", a.x.num_dims, ", expected 2");
  const int weight_dims = a.has_groups ? 3 : 2;
  check(a.gate_weight.num_dims == weight_dims, kOp, "dimensions of gate_weight, got ", a.gate_weight.num_dims,
        ", expected ", weight_dims);
  const std::int64_t rows = a.x.sizes[0], dim = a.x.sizes[1];
  const std::int64_t columns = a.gate_weight.sizes[weight_dims - 2];
  for (const TensorArg* weight : {&a.gate_weight, &a.up_weight}) {
    check_operand(*weight, a.x);
    if (!a.has_groups) {
      check_shape(*weight, {columns, dim});
    } else {
      check_shape(*weight, {a.groups, columns, dim});
    }
  }
  check_bias(a.gate_bias, a.x, columns);
  check_bias(a.up_bias, a.x, columns);
  check(!a.has_groups || (a.gate_bias == nullptr && a.up_bias == nullptr), kOp,
        "biases, got some beside offsets, expected none");
  check_operand(a.out, a.x);
  check_shape(a.out, {rows, columns});
  check_last_stride(kOp, a.out);
  if (a.gate_up != nullptr) {
    check_operand(*a.gate_up, a.x);
    check_shape(*a.gate_up, {rows, 2 * columns});
    check_contiguous(kOp, *a.gate_up);
  }
  check(dim % 8 == 0 && columns % 8 == 0, kOp, "sizes of the weights, got ", columns, " and ", dim,
        ", expected multiples of 8");
  check(rows <= kMaxSize && 2 * columns <= kMaxSize && dim <= kMaxSize, kOp, "sizes, got ", rows, ", ", columns,
        " and ", dim, ", expected less than 2^30");
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
}

Params make_params(const Arguments& a) {
  Params params{};
  const int last = a.gate_weight.num_dims - 1;
  params.by_columns = lie_by_columns(a);
  const int row = params.by_columns ? last : last - 1;
  for (const TensorArg* weight : {&a.gate_weight, &a.up_weight}) check_alignment(*weight, row);
  for (const TensorArg* tensor : {&a.x, &a.out}) check_alignment(*tensor, 0);
  if (a.gate_up != nullptr) check_alignment(*a.gate_up, 0);
  check_last_stride(kOp, a.x);
  params.x = a.x.data;
  params.gate_weight = a.gate_weight.data;
  params.up_weight = a.up_weight.data;
  params.gate_bias = a.gate_bias == nullptr ? nullptr : a.gate_bias->data;
  params.up_bias = a.up_bias == nullptr ? nullptr : a.up_bias->data;
  params.ends = a.ends;
  params.out = a.out.data;
  params.gate_up = a.gate_up == nullptr ? nullptr : a.gate_up->data;
  params.x_stride = a.x.strides[0];
  params.out_stride = a.out.strides[0];
  params.gate_stride = a.gate_weight.strides[row];
  params.up_stride = a.up_weight.strides[row];
  params.gate_group_stride = a.has_groups ? a.gate_weight.strides[0] : 0;
  params.up_group_stride = a.has_groups ? a.up_weight.strides[0] : 0;
  params.rows = static_cast<std::uint32_t>(a.x.sizes[0]);
  params.dim = static_cast<std::uint32_t>(a.x.sizes[1]);
  params.columns = static_cast<std::uint32_t>(a.gate_weight.sizes[last - 1]);
  params.groups = a.has_groups ? static_cast<std::uint32_t>(a.groups) : 1;
  params.activation = activation_named(kOp, a.activation);
  return params;
}

}  // namespace

Prepared prepare(const Arguments& a) {
  check_arguments(a);
  Prepared prepared;
  prepared.dtype = a.x.dtype;
  prepared.device = a.x.device;
  prepared.empty = a.x.sizes[0] == 0 || a.out.sizes[1] == 0 || (a.has_groups && a.groups == 0);
  if (prepared.empty) return prepared;
  check(a.x.sizes[1] > 0, kOp, "last dimension of x, got 0, expected at least 8");
  prepared.params = make_params(a);
  const Problem problem{a.x.sizes[0], a.out.sizes[1], a.x.sizes[1], prepared.params.groups, a.has_groups,
                        prepared.params.by_columns};
  const Device device = describe(a.x.device);
  prepared.config = a.config == kHeuristic ? choose(problem, device) : static_cast<int>(a.config);
  const Config& config = kConfigs[prepared.config];
  const char* reason = obstacle(problem, config, device);
  check(reason == nullptr, kOp, "configuration ", config.name, ", got ", reason == nullptr ? "" : reason,
        ", expected arguments that it takes");
  return prepared;
}

template <DType kDType>
void launch_as(const Prepared& prepared, cudaStream_t stream) {
  const Config& config = kConfigs[prepared.config];
  if (config.is_mma) {
    launch_mma<kDType>(config, prepared.params, prepared.device, stream);
  } else {
    launch_wgmma<kDType>(config, prepared.params, prepared.device, stream);
  }
}

void launch(const Prepared& prepared, cudaStream_t stream) {
  if (prepared.empty) return;
  if (prepared.dtype == DType::kBFloat16) {
    launch_as<DType::kBFloat16>(prepared, stream);
  } else {
    launch_as<DType::kFloat16>(prepared, stream);
  }
}

}  // namespace infuse::gated_linear
