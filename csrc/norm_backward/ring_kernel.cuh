// The backward that reads its rows once. A CTA is (threads of a row, rows) and walks over the rows. Each thread keeps
// the sums of the weight's and the bias's gradient for its columns in registers until the CTA writes them once, as its
// part. A turn has one barrier, that of the row's sums.
#pragma once

#include <cstdint>
#include <type_traits>

#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"
#include "norm_backward/ring.cuh"
#include "norm_backward/row_sums.cuh"

namespace infuse::norm_backward {

// weight_offset + weight of a thread's columns: in fp32 where there are registers enough, else packed.
template <typename Traits>
class Scales {
  using W = typename Traits::W;
  static constexpr int kElems = Traits::kVecElems;
  static constexpr bool kWide = Traits::kHoldsRow || sizeof(W) == 4;

 public:
  __device__ __forceinline__ Scales(const Params& params, const Columns& columns) {
#pragma unroll
    for (int i = 0; i < Traits::kVecs; ++i) {
      const bool there = params.weight != nullptr && columns.vec(i) < params.row_vecs;
      const W* first = static_cast<const W*>(params.weight) + (there ? std::size_t{columns.vec(i)} * kElems : 0);
      const auto weight = load<Reuse::kShared, W, kElems>(first, there);
      if constexpr (kWide) {
        float scale[kElems];
        scale_of(params, weight, scale);
#pragma unroll
        for (int k = 0; k < kElems; ++k) scale[k] = opaque(scale[k], params.zero);
        held_[i] = pack<float>(scale);
      } else {
        held_[i] = weight;
      }
    }
  }

  __device__ __forceinline__ void get(const Params& params, int i, float (&scale)[kElems]) {
    if constexpr (kWide) {
      unpack(held_[i], scale);
    } else {
      keep_packed(held_[i], params.zero);
      scale_of(params, held_[i], scale);
    }
  }

 private:
  Vec<std::conditional_t<kWide, float, W>, kElems> held_[Traits::kVecs];
};

// Adds up the sums of the CTA's row groups, in order, and writes them to the CTA's part. Uses the dynamic shared
// memory; every thread of the CTA must call it.
template <typename Traits>
__device__ __forceinline__ void write_part(const Params& params, float* parts,
                                           const float (&sums)[Traits::kVecs][Traits::kVecElems]) {
  constexpr int kQuads = Traits::kVecElems / 4;
  const std::uint32_t row_threads = blockDim.x, threads = blockDim.x * blockDim.y;
  const std::uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const SharedAddress shared = dynamic_shared_memory();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Traits::kVecs * kQuads; ++i) {
    const float* quad = sums[i / kQuads] + i % kQuads * 4;
    const float values[4] = {quad[0], quad[1], quad[2], quad[3]};
    store_shared(shared + (i * threads + thread) * 16, pack<float>(values));
  }
  __syncthreads();
  for (std::uint32_t item = thread; item < Traits::kVecs * kQuads * row_threads; item += threads) {
    const std::uint32_t i = item / row_threads, column = item % row_threads;
    const std::uint32_t vec = Columns::of<Traits::kVecs>(column, row_threads).vec(static_cast<int>(i / kQuads));
    if (vec >= params.row_vecs) continue;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (std::uint32_t group = 0; group < blockDim.y; ++group) {
      float values[4];
      unpack(load_shared<float, 4>(shared + (i * threads + group * row_threads + column) * 16), values);
      add(values, total);
    }
    store(parts + std::size_t{blockIdx.x} * params.dim + vec * Traits::kVecElems + i % kQuads * 4, pack<float>(total));
  }
}

// n, g and, with a gate, act and its slope of a vector; g's sums; and, with kSumUp, what the vector adds to the
// gradients of weight and bias.
template <typename Traits>
struct Terms {
  static constexpr int kElems = Traits::kVecElems;
  using Values = float[kElems];

  Values n, g, act, slope;

  template <bool kSumUp>
  __device__ __forceinline__ void take(const Params& params, const Ring<Traits>& ring, const RowStats& stats,
                                       Scales<Traits>& scales, int i, RowMeans& sums, Values& dweight, Values& dbias) {
    Values dy, scale;
    normalize<Traits::kCentered>(ring.get(kX, i), stats, n);
    ring.get_dy(i, dy);
    if constexpr (Traits::kGated) {
      activate(params, ring.get(kGate, i), act, slope);
      apply_gate(params, act, n, dy);
    }
    scales.get(params, i, scale);
    weigh<Traits::kCentered>(dy, scale, n, g, sums);
    if constexpr (kSumUp) {
      add_products(dy, n, dweight);
      if constexpr (Traits::kCentered) add(dy, dbias);
    }
  }

