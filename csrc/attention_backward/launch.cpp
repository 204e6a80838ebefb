// Checks, plan and workspace of attention's gradients. Host code only, compiled once.
#include "attention_backward/launch.h"

#include "attention/checks.h"
#include "infuse/check.h"
#include "infuse/launch.h"

namespace infuse::attention_backward {
namespace {

constexpr std::int64_t kMostRows = std::int64_t{1} << 31;  // what a FastDivisor divides is less
constexpr int kStaticSharedBytes = 64;  // that the kernel declares itself, at most
constexpr double kLog2e = 1.4426950408889634;

Device describe(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp,
             "shared memory");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp, "compute capability");
  return {count_sms(kOp, device), shared_bytes - kStaticSharedBytes, major == 9 && has_wgmma(device)};
}

void check_like(const TensorArg& tensor, const TensorArg& other) {
  check_same_shape(kOp, tensor, other);
  check_dtype(kOp, tensor, other.dtype);
  check_same_device(kOp, tensor, other);
  check_last_stride(kOp, tensor);
}

void check_lse(const Arguments& a) {
  check_dtype(kOp, a.lse, DType::kFloat32);
  check_same_device(kOp, a.lse, a.q);
  const bool fits = a.lse.num_dims == 3 && a.lse.sizes[0] == a.q.sizes[0] && a.lse.sizes[1] == a.q.sizes[1] &&
                    a.lse.sizes[2] == a.q.sizes[2];
  check(fits, kOp, "shape of lse, got ", shape_text(a.lse), ", expected ", shape_text(a.q.sizes, 3));
  check_contiguous(kOp, a.lse);
}

void check_arguments(const Arguments& a) {
  attention::check_operands(kOp, a.q, a.k, a.v, a.out);
  check(a.q.sizes[1] > 0, kOp, "heads of q, got 0, expected at least 1");
  check_like(a.dout, a.out);
  check_like(a.dq, a.q);
  check_like(a.dk, a.k);
  check_like(a.dv, a.v);
  for (const TensorArg* tensor : {&a.dq, &a.dk, &a.dv}) check_rows_apart(kOp, *tensor);
  check_lse(a);
  if (a.sinks != nullptr) attention::check_sinks(kOp, *a.sinks, a.q);
  check(a.mask == nullptr || !a.is_causal, kOp, "is_causal, got a mask beside it, expected one of them");
  check(a.mask != nullptr || a.tile_map == nullptr, kOp, "tile_map, got one without a mask, expected none");
  check(a.config >= kHeuristic && a.config < kNumConfigs, kOp, "config, got ", a.config, ", expected -1 to ",
        kNumConfigs - 1);
}

bool is_expanded(const TensorArg& tensor) {
  bool expanded = false;
  for (int i = 0; i < 3; ++i) expanded |= tensor.sizes[i] > 1 && tensor.strides[i] == 0;
  return expanded;
}

void check_plan(const Plan& plan, const Problem& problem, const Device& device) {
  const Config& config = kConfigs[plan.config];
  if (config.wgmma) {
    const char* obstacle = wgmma_obstacle(problem, device);
    check(obstacle == nullptr, kOp, "arguments of configuration ", config.name, ", got ",
          obstacle == nullptr ? "" : obstacle, ", expected none of it");
  }
  check(plan.dim != 0, kOp, "head_dim for configuration ", config.name, ", got ", larger(problem.dim, problem.dim_v),
        ", expected at most 128");
  check(plan.shared_bytes <= device.shared_bytes, kOp, "shared memory of configuration ", config.name, ", got ",
        plan.shared_bytes, " bytes, expected at most ", device.shared_bytes);
  const std::int64_t rows = problem.batch * problem.heads * plan.padded_queries;
  const std::int64_t ctas = problem.batch * problem.kv_heads * plan.splits * plan.key_blocks;
  const std::int64_t kv_rows = problem.batch * problem.kv_heads * problem.keys;
  for (const std::int64_t count : {rows, ctas, kv_rows}) {
    check(count < kMostRows, kOp, "rows of all heads, got ", count, ", expected less than ", kMostRows);
  }
}

void set_tensors(const Arguments& a, const std::int64_t (&full)[4], Params* params) {
  params->dout = a.dout.data;
  params->q = a.q.data;
  params->k = a.k.data;
  params->v = a.v.data;
  params->out = a.out.data;
  params->lse = static_cast<const float*>(a.lse.data);
  params->dq = a.dq.data;
  params->dk = a.dk.data;
  params->dv = a.dv.data;
  params->dout_stride = attention::strides_of(a.dout);
  params->q_stride = attention::strides_of(a.q);
  params->k_stride = attention::strides_of(a.k);
  params->v_stride = attention::strides_of(a.v);
  params->out_stride = attention::strides_of(a.out);
  params->dq_stride = attention::strides_of(a.dq);
  params->dk_stride = attention::strides_of(a.dk);
  params->dv_stride = attention::strides_of(a.dv);
  if (a.mask == nullptr) return;
  const attention::MaskView mask = attention::view_mask(kOp, *a.mask, full, a.q.device);
  params->mask = mask.data;
  params->mask_kind = mask.kind;
  params->mask_stride = mask.stride;
  if (a.tile_map != nullptr) params->map = attention::view_tile_map(kOp, *a.tile_map, full, a.q.device);
}

