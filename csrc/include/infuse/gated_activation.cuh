// The activations of gated MLPs and their derivatives, of fp32 values; formulas as in ops/swiglu.py.
#pragma once

#include <type_traits>

#include "infuse/activation.cuh"
#include "infuse/gated_activation.h"

namespace infuse {

// act(g) and act'(g).
struct ActivationAndSlope {
  float act, slope;
};

// The argument of gelu_tanh's tanh, and its derivative. tanh(y) = 2 sigmoid(2 y) - 1, so act = g sigmoid(2 y).
struct GeluArgument {
  float y, slope;
};

__device__ __forceinline__ GeluArgument gelu_argument(float g) {
  constexpr float kBeta = 0.7978845608028654f, kKappa = 0.044715f;  // sqrt(2 / pi)
  const float square = g * g;
  return {kBeta * fmaf(kKappa * square, g, g), kBeta * fmaf(3.0f * kKappa, square, 1.0f)};
}

// The standard normal distribution, to 1e-7, of which power = exp(-g^2 / 2) is the better part (Abramowitz and Stegun,
// 7.1.26); erff and the density on its own would be twice the work.
__device__ __forceinline__ float normal_cdf(float g, float power) {
  const float t = __fdividef(1.0f, fmaf(0.3275911f * 0.7071067811865476f, fabsf(g), 1.0f));
  float sum = fmaf(t, 1.061405429f, -1.453152027f);
  sum = fmaf(t, sum, 1.421413741f);
  sum = fmaf(t, sum, -0.284496736f);
  sum = fmaf(t, sum, 0.254829592f);
  const float tail = 0.5f * t * sum * power;
  return g < 0.0f ? tail : 1.0f - tail;
}

// X: the type to which the result is rounded.
template <typename X, Activation kKind>
__device__ __forceinline__ float activate(float g) {
  if constexpr (kKind == Activation::kSilu) return g * sigmoid<X>(g);
  if constexpr (kKind == Activation::kGeluTanh) return g * sigmoid<X>(2.0f * gelu_argument(g).y);
  return g * 0.5f * (1.0f + erff(g * 0.7071067811865476f));
}

template <typename X, Activation kKind>
__device__ __forceinline__ ActivationAndSlope activate_with_slope(float g) {
  if constexpr (kKind == Activation::kSilu) {
    const float s = sigmoid<X>(g);
    return {g * s, s * fmaf(g, 1.0f - s, 1.0f)};
  } else if constexpr (kKind == Activation::kGeluTanh) {
    const GeluArgument argument = gelu_argument(g);
    const float s = sigmoid<X>(2.0f * argument.y);
    return {g * s, fmaf(2.0f * g * s * (1.0f - s), argument.slope, s)};
  } else {
    constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
    const float power = __expf(-0.5f * g * g), cdf = normal_cdf(g, power);
    return {g * cdf, fmaf(g * kDensity, power, cdf)};
  }
}

// Calls `function` with std::integral_constant<Activation, kind>; uniform, so the branch costs nothing beside the work
// on many elements.
template <typename Function>
__device__ __forceinline__ void with_activation(Activation kind, Function&& function) {
  if (kind == Activation::kSilu) {
    function(std::integral_constant<Activation, Activation::kSilu>{});
  } else if (kind == Activation::kGeluTanh) {
    function(std::integral_constant<Activation, Activation::kGeluTanh>{});
  } else {
    function(std::integral_constant<Activation, Activation::kGeluErf>{});
  }
}

}  // namespace infuse