  // Turns dx of the norm into that of x, and gives dgate.
  __device__ __forceinline__ void gate_gradient(const Params& params, const Ring<Traits>& ring, Scales<Traits>& scales,
                                                int i, Values& dx, Values& dgate) const {
    Values x, dy, scale;
    unpack(ring.get(kX, i), x);
    ring.get_dy(i, dy);
    scales.get(params, i, scale);
    infuse::norm_backward::gate_gradient(params, act, slope, x, dy, scale, n, dx, dgate);
  }
};

// Without the minimum of one CTA ptxas aims at two, and spills.
template <typename Traits>
__global__ __launch_bounds__(Traits::kMaxThreads, 1) void ring_kernel(const __grid_constant__ Params params) {
  using X = typename Traits::X;
  constexpr int kVecs = Traits::kVecs, kElems = Traits::kVecElems;
  constexpr bool kCentered = Traits::kCentered, kGated = Traits::kGated, kHoldsRow = Traits::kHoldsRow;
  __shared__ PairSumStorage storage;
  const RowSum row_sum(storage);

  const Columns columns = Columns::of<kVecs>(threadIdx.x, blockDim.x);
  Ring<Traits> ring(params, columns);
  wait_for_previous_kernel();
  // Rows are at most 2^31, and a step and its stages are far fewer: no overflow.
  const std::uint32_t step = gridDim.x * blockDim.y;
  std::uint32_t ahead = blockIdx.x * blockDim.y + threadIdx.y;  // the next row to start
  for (std::uint32_t stage = 0; stage + 1 < params.stages; ++stage, ahead += step) {
    ring.start(ahead);
    ring.start_late(ahead);
  }

  Scales<Traits> scales(params, columns);
  float dweight[kVecs][kElems] = {}, dbias[kCentered ? kVecs : 1][kElems] = {};

  std::uint32_t first_row = blockIdx.x * blockDim.y;
  for (int turn = 0; first_row < params.rows; ++turn, first_row += step, ahead += step) {
    ring.start(ahead);
    ring.wait();
    const std::uint32_t row = first_row + threadIdx.y;
    const bool has_row = row < params.rows;  // if not, the threads still take part in shuffles and barriers
    const RowStats stats = ring.stats();

    Terms<Traits> terms[kVecs];  // dead until pass two unless kHoldsRow
    RowMeans means = {0.0f, 0.0f};
    if (has_row) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        terms[i].template take<true>(params, ring, stats, scales, i, means, dweight[i], dbias[kCentered ? i : 0]);
      }
    }
    ring.start_late(ahead);
    row_sum.add_up<kCentered>(means.gn, means.g, turn);
    means.gn *= stats.rstd < params.constant_rstd ? params.inv_dim : 0.0f;
    means.g *= params.inv_dim;

    if (has_row) {
      const std::int64_t offset = static_cast<std::int64_t>(std::uint64_t{row} * params.dim);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        if constexpr (!kHoldsRow) {
          RowMeans unused = {0.0f, 0.0f};
          terms[i].template take<false>(params, ring, stats, scales, i, unused, dweight[i], dbias[kCentered ? i : 0]);
        }
        float dx[kElems];
        input_gradient<kCentered>(terms[i].g, terms[i].n, means, stats.rstd, dx);
        const auto write = [&](void* tensor, const float (&values)[kElems]) {
          if (columns.vec(i) >= params.row_vecs) return;
          char* address = columns.address<X>(tensor, offset) + i * columns.step_bytes();
          store(reinterpret_cast<X*>(address), pack<X>(values));
        };
        if constexpr (kGated) {
          float dgate[kElems];
          terms[i].gate_gradient(params, ring, scales, i, dx, dgate);
          write(params.dgate, dgate);
        }
        if (params.dsum < params.num_tensors) {
          float dsum[kElems];
          unpack(ring.get(params.dsum, i), dsum);
          add(dsum, dx);
        }
        write(params.dx, dx);
      }
    }
    ring.advance();
  }

  let_next_kernel_start();
  wait_for_copies<0>();
  if (params.weight_parts != nullptr) write_part<Traits>(params, params.weight_parts, dweight);
  if constexpr (kCentered) {
    if (params.bias_parts != nullptr) write_part<Traits>(params, params.bias_parts, dbias);
  }
}

}  // namespace infuse::norm_backward
