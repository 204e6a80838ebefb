// The backward of a gated activation in one pass, out = act(gate) * up:
//
//   dgate = dout * up * act'(gate)    dup = dout * act(gate)
//
// in fp32, each rounded once, and out again with the forward's rounding: act to T, then the product.
#pragma once

#include "gated_backward/params.h"
#include "infuse/gated_activation.cuh"
#include "infuse/memory.cuh"
#include "infuse/overlap.cuh"

namespace infuse::gated_backward {

// What becomes of one vector.
template <typename T, int kElems>
struct Gradients {
  Vec<T, kElems> dgate, dup, out;
};

template <Activation kKind, typename T, int kElems>
__device__ __forceinline__ Gradients<T, kElems> differentiate(const Vec<T, kElems>& dout_vec,
                                                              const Vec<T, kElems>& gate_vec,
                                                              const Vec<T, kElems>& up_vec) {
  float dout[kElems], gate[kElems], up[kElems], dgate[kElems], dup[kElems], act[kElems];
  unpack(dout_vec, dout);
  unpack(gate_vec, gate);
  unpack(up_vec, up);
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    const ActivationAndSlope found = activate_with_slope<T, kKind>(gate[i]);
    dgate[i] = dout[i] * up[i] * found.slope;
    dup[i] = dout[i] * found.act;
    act[i] = found.act;
  }
  round_through<T>(act);
#pragma unroll
  for (int i = 0; i < kElems; ++i) act[i] *= up[i];
  return {pack<T>(dgate), pack<T>(dup), pack<T>(act)};
}

template <typename T, int kElems, int kVecs>
__global__ void __launch_bounds__(256) gated_backward_kernel(const __grid_constant__ Params params) {
  wait_for_previous_kernel();
  const std::uint32_t first = blockIdx.x * kVecs * blockDim.x + threadIdx.x;
  Vec<T, kElems> dout[kVecs], gate[kVecs], up[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const std::uint32_t vec = first + i * blockDim.x, row = params.row_vecs.divide(vec);
    const std::uint32_t column = (vec - row * params.row_vecs.divisor) * kElems;
    const bool valid = vec < params.vecs;
    const T* of_row = static_cast<const T*>(params.gate_up) + row * params.gate_up_stride + column;
    gate[i] = load<Reuse::kOnce, T, kElems>(of_row, valid);
    up[i] = load<Reuse::kOnce, T, kElems>(of_row + params.dim, valid);
    const T* of_dout = static_cast<const T*>(params.dout) + row * params.dout_stride + column;
    dout[i] = load<Reuse::kOnce, T, kElems>(of_dout, valid);
  }
  let_next_kernel_start();
  with_activation(params.activation, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const std::uint32_t vec = first + i * blockDim.x, row = params.row_vecs.divide(vec);
      if (vec >= params.vecs) continue;
      const auto found = differentiate<decltype(kind)::value>(dout[i], gate[i], up[i]);
      const std::size_t place = static_cast<std::size_t>(vec) * kElems;
      // Row r of dgate begins where row 2 r of out would.
      T* const of_row = static_cast<T*>(params.dgate_up) + place + static_cast<std::size_t>(row) * params.dim;
      store(of_row, found.dgate);
      store(of_row + params.dim, found.dup);
      if (params.out != nullptr) store(static_cast<T*>(params.out) + place, found.out);
    }
  });
}

}  // namespace infuse::gated_backward