void set_sizes(const Problem& problem, const Plan& plan, Params* params) {
  params->batch = static_cast<std::uint32_t>(problem.batch);
  params->heads = static_cast<std::uint32_t>(problem.heads);
  params->kv_heads = static_cast<std::uint32_t>(problem.kv_heads);
  params->queries = static_cast<std::uint32_t>(problem.queries);
  params->keys = static_cast<std::uint32_t>(problem.keys);
  params->dim = static_cast<std::uint32_t>(problem.dim);
  params->dim_v = static_cast<std::uint32_t>(problem.dim_v);
  params->padded_queries = static_cast<std::uint32_t>(plan.padded_queries);
  params->padded_dim = static_cast<std::uint32_t>(plan.dim);
  params->query_blocks = static_cast<std::uint32_t>(plan.query_blocks);
  params->key_blocks = static_cast<std::uint32_t>(plan.key_blocks);
  params->splits = static_cast<std::uint32_t>(plan.splits);
  params->stages = static_cast<std::uint32_t>(plan.stages);
  params->heads_at_once = static_cast<std::uint32_t>(plan.heads_at_once);
  params->head_divisor = FastDivisor(params->heads);
  params->kv_head_divisor = FastDivisor(params->kv_heads);
  params->group = FastDivisor(params->heads / params->kv_heads);
  params->split_divisor = FastDivisor(params->splits);
  if (plan.query_blocks > 0) params->padded_query_divisor = FastDivisor(params->padded_queries);
}

// Shares out the workspace, of which each part is aligned to 16 bytes. Returns how much it is; null only counts.
std::int64_t share_workspace(float* workspace, bool deterministic, Params* params) {
  std::int64_t floats = 0;
  const auto take = [&](std::int64_t count) {
    float* part = workspace + floats;
    floats += ceil_div(count, 4) * 4;
    return part;
  };
  const std::int64_t heads = std::int64_t{params->batch} * params->heads;
  const std::int64_t rows = heads * params->padded_queries;
  const std::int64_t kv_rows = std::int64_t{params->batch} * params->kv_heads * params->keys;
  params->lse_log2 = take(rows);
  params->delta = take(rows);
  params->dq_sum = take(rows * params->padded_dim);
  if (deterministic) params->turns = reinterpret_cast<std::uint32_t*>(take(heads * params->query_blocks + 1));
  if (params->splits > 1) {
    params->dk_parts = take(params->splits * kv_rows * params->dim);
    params->dv_parts = take(params->splits * kv_rows * params->dim_v);
  }
  return floats;
}

template <DType kDType>
void launch_all(const Prepared& prepared, cudaStream_t stream) {
  launch_first<kDType>(prepared.params, prepared.device, stream);
  const auto launch_sums = kConfigs[prepared.plan.config].wgmma ? launch_wgmma<kDType> : launch_mma<kDType>;
  launch_sums(prepared.plan, prepared.params, prepared.device, stream);
  launch_last<kDType>(prepared.params, prepared.device, stream);
}

}  // namespace

Prepared prepare(const Arguments& a) {
  check_arguments(a);
  Prepared prepared;
  prepared.dtype = a.q.dtype;
  prepared.device = a.q.device;
  const std::int64_t full[4] = {a.q.sizes[0], a.q.sizes[1], a.q.sizes[2], a.k.sizes[2]};
  prepared.empty = full[0] == 0 || (full[2] == 0 && full[3] == 0);
  if (prepared.empty) return prepared;
  for (const TensorArg* tensor : {&a.dout, &a.q, &a.k, &a.v, &a.out, &a.dq, &a.dk, &a.dv}) {
    attention::check_row_alignment(kOp, *tensor);
  }
  Params& params = prepared.params;
  set_tensors(a, full, &params);
  params.dropout = attention::make_dropout(kOp, a.dropout_p, a.seed);
  const Problem problem{full[0], full[1], a.k.sizes[1], full[2], full[3],
                        static_cast<int>(a.q.sizes[3]), static_cast<int>(a.v.sizes[3]), a.is_causal,
                        a.mask != nullptr, a.tile_map != nullptr, a.dropout_p != 0.0, a.softcap != 0.0,
                        a.deterministic, a.scale > 0.0,
                        is_expanded(a.q) || is_expanded(a.k) || is_expanded(a.v) || is_expanded(a.dout)};
  const Device device = describe(a.q.device);
  prepared.plan = make_plan(problem, static_cast<int>(a.config), device);
  check_plan(prepared.plan, problem, device);
  set_sizes(problem, prepared.plan, &params);
  params.scale = static_cast<float>(a.scale);
  params.scale_log2 = static_cast<float>(a.softcap != 0.0 ? a.scale / a.softcap : a.scale * kLog2e);
  params.softcap_log2 = static_cast<float>(a.softcap * kLog2e);
  params.is_causal = a.is_causal;
  prepared.deterministic = a.deterministic && full[2] > 0;  // without queries, nobody takes turns
  prepared.workspace_floats = share_workspace(nullptr, prepared.deterministic, &params);
  return prepared;
}

void launch(Prepared prepared, float* workspace, cudaStream_t stream) {
  if (prepared.empty) return;
  share_workspace(workspace, prepared.deterministic, &prepared.params);
  if (prepared.dtype == DType::kBFloat16) {
    launch_all<DType::kBFloat16>(prepared, stream);
  } else {
    launch_all<DType::kFloat16>(prepared, stream);
  }
}

}  // namespace infuse::attention_backward
