// The warpgroups that multiply: 64 keys of the CTA's 128 each, over all blocks of queries.
//
//   S = K Q^T, dP = V dout^T          transposed, so that P, rounded, is an operand A in registers
//   P = 2^(scale_log2 S - lse_log2)   dV += P dout
//   dS = P (dP - delta)               dK += dS Q, dQ = dS^T K: dS through shared memory
//
// One warpgroup's products run beside the other's exponentials, and its own: S of the next block of queries starts
// before dQ and dK of this one (Shah et al. 2024, FlashAttention-3).
#pragma once

#include "attention_backward/dq_tiles.cuh"
#include "attention_backward/wgmma_scores.cuh"
#include "infuse/mma.cuh"
#include "infuse/wgmma.cuh"

namespace infuse::attention_backward {

constexpr int kAllBarrier = 1;  // of both warpgroups

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void store_matrices(SharedAddress row, const std::uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

template <typename T, typename Sizes>
struct Consumer : Scores<T, Sizes> {
  using Base = Scores<T, Sizes>;
  using Base::apply_mask, Base::exponentiate, Base::hide_out_of_bounds, Base::pack_scores, Base::differentiate;
  using Base::params, Base::group, Base::warp, Base::lane, Base::place;
  static constexpr bool kDqByColumns = Sizes::kDim == 128;
  static constexpr bool kEarlyDv = Sizes::kDim == 128;  // registers for it
  static constexpr int kDqThread = Sizes::kQueries * Sizes::kDim / (128 * Sizes::kGroups);

  const SharedAddress shared;
  const Barriers<Sizes> barriers;

  __device__ __forceinline__ Consumer(const Params& params, SharedAddress shared, Barriers<Sizes> barriers)
      : Base(params), shared(shared), barriers(barriers) {}

  // scores = own keys (of K or V) x queries (of Q or dO).
  __device__ __forceinline__ void multiply_transposed(float (&scores)[Sizes::kQueries / 2], SharedAddress keys,
                                                      SharedAddress queries) const {
    const std::uint64_t a = matrix_by_rows(keys + group * 64 * 128), b = matrix_by_rows(queries);
#pragma unroll
    for (int step = 0; step < Sizes::kDim / 16; ++step) {
      const int half = step / 4, inner = step % 4 * 32;
      multiply<T, Sizes::kQueries, false, false>(scores, moved(a, half * Sizes::kKeyHalf + inner),
                                                  moved(b, half * Sizes::kQueryHalf + inner), step > 0);
    }
    end_products();
  }

  // sums += weights x rows (of dO or Q).
  __device__ __forceinline__ void accumulate(float (&sums)[Sizes::kDim / 2],
                                             const std::uint32_t (&weights)[Sizes::kQueries / 16][4],
                                             SharedAddress rows) const {
    const std::uint64_t b = matrix_by_columns(rows, Sizes::kQueryHalf);
#pragma unroll
    for (int step = 0; step < Sizes::kQueries / 16; ++step) {
      multiply<T, Sizes::kDim, true>(sums, weights[step], moved(b, step * 2048), true);
    }
    end_products();
  }

  // The same with the weights in a tile [keys, queries] in shared memory.
  __device__ __forceinline__ void accumulate_shared(float (&sums)[Sizes::kDim / 2], SharedAddress weights,
                                                    SharedAddress rows) const {
    const std::uint64_t a = matrix_by_rows(weights + group * 64 * 128), b = matrix_by_columns(rows, Sizes::kQueryHalf);
#pragma unroll
    for (int step = 0; step < Sizes::kQueries / 16; ++step) {
      multiply<T, Sizes::kDim, false, true>(sums, moved(a, step / 4 * Sizes::kScoreHalf + step % 4 * 32),
                                             moved(b, step * 2048), true);
    }
    end_products();
  }

  // A warpgroup has a half of the head's columns, or where they are few a half of the queries.
  __device__ __forceinline__ void multiply_dq(float (&dq)[kDqThread], SharedAddress scores) const {
    const std::uint64_t a = matrix_by_columns(scores + (kDqByColumns ? 0 : group * Sizes::kScoreHalf), 0);
    const std::uint64_t b = matrix_by_columns(shared + Sizes::kK + (kDqByColumns ? group * Sizes::kKeyHalf : 0), 0);
#pragma unroll
    for (int step = 0; step < Sizes::kKeys / 16; ++step) {
      multiply<T, 64, true, true>(dq, moved(a, step * 2048), moved(b, step * 2048), step > 0);
    }
    end_products();
  }

  // Where a lane's row of the first four matrices of its warp's rows lies; the next four are 32 bytes further before
  // the swizzle.
  __device__ __forceinline__ SharedAddress matrix_row(SharedAddress tile) const {
    const int row = group * 64 + warp * 16 + lane % 16;
    return tile + row * 128 + ((lane / 16) ^ (row % 8)) * 16;
  }

  // To a tile [keys, queries] in shared memory.
  __device__ __forceinline__ void store_scores(const std::uint32_t (&packed)[Sizes::kQueries / 16][4],
                                               SharedAddress tile) const {
    const SharedAddress own = matrix_row(tile);
#pragma unroll
    for (int i = 0; i < Sizes::kQueries / 16; ++i) {
      store_matrices((own ^ (i % 4 * 32)) + i / 4 * Sizes::kScoreHalf, packed[i]);
    }
    fence_shared_for_async();
  }

  // The warp's 16 rows, in the order of dq_tiles.cuh.
  __device__ __forceinline__ void add_dq(const float (&dq)[kDqThread], std::uint32_t row) const {
    const std::uint32_t row_tile = row / kTileRows + warp + (kDqByColumns ? 0 : 4 * group);
    float* tiles = params.dq_sum + dq_tile_offset(row_tile, kDqByColumns ? 8 * group : 0, Sizes::kDim);
#pragma unroll
    for (int i = 0; i < kDqThread / 4; ++i) {
      add_to_dq_tile(tiles + i * kTileFloats, lane, {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]});
    }
  }

  // What the step at this place is. Only the lane reads it that gives the place back by `release`.
  __device__ __forceinline__ Step read_step(int stage) const {
    Step step{};
    if (lane == 0) step = load_step(shared + Sizes::kSteps + Sizes::kStepBytes * stage);
    step.row = __shfl_sync(0xffffffffu, step.row, 0);
    step.query = __shfl_sync(0xffffffffu, step.query, 0);
    step.head = __shfl_sync(0xffffffffu, step.head, 0);
    step.flags = __shfl_sync(0xffffffffu, step.flags, 0);
    return step;
  }

  // After the other lanes of the warp have read as well.
  __device__ __forceinline__ void release(SharedAddress barrier) const {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  }

  // Own rows of a tile [keys, dim] in shared memory, then to global memory.
  __device__ __forceinline__ void write_rows(const float (&sums)[Sizes::kDim / 2], float factor, SharedAddress tile,
                                             void* target, int dim, const Strides& stride) const {
    const SharedAddress own = matrix_row(tile);
#pragma unroll
    for (int i = 0; i < Sizes::kDim / 16; ++i) {
      std::uint32_t words[4];
#pragma unroll
      for (int j = 8 * i; j < 8 * i + 8; j += 2) {
        words[j / 2 % 4] = Cast<T>::pack(sums[j] * factor, sums[j + 1] * factor);
      }
      store_matrices((own ^ (i % 4 * 32)) + i / 4 * Sizes::kKeyHalf, words);
    }
    __syncwarp();
    T* rows = static_cast<T*>(target) + place.batch * stride.batch + place.kv_head * stride.head;
    constexpr int kPieces = Sizes::kDim / 8;
#pragma unroll 4
    for (int i = 0; i < 16 * kPieces / 32; ++i) {
      const int r = group * 64 + warp * 16 + (i * 32 + lane) / kPieces, piece = lane % kPieces;
      const SharedAddress half = tile + piece / 8 * Sizes::kKeyHalf;
      const Vec<T, 8> vec = load_shared<T, 8>(half + r * 128 + ((piece % 8) ^ (r % 8)) * 16);
      const std::uint32_t key = place.key + r;
      if (key < params.keys && piece * 8 < dim) {
        T* address = rows + key * stride.row + piece * 8;
        *reinterpret_cast<uint4*>(address) = make_uint4(vec.words[0], vec.words[1], vec.words[2], vec.words[3]);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    float dk[Sizes::kDim / 2], dv[Sizes::kDim / 2];
#pragma unroll
    for (int i = 0; i < Sizes::kDim / 2; ++i) dk[i] = dv[i] = 0.0f;
    sum_over_queries(dk, dv);
    wait_at_named(kAllBarrier, 128 * Sizes::kGroups);  // K has been read by both
    write_rows(dv, 1.0f, shared + Sizes::kV, params.dv, static_cast<int>(params.dim_v), params.dv_stride);
    write_rows(dk, params.scale, shared + Sizes::kK, params.dk, static_cast<int>(params.dim), params.dk_stride);
  }

  // A step begins with its S known and dK of the last step under way. In flight, in order: dK of the last step, dP, dV,
  // S of the next step, dQ, dK.
  __device__ __forceinline__ void sum_over_queries(float (&dk)[Sizes::kDim / 2], float (&dv)[Sizes::kDim / 2]) const {
    RingPlace<Sizes::kStages> ring, next;
    std::uint32_t turn = 0;
    float scores[Sizes::kQueries / 2];
    wait(barriers.keys(), 0);
    wait(barriers.q_full(0), 0);
    Step step = read_step(0);
    next.advance();
    fence_products();
    multiply_transposed(scores, shared + Sizes::kK, shared + Sizes::kQ);
    wait_for_products<0>();
    pin(scores);
    while (!(step.flags & kEnd)) {
      const int stage = ring.stage;
      const SharedAddress q = shared + Sizes::kQ + stage * Sizes::kQueryBytes;
      const SharedAddress dout = shared + Sizes::kDout + stage * Sizes::kQueryBytes;
      float dp[Sizes::kQueries / 2];
      wait(barriers.dout_full(stage), ring.parity);
      fence_products();
      multiply_transposed(dp, shared + Sizes::kV, dout);
      if (step.flags & kReadMask) apply_mask(scores, step);
      exponentiate(scores, shared + Sizes::kLse + stage * Sizes::kRowBytes);
      if (step.flags & kBounds) hide_out_of_bounds(scores, step);
      pin(scores);
      std::uint32_t p[Sizes::kQueries / 16][4], ds[Sizes::kQueries / 16][4];
      const auto add_dv = [&] {
        pack_scores(p, scores);
        fence_products();
        accumulate(dv, p, dout);
      };
      if constexpr (kEarlyDv) {
        add_dv();
        wait_for_products<1>();
      } else {
        wait_for_products<0>();
      }
      pin(dp);
      if (turn > 0) release(barriers.q_empty((stage + Sizes::kStages - 1) % Sizes::kStages));  // dK of the last step
      differentiate(dp, scores, shared + Sizes::kDelta + stage * Sizes::kRowBytes);
      pack_scores(ds, dp);
      const SharedAddress tile = shared + Sizes::kScores + (turn & 1) * Sizes::kScoreBytes;
      store_scores(ds, tile);
      if constexpr (!kEarlyDv) add_dv();
      wait(barriers.q_full(next.stage), next.parity);
      const Step next_step = read_step(next.stage);
      fence_products();
      multiply_transposed(scores, shared + Sizes::kK, shared + Sizes::kQ + next.stage * Sizes::kQueryBytes);
      wait_at_named(kAllBarrier, 128 * Sizes::kGroups);
      wait_for_products<1>();  // dV
      pin(dv);
      release(barriers.dout_empty(stage));
      float dq[kDqThread];
      fence_products();
      multiply_dq(dq, tile);
      accumulate_shared(dk, tile, q);
      wait_for_products<1>();
      pin(dq);
      pin(scores);
      add_dq(dq, step.row);
      ++turn;
      step = next_step;
      ring.advance();
      next.advance();
    }
    wait(barriers.dout_full(ring.stage), ring.parity);
    wait_for_products<0>();
    pin(dk);
    pin(dv);
  }
};

#endif

}  // namespace infuse::attention_backward
