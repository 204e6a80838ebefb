// From the sums of a row to its result, and the second kernel that merges the sums of splits.
#pragma once

#include <cstdint>

#include "attention/softmax.cuh"
#include "attention_forward/params.h"
#include "infuse/overlap.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_forward {

// What the sum of a row is multiplied by for its result, and the logarithm of its softmax's sum.
struct Ending {
  float factor, lse;
};

// largest: in powers of two; denominator: relative to that. A row that sees nothing has neither.
template <typename T>
__device__ __forceinline__ Ending end_row(const Params& params, std::uint32_t head, float largest, float denominator) {
  float base = largest, weight = 1.0f;
  if (params.sinks != nullptr) {
    const float sink = attention::kLog2e * (params.sinks_fp32
                                                ? static_cast<const float*>(params.sinks)[head]
                                                : static_cast<float>(static_cast<const T*>(params.sinks)[head]));
    base = fmaxf(largest, sink);
    weight = attention::weight_of(largest, base);
    denominator = denominator * weight + attention::weight_of(sink, base);
  }
  if (denominator == 0.0f) {
    return {params.nan_for_masked_rows ? __int_as_float(0x7fc00000) : 0.0f, attention::kMinusInfinity};
  }
  return {weight / denominator * params.dropout.scale, (base + log2f(denominator)) * attention::kLn2};
}

// A warp a row: its four lanes' columns side by side, splits one after the other in a fixed order.
constexpr int kMergeWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize) merge_kernel(const __grid_constant__ Params params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::uint32_t lane = threadIdx.x % kWarpSize;
  const std::uint64_t row = std::uint64_t{blockIdx.x} * kMergeWarps + threadIdx.x / kWarpSize;
  if (row >= std::uint64_t{params.batch} * params.heads.divisor * params.queries) return;
  const float2* parts = reinterpret_cast<const float2*>(params.part_sums) + row * params.splits;
  float largest = attention::kMinusInfinity, denominator = 0.0f;
  for (std::uint32_t split = 0; split < params.splits; ++split) largest = fmaxf(largest, __ldg(parts + split).x);
  for (std::uint32_t split = 0; split < params.splits; ++split) {
    const float2 part = __ldg(parts + split);
    denominator += attention::weight_of(part.x, largest) * part.y;
  }
  const std::uint32_t batch_head = static_cast<std::uint32_t>(row / params.queries);
  const std::uint32_t query = static_cast<std::uint32_t>(row - std::uint64_t{batch_head} * params.queries);
  const std::uint32_t batch = params.heads.divide(batch_head), head = batch_head - batch * params.heads.divisor;
  const Ending ending = end_row<T>(params, head, largest, denominator);
  if (lane == 0 && params.lse != nullptr) params.lse[row] = ending.lse;
  const float* outs = params.part_out + row * params.splits * params.dim_v;
  T* out = static_cast<T*>(params.out) + batch * params.out_stride.batch + head * params.out_stride.head +
           query * params.out_stride.row;
  for (std::uint32_t column = 4 * lane; column < params.dim_v; column += 4 * kWarpSize) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (std::uint32_t split = 0; split < params.splits; ++split) {
      const float weight = attention::weight_of(__ldg(parts + split).x, largest);
      const float4 part = __ldg(reinterpret_cast<const float4*>(outs + split * params.dim_v + column));
      sum[0] += weight * part.x;
      sum[1] += weight * part.y;
      sum[2] += weight * part.z;
      sum[3] += weight * part.w;
    }
#pragma unroll
    for (float& value : sum) value *= ending.factor;
    const Vec<T, 4> packed = pack<T>(sum);
    *reinterpret_cast<uint2*>(out + column) = make_uint2(packed.words[0], packed.words[1]);
  }
}

}  // namespace infuse::attention_forward
