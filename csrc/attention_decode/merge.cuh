// From what the groups of warps, and the splits, found of a row to its result. The order is fixed, so the same input
// gives the same bits.
//
// In shared memory a warp's 16 rows lie one behind the other, each its sum of values, then largest score and
// denominator, then the same two for the CTA.
#pragma once

#include <cstdint>

#include "attention_decode/filled_rows.cuh"
#include "attention_decode/state.cuh"
#include "infuse/cluster.cuh"
#include "infuse/overlap.cuh"
#include "infuse/vec.cuh"

namespace infuse::attention_decode {

template <int kDim>
constexpr int kSumsBytes = 4 * (kDim + 4);  // of a row

// Four columns of a row that is not divided by its denominator yet.
struct Partial {
  float out[4];
  float largest, denominator;
};

// What 2 is raised to in order to bring something relative to `largest` to `base`, the largest of all.
__device__ __forceinline__ float weight_of(float largest, float base) {
  return power_of_two(largest - (base == kMinusInfinity ? 0.0f : base));
}

// The sum of `count` parts, at most kMost. scalars(i): largest score and denominator of a part; values(i): four columns.
// All loads of a kind are under way together.
template <int kMost, typename Scalars, typename Values>
__device__ __forceinline__ Partial merge_parts(std::uint32_t count, Scalars&& scalars, Values&& values) {
  float2 found[kMost];
  float4 columns[kMost];
  Partial sum{{0.0f, 0.0f, 0.0f, 0.0f}, kMinusInfinity, 0.0f};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    found[i] = make_float2(kMinusInfinity, 0.0f);
    columns[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i < static_cast<int>(count)) {
      found[i] = scalars(i);
      columns[i] = values(i);
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) sum.largest = fmaxf(sum.largest, found[i].x);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const float weight = weight_of(found[i].x, sum.largest);
    sum.out[0] += weight * columns[i].x;
    sum.out[1] += weight * columns[i].y;
    sum.out[2] += weight * columns[i].z;
    sum.out[3] += weight * columns[i].w;
    sum.denominator += weight * found[i].y;
  }
  return sum;
}

// The result of a row that may_be_filled, unless its mask is minus infinity throughout.
template <typename T, typename Element>
__device__ __forceinline__ void take_mean(const Params& params, const Rows& rows, std::uint32_t row,
                                          std::uint32_t column, Partial* sum) {
  const Element* mask = mask_row<Element>(params, rows, row);
  const float largest = largest_of_mask(mask, params.keys);
  if (largest == kMinusInfinity) return;
  const T* values = static_cast<const T*>(params.v) + rows.batch * params.v_stride.batch +
                    rows.kv_head * params.v_stride.head + column;
  const float4 mean = mean_of_filled(mask, params.keys, largest, values, params.v_stride.row);
  *sum = {{mean.x, mean.y, mean.z, mean.w}, 0.0f, 1.0f};
}

// Divides, after the head's sink, and writes. kMayBeFilled: the mask may be one that adds.
template <typename T, bool kMayBeFilled = true>
__device__ __forceinline__ void write_result(const Params& params, std::uint32_t batch, std::uint32_t kv_head,
                                             std::uint32_t row, std::uint32_t column, Partial sum) {
  const std::uint32_t query = params.group.divide(row);
  const std::uint32_t head = kv_head * params.group.divisor + row - query * params.group.divisor;
  if (params.sinks != nullptr) [[unlikely]] {
    const float sink = params.sinks_fp32 ? static_cast<const float*>(params.sinks)[head]
                                         : static_cast<float>(static_cast<const T*>(params.sinks)[head]);
    const float base = fmaxf(sum.largest, sink * kLog2e), weight = weight_of(sum.largest, base);
#pragma unroll
    for (float& value : sum.out) value *= weight;
    sum.denominator = sum.denominator * weight + weight_of(sink * kLog2e, base);
  }
  if constexpr (kMayBeFilled) {
    if (may_be_filled(params, sum.largest)) [[unlikely]] {
      const Rows rows{batch, kv_head, 0, params.rows};
      if (params.mask_kind == Mask::kFloat32) {
        take_mean<T, float>(params, rows, row, column, &sum);
      } else {
        take_mean<T, T>(params, rows, row, column, &sum);
      }
    }
  }
  const float masked = params.nan_for_masked_rows ? __int_as_float(0x7fc00000) : 0.0f;
  const float factor = __frcp_rn(sum.denominator);
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = sum.denominator == 0.0f ? masked : sum.out[i] * factor;
  T* out = static_cast<T*>(params.out) + batch * params.out_stride.batch + head * params.out_stride.head +
           query * params.out_stride.row + column;
  const Vec<T, 4> packed = pack<T>(values);
  *reinterpret_cast<uint2*>(out) = make_uint2(packed.words[0], packed.words[1]);
}

