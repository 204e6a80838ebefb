// The end of a tile of a gated linear on Hopper: a thread's sums hold the gate and the up projection of the same places.
// Both are rounded, as they would be between kernels, which leaves half as many registers; activation and product come
// later, beside the next tile's products, and go through shared memory to the copy engine.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gated_linear/activation.cuh"
#include "gated_linear/params.h"
#include "gemm/kernel.cuh"
#include "infuse/mma.cuh"
#include "infuse/tma.cuh"
#include "infuse/vec.cuh"

namespace infuse::gated_linear {

struct EpilogueParams {
  CUtensorMap out;       // boxes of 64 rows and of 64 columns (swizzled), or of all columns of a tile if these are no
  CUtensorMap gate, up;  // multiple of 64; halves of gate_up
  Params base;
};

// kColumns: of a tile of the result.
template <typename T, int kColumns>
struct Epilogue {
  using Params = EpilogueParams;
  static constexpr int kSums = 2 * kColumns / 2;
  static constexpr bool kSwizzled = kColumns % kSwizzledColumns == 0;
  static constexpr int kRowBytes = kSwizzled ? kSwizzledRowBytes : 2 * kColumns;  // in shared memory
  static constexpr int kPieces = kColumns / 8;  // of 16 bytes, in a row
  static constexpr int kSteps = 2 + kPieces / 2;
  static constexpr int kBlockBytes = gemm::kGroupRows * kSwizzledRowBytes;

  const EpilogueParams& params;
  SharedAddress shared;
  int barrier;
  std::uint32_t thread;
  gemm::Tile tile{};  // whose gate and up were taken
  std::uint32_t row = 0;
  std::uint32_t taken[kSums / 2];  // two columns each; the gate's, then the up projection's

  __device__ __forceinline__ Epilogue(const EpilogueParams& given, SharedAddress memory, std::uint32_t group)
      : params(given),
        shared(memory),
        barrier(gemm::kEpilogueBarrier + static_cast<int>(group)),
        thread(threadIdx.x % gemm::kWarpgroup) {}

  __device__ __forceinline__ void sync() const { wait_at_named(barrier, gemm::kWarpgroup); }

  // Where 16 bytes lie in shared memory.
  __device__ __forceinline__ SharedAddress piece(std::uint32_t row, std::uint32_t number) const {
    if constexpr (!kSwizzled) return shared + row * kRowBytes + number * 16;
    return shared + number / 8 * kBlockBytes + row * kRowBytes + ((number ^ row) % 8) * 16;
  }

  // Four words of 16 columns into shared memory: word(block, half) are those of columns 8 block .. 8 block + 7 and of
  // row or row + 8.
  template <typename Word>
  __device__ __forceinline__ void stage(int block, const Word& word) const {
    const std::uint32_t lane = thread % kWarpSize;
    const std::uint32_t words[4] = {word(block, 0), word(block, 1), word(block + 1, 0), word(block + 1, 1)};
    store_matrices(piece(thread / kWarpSize * 16 + lane % 16, static_cast<std::uint32_t>(block) + lane / 16), words);
  }

  __device__ __forceinline__ void begin_store() const {
    if (thread == 0) wait_for_box_reads<0>();
    sync();
  }

  // From shared memory to memory: by the map, or where rows are cut off to `data`.
  __device__ __forceinline__ void end_store(const CUtensorMap& map, T* data, std::int64_t stride) const {
    const bool is_cut = params.base.ends != nullptr && row + gemm::kGroupRows > tile.row_end;
    if (!is_cut) fence_shared_for_async();
    sync();
    if (is_cut) {
      store_rows(data, stride);
    } else if (thread == 0) {
      constexpr int kBox = kSwizzled ? kSwizzledColumns : kColumns;
#pragma unroll
      for (int column = 0; column < kColumns; column += kBox) {
        store_box(map, shared + column / kBox * kBlockBytes, static_cast<std::int32_t>(tile.column) + column,
                  static_cast<std::int32_t>(row), 0, 0, L2::kEvictFirst);
      }
      end_box_stores();
    }
  }

