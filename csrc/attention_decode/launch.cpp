// Checks, plan and choice of dtypes for attention with few query rows. Host code only, compiled once.
#include "attention_decode/launch.h"

#include "infuse/check.h"
#include "infuse/launch.h"

namespace infuse::attention_decode {
namespace {

constexpr std::int64_t kMaxGridYz = 65535;
constexpr int kStaticSharedBytes = 64;  // that the kernel declares itself, at most
constexpr double kLog2e = 1.4426950408889634;

void check_tensor(const TensorArg& tensor, const TensorArg& q, std::int64_t batch) {
  check(tensor.num_dims == 4, kOp, "dimensions of ", tensor.name, ", got ", tensor.num_dims, ", expected 4");
  check_dtype(kOp, tensor, q.dtype);
  check_same_device(kOp, tensor, q);
  check_last_stride(kOp, tensor);
  check(tensor.sizes[0] == batch, kOp, "batch of ", tensor.name, ", got ", tensor.sizes[0], ", expected ", batch,
        " (as q)");
}

void check_shapes(const Arguments& a) {
  const std::int64_t* q = a.q.sizes;
  check(a.q.dtype == DType::kBFloat16 || a.q.dtype == DType::kFloat16, kOp, "dtype of q, got ", name(a.q.dtype),
        ", expected bfloat16 or float16");
  for (const TensorArg* tensor : {&a.q, &a.k, &a.v, &a.out}) check_tensor(*tensor, a.q, q[0]);
  check(a.k.sizes[1] > 0 && q[1] % a.k.sizes[1] == 0, kOp, "heads of k, got ", a.k.sizes[1], ", expected a divisor of ",
        q[1], " (heads of q)");
  check(a.k.sizes[3] == q[3], kOp, "head_dim of k, got ", a.k.sizes[3], ", expected ", q[3], " (as q)");
  check(a.v.sizes[1] == a.k.sizes[1] && a.v.sizes[2] == a.k.sizes[2], kOp, "shape of v, got ", shape_text(a.v),
        ", expected the heads and length of k ", shape_text(a.k));
  check(a.out.sizes[1] == q[1] && a.out.sizes[2] == q[2] && a.out.sizes[3] == a.v.sizes[3], kOp, "shape of out, got ",
        shape_text(a.out), ", expected [", q[0], ", ", q[1], ", ", q[2], ", ", a.v.sizes[3], "]");
  for (const TensorArg* tensor : {&a.q, &a.v}) {
    const std::int64_t dim = tensor->sizes[3];
    check(dim > 0 && dim % 8 == 0 && dim <= 256, kOp, "head_dim of ", tensor->name, ", got ", dim,
          ", expected a multiple of 8 up to 256");
  }
}

// Every row that is copied must begin at a multiple of 16 bytes.
void check_alignment(const TensorArg& tensor) {
  RowMap ignored;
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(tensor.data);
  for (int i = 0; i < 3; ++i) {
    if (tensor.sizes[i] > 1) bits |= static_cast<std::uint64_t>(tensor.strides[i]) * size_bytes(tensor.dtype);
  }
  check(bits % kVectorBytes == 0, kOp, "alignment of ", tensor.name, ", got rows that begin at odd places (strides ",
        shape_text(tensor.strides, 4), "), expected multiples of ", kVectorBytes, " bytes");
}

Strides strides_of(const TensorArg& tensor) { return {tensor.strides[0], tensor.strides[1], tensor.strides[2]}; }

int mask_size_bytes(Mask kind) {
  return kind == Mask::kNone ? 0 : kind == Mask::kBool ? 1 : kind == Mask::kTwoBytes ? 2 : 4;
}

void add_mask(const Arguments& a, Params* params) {
  const MaskArg& mask = *a.mask;
  check(mask.device == a.q.device, kOp, "device of mask, got cuda:", mask.device, ", expected cuda:", a.q.device,
        " (as q)");
  check(!a.is_causal, kOp, "is_causal, got a mask beside it, expected one of them");
  const std::int64_t full[4] = {a.q.sizes[0], a.q.sizes[1], a.q.sizes[2], a.k.sizes[2]};
  std::int64_t strides[4] = {0, 0, 0, 0};
  check(mask.num_dims <= 4, kOp, "dimensions of mask, got ", mask.num_dims, ", expected at most 4");
  for (int i = 0; i < mask.num_dims; ++i) {
    const int dim = 4 - mask.num_dims + i;
    check(mask.sizes[i] == full[dim] || (mask.sizes[i] == 1 && dim < 3), kOp, "size of dimension ", i,
          " of mask, got ", mask.sizes[i], ", expected ", full[dim]);
    strides[dim] = mask.sizes[i] == 1 ? 0 : mask.strides[i];
  }
  check(full[3] <= 1 || strides[3] == 1, kOp, "stride of the last dimension of mask, got ", strides[3], ", expected 1");
  params->mask = mask.data;
  params->mask_kind = mask.kind;
  params->mask_stride = {strides[0], strides[1], strides[2]};
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(mask.data);
  for (int i = 0; i < 3; ++i) bits |= static_cast<std::uint64_t>(strides[i]) * mask_size_bytes(mask.kind);
  params->mask_is_aligned = bits % kVectorBytes == 0;
}

void add_sinks(const Arguments& a, Params* params) {
  const TensorArg& sinks = *a.sinks;
  check(sinks.num_dims == 1 && sinks.sizes[0] == a.q.sizes[1], kOp, "shape of sinks, got ", shape_text(sinks),
        ", expected [", a.q.sizes[1], "]");
  check(sinks.dtype == a.q.dtype || sinks.dtype == DType::kFloat32, kOp, "dtype of sinks, got ", name(sinks.dtype),
        ", expected ", name(a.q.dtype), " (as q) or float32");
  check_last_stride(kOp, sinks);
  check_same_device(kOp, sinks, a.q);
  params->sinks = sinks.data;
  params->sinks_fp32 = sinks.dtype == DType::kFloat32;
}

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp, "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes - kStaticSharedBytes, major >= 9};
}

}  // namespace

