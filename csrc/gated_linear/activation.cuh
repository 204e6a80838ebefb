// The activations of the gate, of fp32 values, as far as two bytes of the result show.
#pragma once

#include "gated_linear/params.h"

namespace infuse::gated_linear {

// Two instructions of the special unit and no steps for results below fp32's smallest normal number, which are flushed.
__device__ __forceinline__ float fast_sigmoid(float value) {
  constexpr float kMinusLog2e = -1.4426950408889634f;
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(kMinusLog2e * value));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float gate) {
  if constexpr (kActivation == Activation::kSilu) {
    return gate * fast_sigmoid(gate);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // 1 + tanh(z) = 2 sigmoid(2 z)
    constexpr float kTwoBeta = 1.5957691216057308f, kKappa = 0.044715f;
    return gate * fast_sigmoid(kTwoBeta * (gate + kKappa * gate * gate * gate));
  } else {
    return 0.5f * gate * (1.0f + erff(gate * 0.7071067811865476f));
  }
}

}  // namespace infuse::gated_linear
