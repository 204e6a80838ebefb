// A tensor times one number on the device, in place. Where the number is 1, as for the loss that backward() is called
// on, nothing is read but the number.
#pragma once

#include <cstdint>

#include "cross_entropy/single.cuh"
#include "infuse/access.h"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"

namespace infuse::cross_entropy {

constexpr int kScaleThreads = 256;
constexpr int kScaleUnroll = 4;
constexpr int kScaleCtasPerSm = 8;

struct ScaleParams {
  void* data;  // [size] contiguous, aligned to 16 bytes
  const float* scale;
  std::uint64_t size;
};

template <DType kDType>
__global__ __launch_bounds__(kScaleThreads) void scale_kernel(const __grid_constant__ ScaleParams params) {
  using T = Element<kDType>;
  constexpr int kElems = kVectorBytes / static_cast<int>(sizeof(T));
  wait_for_previous_kernel();
  const float scale = *params.scale;
  if (scale == 1.0f) return;
  T* const data = static_cast<T*>(params.data);
  const std::uint64_t vecs = params.size / kElems, step = std::uint64_t{gridDim.x} * kScaleThreads;
  const std::uint64_t thread = std::uint64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  for (std::uint64_t first = thread; first < vecs; first += kScaleUnroll * step) {
    Vec<T, kElems> loaded[kScaleUnroll];
#pragma unroll
    for (int i = 0; i < kScaleUnroll; ++i) {
      loaded[i] = load<Reuse::kOnce, T, kElems>(data + (first + i * step) * kElems, first + i * step < vecs);
    }
#pragma unroll
    for (int i = 0; i < kScaleUnroll; ++i) {
      float values[kElems];
      unpack(loaded[i], values);
#pragma unroll
      for (int j = 0; j < kElems; ++j) values[j] *= scale;
      if (first + i * step < vecs) store(data + (first + i * step) * kElems, pack<T>(values));
    }
  }
  const std::uint64_t single = vecs * kElems + thread;
  if (single < params.size) data[single] = narrow<T>(widen(data[single]) * scale);
}

}  // namespace infuse::cross_entropy