Prepared prepare(const Arguments& a) {
  check_shapes(a);
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
  check(a.splits >= 0 && a.splits <= kMaxSplits, kOp, "splits, got ", a.splits, ", expected 0 to ", kMaxSplits);
  Prepared prepared;
  prepared.dtype = a.q.dtype;
  prepared.device = a.q.device;
  Params& params = prepared.params;
  const std::int64_t batch = a.q.sizes[0], kv_heads = a.k.sizes[1], group = a.q.sizes[1] / kv_heads;
  const std::int64_t rows = group * a.q.sizes[2], keys = a.k.sizes[2];
  prepared.empty = batch == 0 || rows == 0;
  if (prepared.empty) return prepared;
  for (const TensorArg* tensor : {&a.q, &a.k, &a.v, &a.out}) check_alignment(*tensor);

  if (a.mask != nullptr) add_mask(a, &params);
  if (a.sinks != nullptr) add_sinks(a, &params);
  const Problem problem{batch, kv_heads, rows, keys, static_cast<int>(a.q.sizes[3]), static_cast<int>(a.v.sizes[3]),
                        mask_size_bytes(params.mask_kind)};
  const Plan plan = make_plan(problem, static_cast<int>(a.config), static_cast<int>(a.splits), describe(a.q.device));
  check(plan.tiles <= kMaxTiles, kOp, "length of k, got ", keys, ", expected at most ",
        kMaxTiles * plan.tile);
  check(batch <= kMaxGridYz && kv_heads * plan.row_blocks <= kMaxGridYz, kOp, "batch and heads, got ", batch, " and ",
        kv_heads * plan.row_blocks, ", expected at most ", kMaxGridYz, " each");
  prepared.plan = plan;
  params.q = a.q.data;
  params.k = a.k.data;
  params.v = a.v.data;
  params.out = a.out.data;
  params.q_stride = strides_of(a.q);
  params.k_stride = strides_of(a.k);
  params.v_stride = strides_of(a.v);
  params.out_stride = strides_of(a.out);
  params.keys = static_cast<std::uint32_t>(keys);
  params.dim = static_cast<std::uint32_t>(a.q.sizes[3]);
  params.dim_v = static_cast<std::uint32_t>(a.v.sizes[3]);
  params.rows = static_cast<std::uint32_t>(rows);
  params.batch = static_cast<std::uint32_t>(batch);
  params.kv_heads = static_cast<std::uint32_t>(kv_heads);
  params.tiles = static_cast<std::uint32_t>(plan.tiles);
  params.stage_bytes = static_cast<std::uint32_t>(
      stage_bytes(plan.dim, plan.tile, plan.row_warps, mask_size_bytes(params.mask_kind)));
  params.bits_offset = static_cast<std::uint32_t>(plan.bits_offset);
  params.splits = static_cast<std::uint32_t>(plan.splits);
  params.row_warps = static_cast<std::uint32_t>(plan.row_warps);
  params.group = FastDivisor(static_cast<std::uint32_t>(group));
  params.row_blocks = FastDivisor(static_cast<std::uint32_t>(plan.row_blocks));
  params.scale_log2 = static_cast<float>(a.softcap != 0.0 ? a.scale / a.softcap : a.scale * kLog2e);
  params.softcap_log2 = static_cast<float>(a.softcap * kLog2e);
  params.is_causal = a.is_causal;
  params.nan_for_masked_rows = a.nan_for_masked_rows;
  if (plan.splits > 1 && !plan.cluster) {
    prepared.workspace_floats = batch * kv_heads * rows * plan.splits * (a.v.sizes[3] + 2);
  }
  return prepared;
}

void launch(Prepared prepared, float* workspace, cudaStream_t stream) {
  if (prepared.empty) return;
  Params& params = prepared.params;
  if (prepared.workspace_floats > 0) {
    const std::int64_t parts = prepared.workspace_floats / (params.dim_v + 2);
    params.part_out = workspace;
    params.part_sums = workspace + parts * params.dim_v;
  }
  if (prepared.dtype == DType::kBFloat16) {
    launch_planned<DType::kBFloat16>(prepared.plan, params, prepared.device, stream);
  } else {
    launch_planned<DType::kFloat16>(prepared.plan, params, prepared.device, stream);
  }
}

}  // namespace infuse::attention_decode
