// Checks, plan and choice of kernels for attention with many query rows. Host code only, compiled once.
#include "attention_forward/launch.h"

#include "attention/checks.h"
#include "infuse/check.h"
#include "infuse/launch.h"

namespace infuse::attention_forward {
namespace {

constexpr std::int64_t kMaxGridX = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kMaxGridYz = 65535;
constexpr double kLog2e = 1.4426950408889634;

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes, major, major == 9 && has_wgmma(device)};
}

void check_lse(const Arguments& a) {
  check_dtype(kOp, *a.lse, DType::kFloat32);
  check_same_device(kOp, *a.lse, a.q);
  const bool fits = a.lse->num_dims == 3 && a.lse->sizes[0] == a.q.sizes[0] && a.lse->sizes[1] == a.q.sizes[1] &&
                    a.lse->sizes[2] == a.q.sizes[2];
  check(fits, kOp, "shape of lse, got ", shape_text(*a.lse), ", expected ", shape_text(a.q.sizes, 3));
  check_contiguous(kOp, *a.lse);
}

void check_arguments(const Arguments& a) {
  attention::check_operands(kOp, a.q, a.k, a.v, a.out);
  if (a.lse != nullptr) check_lse(a);
  if (a.sinks != nullptr) attention::check_sinks(kOp, *a.sinks, a.q);
  check(a.mask == nullptr || !a.is_causal, kOp, "is_causal, got a mask beside it, expected one of them");
  check(a.mask != nullptr || a.tile_map == nullptr, kOp, "tile_map, got one without a mask, expected none");
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
  check(a.splits >= 0 && a.splits <= kMaxSplits, kOp, "splits, got ", a.splits, ", expected 0 to ", kMaxSplits);
}

// Whether places of the tensor share memory.
bool is_expanded(const TensorArg& tensor) {
  bool expanded = false;
  for (int i = 0; i < 3; ++i) expanded |= tensor.sizes[i] > 1 && tensor.strides[i] == 0;
  return expanded;
}

void check_plan(const Plan& plan, const Problem& problem, const Device& device) {
  const Config& config = kConfigs[plan.config];
  if (config.wgmma) {
    const char* obstacle = wgmma_obstacle(problem, plan.dim, config, device);
    check(obstacle == nullptr, kOp, "configuration ", config.name, ", got ", obstacle == nullptr ? "" : obstacle,
          ", expected arguments that it takes");
  }
  check(plan.shared_bytes <= device.shared_bytes, kOp, "shared memory of configuration ", kConfigs[plan.config].name,
        ", got ", plan.shared_bytes, " bytes, expected at most ", device.shared_bytes);
  check(problem.batch * problem.heads <= kMaxGridX && plan.row_blocks <= kMaxGridYz, kOp,
        "heads of all batches and blocks of queries, got ", problem.batch * problem.heads, " and ", plan.row_blocks,
        ", expected at most ", kMaxGridX, " and ", kMaxGridYz);
  check(problem.keys < kMaxGridX, kOp, "length of k, got ", problem.keys, ", expected less than ", kMaxGridX);
}

void set_tensors(const Arguments& a, const std::int64_t (&full)[4], Params* params) {
  params->q = a.q.data;
  params->k = a.k.data;
  params->v = a.v.data;
  params->out = a.out.data;
  params->lse = a.lse == nullptr ? nullptr : static_cast<float*>(a.lse->data);
  params->q_stride = attention::strides_of(a.q);
  params->k_stride = attention::strides_of(a.k);
  params->v_stride = attention::strides_of(a.v);
  params->out_stride = attention::strides_of(a.out);
  if (a.mask != nullptr) {
    const attention::MaskView mask = attention::view_mask(kOp, *a.mask, full, a.q.device);
    params->mask = mask.data;
    params->mask_kind = mask.kind;
    params->mask_stride = mask.stride;
    params->mask_is_aligned = mask.is_aligned;
  }
  if (a.tile_map != nullptr) params->map = attention::view_tile_map(kOp, *a.tile_map, full, a.q.device);
  if (a.sinks != nullptr) {
    params->sinks = a.sinks->data;
    params->sinks_fp32 = a.sinks->dtype == DType::kFloat32;
  }
}

}  // namespace