// `count`: of the warp's rows, those that exist.
template <typename Traits>
__device__ __forceinline__ void publish(const Place& place, SharedAddress own_rows, std::uint32_t count,
                                        Sums<Traits::kDim>& sums) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float denominator = sums.denominator[half];
    denominator += __shfl_xor_sync(kFullMask, denominator, 1);
    denominator += __shfl_xor_sync(kFullMask, denominator, 2);
    if (place.lane / 4 + 8 * half >= count) continue;
    const SharedAddress row = own_rows + (place.lane / 4 + 8 * half) * kSumsBytes<Traits::kDim>;
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + (n * 8 + 2 * (place.lane % 4)) * 4),
                   "f"(sums.out[n][2 * half]), "f"(sums.out[n][2 * half + 1])
                   : "memory");
    }
    if (place.lane % 4 == 0) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + Traits::kDim * 4), "f"(sums.largest[half]),
                   "f"(denominator)
                   : "memory");
    }
  }
}

__device__ __forceinline__ float4 load_four(SharedAddress address) {
  float4 values;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address)
               : "memory");
  return values;
}

__device__ __forceinline__ float2 load_two(SharedAddress address) {
  float2 values;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(values.x), "=f"(values.y) : "r"(address) : "memory");
  return values;
}

// Four columns of a CTA's row over all groups of warps. `row` is the row in those of the first group.
template <typename Traits>
__device__ __forceinline__ Partial merge_groups(const Params& params, const Place& place, SharedAddress row,
                                                std::uint32_t column) {
  const std::uint32_t step = params.row_warps * kWarpRows * kSumsBytes<Traits::kDim>;
  return merge_parts<kWarps>(
      place.groups,
      [&](std::uint32_t group) { return load_two(row + group * step + Traits::kDim * 4); },
      [&](std::uint32_t group) { return load_four(row + group * step + column * 4); });
}

// Makes the CTA's sums its first group's, for the cluster to read.
template <typename Traits>
__device__ __forceinline__ void keep_for_cluster(SharedAddress row, std::uint32_t column, const Partial& sum) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(row + column * 4), "f"(sum.out[0]), "f"(sum.out[1]),
               "f"(sum.out[2]), "f"(sum.out[3])
               : "memory");
  if (column == 0) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + Traits::kDim * 4 + 8), "f"(sum.largest),
                 "f"(sum.denominator)
                 : "memory");
  }
}

__device__ __forceinline__ void keep_for_second_kernel(const Params& params, const Rows& rows, std::uint32_t row,
                                                       std::uint32_t column, const Partial& sum) {
  const std::int64_t of_all =
      (static_cast<std::int64_t>(rows.batch) * params.kv_heads + rows.kv_head) * params.rows + rows.first + row;
  const std::int64_t place = of_all * params.splits + blockIdx.x;
  *reinterpret_cast<float4*>(params.part_out + place * params.dim_v + column) =
      make_float4(sum.out[0], sum.out[1], sum.out[2], sum.out[3]);
  if (column == 0) {
    *reinterpret_cast<float2*>(params.part_sums + 2 * place) = make_float2(sum.largest, sum.denominator);
  }
}