  // Of a tile that ends within the rows: those of the next group belong to others.
  __device__ __forceinline__ void store_rows(T* data, std::int64_t stride) const {
    for (std::uint32_t i = thread; i < gemm::kGroupRows * kPieces; i += gemm::kWarpgroup) {
      const std::uint32_t own_row = i / kPieces, number = i % kPieces, column = tile.column + 8 * number;
      if (row + own_row >= tile.row_end || column >= params.base.columns) continue;
      const Vec<T, 8> vec = load_shared<T, 8>(piece(own_row, number));
      *reinterpret_cast<uint4*>(data + static_cast<std::int64_t>(row + own_row) * stride + column) =
          make_uint4(vec.words[0], vec.words[1], vec.words[2], vec.words[3]);
    }
  }

  // Two neighbouring columns of the bias, 0 beyond its end.
  __device__ __forceinline__ float2 bias_of(const void* bias, std::uint32_t column) const {
    if (bias == nullptr || column >= params.base.columns) return make_float2(0.0f, 0.0f);
    const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(bias) + column);
    return make_float2(Cast<T>::low(pair), Cast<T>::high(pair));
  }

  __device__ __forceinline__ void add_biases(float (&sums)[kSums]) const {
    const std::uint32_t first = tile.column + 2 * (thread % 4);
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      const int block = i / 4 % kPieces;
      const float2 bias = bias_of(i < kSums / 2 ? params.base.gate_bias : params.base.up_bias, first + 8 * block);
      sums[i] += bias.x;
      sums[i + 1] += bias.y;
      sums[i + 2] += bias.x;
      sums[i + 3] += bias.y;
    }
  }

  // The gate, or the up projection, as the backward reads it.
  template <int kWhich>
  __device__ __forceinline__ void keep() const {
    begin_store();
#pragma unroll
    for (int block = 0; block < kPieces; block += 2) {
      stage(block, [&](int of, int half) { return taken[kWhich * (kSums / 4) + 2 * of + half]; });
    }
    const std::int64_t columns = params.base.columns;
    end_store(kWhich == 0 ? params.gate : params.up, static_cast<T*>(params.base.gate_up) + kWhich * columns,
              2 * columns);
  }

  __device__ __forceinline__ void take(const gemm::Tile& given, std::uint32_t rows, float (&sums)[kSums]) {
    tile = given;
    row = given.row + rows;
    if (params.base.gate_bias != nullptr || params.base.up_bias != nullptr) add_biases(sums);
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) taken[i] = Cast<T>::pack(sums[2 * i], sums[2 * i + 1]);
    pin(taken);  // here and not where they are used, beside sums of the next tile
  }

  template <Activation kActivation>
  __device__ __forceinline__ void stage_product(int block) const {
    stage(block, [&](int of, int half) {
      const std::uint32_t gate = taken[2 * of + half], up = taken[kSums / 4 + 2 * of + half];
      const std::uint32_t active =
          Cast<T>::pack(activate<kActivation>(Cast<T>::low(gate)), activate<kActivation>(Cast<T>::high(gate)));
      return Cast<T>::pack(Cast<T>::low(active) * Cast<T>::low(up), Cast<T>::high(active) * Cast<T>::high(up));
    });
  }

  // Gate and up if they are kept, then 16 columns of the product at a time.
  template <int kStep>
  __device__ __forceinline__ void step() const {
    if (row >= tile.row_end) return;
    if constexpr (kStep < 2) {
      if (params.base.gate_up != nullptr) keep<kStep>();
      return;
    }
    if constexpr (kStep == 2) begin_store();
    constexpr int kBlock = 2 * kStep - 4;
    switch (params.base.activation) {
      case Activation::kSilu: stage_product<Activation::kSilu>(kBlock); break;
      case Activation::kGeluTanh: stage_product<Activation::kGeluTanh>(kBlock); break;
      case Activation::kGeluErf: stage_product<Activation::kGeluErf>(kBlock); break;
    }
    if constexpr (kStep + 1 == kSteps) end_store(params.out, static_cast<T*>(params.base.out), params.base.out_stride);
  }

  __device__ __forceinline__ void finish() const {
    if (thread == 0) wait_for_box_reads<0>();
  }
};

}  // namespace infuse::gated_linear