Prepared prepare(const Arguments& a) {
  check_arguments(a);
  Prepared prepared;
  prepared.dtype = a.q.dtype;
  prepared.device = a.q.device;
  const std::int64_t full[4] = {a.q.sizes[0], a.q.sizes[1], a.q.sizes[2], a.k.sizes[2]};
  prepared.empty = full[0] == 0 || full[1] == 0 || full[2] == 0;
  if (prepared.empty) return prepared;
  for (const TensorArg* tensor : {&a.q, &a.k, &a.v, &a.out}) attention::check_row_alignment(kOp, *tensor);

  Params& params = prepared.params;
  set_tensors(a, full, &params);
  params.dropout = attention::make_dropout(kOp, a.dropout_p, a.seed);
  const Problem problem{full[0], full[1], a.k.sizes[1], full[2], full[3],
                        static_cast<int>(a.q.sizes[3]), static_cast<int>(a.v.sizes[3]), a.is_causal,
                        a.mask != nullptr, a.tile_map != nullptr, a.dropout_p != 0.0, a.softcap != 0.0,
                        is_expanded(a.q) || is_expanded(a.k) || is_expanded(a.v)};
  const Device device = describe(a.q.device);
  const Plan plan = make_plan(problem, static_cast<int>(a.config), static_cast<int>(a.splits), device);
  check_plan(plan, problem, device);
  prepared.plan = plan;
  params.batch = static_cast<std::uint32_t>(problem.batch);
  params.queries = static_cast<std::uint32_t>(problem.queries);
  params.keys = static_cast<std::uint32_t>(problem.keys);
  params.dim = static_cast<std::uint32_t>(problem.dim);
  params.dim_v = static_cast<std::uint32_t>(problem.dim_v);
  params.row_blocks = static_cast<std::uint32_t>(plan.row_blocks);
  params.splits = static_cast<std::uint32_t>(plan.splits);
  params.heads = FastDivisor(static_cast<std::uint32_t>(problem.heads));
  params.group = FastDivisor(static_cast<std::uint32_t>(problem.heads / problem.kv_heads));
  params.scale_log2 = static_cast<float>(a.softcap != 0.0 ? a.scale / a.softcap : a.scale * kLog2e);
  params.softcap_log2 = static_cast<float>(a.softcap * kLog2e);
  const bool is_added = params.mask_kind == Mask::kTwoBytes || params.mask_kind == Mask::kFloat32;
  params.scales_first = a.softcap != 0.0 || is_added || !(params.scale_log2 > 0.0f);
  params.two_stages = kConfigs[plan.config].stages == 2;
  params.is_causal = a.is_causal;
  params.nan_for_masked_rows = a.nan_for_masked_rows;
  if (kConfigs[plan.config].wgmma) {
    prepared.workspace_floats = 1;
  } else if (plan.splits > 1) {
    prepared.workspace_floats = problem.batch * problem.heads * problem.queries * plan.splits * (problem.dim_v + 2);
  }
  return prepared;
}

// workspace: as many numbers as were asked for.
template <DType kDType>
void launch_as(Prepared prepared, float* workspace, cudaStream_t stream) {
  Params& params = prepared.params;
  if (kConfigs[prepared.plan.config].wgmma) {
    launch_wgmma<kDType>(prepared.plan, params, reinterpret_cast<std::uint32_t*>(workspace), prepared.device, stream);
    return;
  }
  if (prepared.workspace_floats > 0) {
    const std::int64_t parts = prepared.workspace_floats / (params.dim_v + 2);
    params.part_out = workspace;
    params.part_sums = workspace + parts * params.dim_v;
  }
  launch_mma<kDType>(prepared.plan, params, prepared.device, stream);
}

void launch(Prepared prepared, float* workspace, cudaStream_t stream) {
  if (prepared.empty) return;
  if (prepared.dtype == DType::kBFloat16) {
    launch_as<DType::kBFloat16>(prepared, workspace, stream);
  } else {
    launch_as<DType::kFloat16>(prepared, workspace, stream);
  }
}

}  // namespace infuse::attention_forward