// All threads of the CTA, after the last tile.
template <typename Traits>
__device__ __forceinline__ void merge(const Params& params, const Rows& rows, const Place& place, SharedAddress memory,
                                      Sums<Traits::kDim>& sums) {
  constexpr std::uint32_t kRowBytes = kSumsBytes<Traits::kDim>;
  __syncthreads();  // the rings are not needed any more
  const std::uint32_t first = place.row_warp * kWarpRows;
  publish<Traits>(place, memory + (place.group * params.row_warps + place.row_warp) * kWarpRows * kRowBytes,
                  rows.count > first ? rows.count - first : 0, sums);
  __syncthreads();
  const bool in_cluster = params.splits > 1 && params.part_out == nullptr;
  const std::uint32_t columns = params.dim_v / 4, pieces = rows.count * columns;
  for (std::uint32_t i = threadIdx.x; i < pieces; i += kThreads) {
    const std::uint32_t row = i / columns, column = i % columns * 4;
    const Partial sum = merge_groups<Traits>(params, place, memory + row * kRowBytes, column);
    if (in_cluster) {
      keep_for_cluster<Traits>(memory + row * kRowBytes, column, sum);
    } else if (params.splits > 1) {
      keep_for_second_kernel(params, rows, row, column, sum);
    } else {
      write_result<typename Traits::T>(params, rows.batch, rows.kv_head, rows.first + row, column, sum);
    }
  }
  if (!in_cluster) return;
  sync_cluster();
  for (std::uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < pieces; i += params.splits * kThreads) {
    const std::uint32_t row = i / columns, column = i % columns * 4;
    const Partial sum = merge_parts<kPortableCluster>(
        params.splits,
        [&](std::uint32_t rank) {
          const float4 scalars = load_from_cluster(shared_of_cta(memory + row * kRowBytes, rank) + Traits::kDim * 4);
          return make_float2(scalars.z, scalars.w);
        },
        [&](std::uint32_t rank) {
          return load_from_cluster(shared_of_cta(memory + row * kRowBytes, rank) + column * 4);
        });
    write_result<typename Traits::T>(params, rows.batch, rows.kv_head, rows.first + row, column, sum);
  }
  sync_cluster();  // no CTA ends while another reads from it
}

// Both parts' sum.
__device__ __forceinline__ Partial joined(const Partial& a, const Partial& b) {
  Partial sum{{0.0f, 0.0f, 0.0f, 0.0f}, fmaxf(a.largest, b.largest), 0.0f};
  const float weight_a = weight_of(a.largest, sum.largest), weight_b = weight_of(b.largest, sum.largest);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.out[i] = weight_a * a.out[i] + weight_b * b.out[i];
  sum.denominator = weight_a * a.denominator + weight_b * b.denominator;
  return sum;
}

// Four columns of a row over the splits `warp`, `warp` + kWarps and so on.
__device__ __forceinline__ Partial merge_splits(const Params& params, std::uint64_t of_all, std::uint32_t warp,
                                                std::uint32_t column) {
  constexpr int kBatch = 8;  // parts that are read together
  const float2* scalars = reinterpret_cast<const float2*>(params.part_sums) + of_all * params.splits;
  const float* outs = params.part_out + of_all * params.splits * params.dim_v;
  Partial sum{{0.0f, 0.0f, 0.0f, 0.0f}, kMinusInfinity, 0.0f};
#pragma unroll 1
  for (std::uint32_t first = warp; first < params.splits; first += kBatch * kWarps) {
    const Partial part = merge_parts<kBatch>(
        (params.splits - first + kWarps - 1) / kWarps, [&](std::uint32_t i) { return __ldg(scalars + first + i * kWarps); },
        [&](std::uint32_t i) {
          if (column >= params.dim_v) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          return __ldg(reinterpret_cast<const float4*>(outs + (first + i * kWarps) * params.dim_v + column));
        });
    sum = joined(sum, part);
  }
  return sum;
}

// The second kernel: a CTA a row, whose warps take turns with the splits. The kernel behind it may start at once: it
// waits for the end of this one, which waits for that of the first.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Params params) {
  __shared__ float4 values[kWarps][kWarpSize];
  __shared__ float2 scalars[kWarps];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::uint32_t lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto head_row = static_cast<std::uint32_t>(blockIdx.x / params.rows), batch = head_row / params.kv_heads;
  for (std::uint32_t first = 0; first < params.dim_v; first += 4 * kWarpSize) {
    const std::uint32_t column = first + 4 * lane;
    const Partial part = merge_splits(params, blockIdx.x, warp, column);
    values[warp][lane] = make_float4(part.out[0], part.out[1], part.out[2], part.out[3]);
    if (lane == 0) scalars[warp] = make_float2(part.largest, part.denominator);
    __syncthreads();
    if (warp == 0 && column < params.dim_v) {
      const Partial sum = merge_parts<kWarps>(
          kWarps, [&](std::uint32_t i) { return scalars[i]; }, [&](std::uint32_t i) { return values[i][lane]; });
      write_result<T>(params, batch, head_row - batch * params.kv_heads, blockIdx.x - head_row * params.rows, column, sum);
    }
    __syncthreads();
  }
}

}  // namespace infuse::attention_decode
