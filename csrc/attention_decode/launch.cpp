// Checks, plan and choice of dtypes for attention with few query rows. Host code only, compiled once.
#include "attention_decode/launch.h"

#include "attention/checks.h"
#include "infuse/check.h"
#include "infuse/launch.h"
#include "infuse/tensor_map.h"

namespace infuse::attention_decode {
namespace {

constexpr std::int64_t kMaxGridYz = 65535;
constexpr int kStaticSharedBytes = 64;  // that the kernel declares itself, at most
constexpr double kLog2e = 1.4426950408889634;

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp, "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes - kStaticSharedBytes, major == 9};
}

// TMA knows no dimension that is broadcast.
bool can_be_mapped(const TensorArg& tensor) {
  for (int i = 0; i < 3; ++i) {
    if (tensor.sizes[i] == 0 || (tensor.sizes[i] > 1 && tensor.strides[i] <= 0)) return false;
  }
  return true;
}

CUtensorMap map_of(const TensorArg& tensor, int tile) {
  const MappedTensor mapped{tensor.data,       tensor.dtype,      tensor.sizes[0],   tensor.sizes[1],  tensor.sizes[2],
                            tensor.sizes[3],   tensor.strides[0], tensor.strides[1], tensor.strides[2]};
  return make_tensor_map(kOp, mapped, tile, kBlockColumns);
}

}  // namespace

Prepared prepare(const Arguments& a) {
  attention::check_operands(kOp, a.q, a.k, a.v, a.out);
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
  for (const TensorArg* tensor : {&a.q, &a.k, &a.v, &a.out}) attention::check_row_alignment(kOp, *tensor);

  attention::MaskView mask;
  if (a.mask != nullptr) {
    check(!a.is_causal, kOp, "is_causal, got a mask beside it, expected one of them");
    mask = attention::view_mask(kOp, *a.mask, {batch, a.q.sizes[1], a.q.sizes[2], keys}, a.q.device);
  }
  if (a.sinks != nullptr) {
    attention::check_sinks(kOp, *a.sinks, a.q);
    params.sinks = a.sinks->data;
    params.sinks_fp32 = a.sinks->dtype == DType::kFloat32;
  }
  const Problem problem{batch, kv_heads, rows, keys, static_cast<int>(a.q.sizes[3]), static_cast<int>(a.v.sizes[3]),
                        attention::mask_size_bytes(mask.kind),
                        static_cast<int>(mask.stride.head != 0 ? rows : a.q.sizes[2]),
                        can_be_mapped(a.k) && can_be_mapped(a.v)};
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
  params.q_stride = attention::strides_of(a.q);
  params.k_stride = attention::strides_of(a.k);
  params.v_stride = attention::strides_of(a.v);
  params.out_stride = attention::strides_of(a.out);
  params.mask = mask.data;
  params.mask_kind = mask.kind;
  params.mask_stride = mask.stride;
  params.mask_is_aligned = mask.is_aligned;
  params.keys = static_cast<std::uint32_t>(keys);
  params.dim = static_cast<std::uint32_t>(a.q.sizes[3]);
  params.dim_v = static_cast<std::uint32_t>(a.v.sizes[3]);
  params.rows = static_cast<std::uint32_t>(rows);
  params.batch = static_cast<std::uint32_t>(batch);
  params.kv_heads = static_cast<std::uint32_t>(kv_heads);
  params.tiles = static_cast<std::uint32_t>(plan.tiles);
  params.stage_bytes = static_cast<std::uint32_t>(
      stage_bytes(plan.dim, plan.tile, plan.row_warps, problem.mask_size_bytes));
  params.share = FastDivisor(static_cast<std::uint32_t>(larger(1, plan.share)));
  params.ring_offset = static_cast<std::uint32_t>(plan.ring_offset);
  params.mask_offset = static_cast<std::uint32_t>(plan.mask_offset);
  params.mask_bytes = static_cast<std::uint32_t>(plan.mask_bytes);
  params.inbox_offset = static_cast<std::uint32_t>(plan.inbox_offset);
  params.barrier_offset = static_cast<std::uint32_t>(plan.barrier_offset);
  params.bits_offset = static_cast<std::uint32_t>(plan.bits_offset);
  params.splits = static_cast<std::uint32_t>(plan.splits);
  params.row_warps = static_cast<std::uint32_t>(plan.row_warps);
  params.group = FastDivisor(static_cast<std::uint32_t>(group));
  params.row_blocks = FastDivisor(static_cast<std::uint32_t>(plan.row_blocks));
  params.scale_log2 = static_cast<float>(a.softcap != 0.0 ? a.scale / a.softcap : a.scale * kLog2e);
  params.softcap_log2 = static_cast<float>(a.softcap * kLog2e);
  params.skips_filled = plan.kernel == Kernel::kDealt && problem.mask_size_bytes > 1;
  params.is_causal = a.is_causal;
  params.nan_for_masked_rows = a.nan_for_masked_rows;
  if (plan.kernel == Kernel::kDealt) {
    params.k_map = map_of(a.k, plan.tile);
    params.v_map = map_of(a.v, plan.tile);
  }
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
