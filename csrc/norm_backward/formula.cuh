// The formula of the norms' backward, for one vector of a row at a time, all in fp32:
//
//   n  = (x - mean) * rstd                                  mean is 0 for RMSNorm
//   g  = dy * (weight_offset + weight)                      dy without a weight
//   dx = rstd * (g - mean(g) - n * mean(g * n)) + dsum      without mean(g) for RMSNorm
//   dweight = sum over rows of dy * n;  dbias = sum over rows of dy
//
// With a gate, a = act(gate), behind the norm, y = n * weight * a:
//
//   g is taken with dy * a instead of dy, and so is dweight;  dgate = dy * n * weight * act'(gate)
//
// and before it, n = x * a * rstd: what is called dx above is the gradient of x * a, so
//
//   dgate = dx * x * act'(gate), and then dx = dx * a
//
// Where the forward rounded n before the weight multiply, autograd would round g and the n of dweight to x's dtype as
// well. That is left out here, as Inductor leaves it out: it only adds error.
#pragma once

#include "infuse/activation.cuh"
#include "infuse/vec.cuh"
#include "norm_backward/params.h"

namespace infuse::norm_backward {

struct RowStats {
  float mean, rstd;
};

// act and its derivative of a vector of the gate.
template <typename X, int kElems>
__device__ __forceinline__ void activate(const Params& params, const Vec<X, kElems>& gate, float (&act)[kElems],
                                         float (&slope)[kElems]) {
  float z[kElems];
  unpack(gate, z);
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    const float s = sigmoid<X>(z[i]), rest = 1.0f - s;
    act[i] = params.gate_is_silu ? z[i] * s : s;
    slope[i] = params.gate_is_silu ? s * fmaf(z[i], rest, 1.0f) : s * rest;
  }
}

// Turns x * rstd into n, and dy into what g and dweight are taken with.
template <int kElems>
__device__ __forceinline__ void apply_gate(const Params& params, const float (&act)[kElems], float (&n)[kElems],
                                           float (&dy)[kElems]) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    n[i] *= params.gate_first ? act[i] : 1.0f;
    dy[i] *= params.gate_first ? 1.0f : act[i];
  }
}

// dgate, and dx from the gradient of what the norm read. scale, n: of the norm; dy: what reached y.
template <int kElems>
__device__ __forceinline__ void gate_gradient(const Params& params, const float (&act)[kElems],
                                              const float (&slope)[kElems], const float (&x)[kElems],
                                              const float (&dy)[kElems], const float (&scale)[kElems],
                                              const float (&n)[kElems], float (&dx)[kElems], float (&dgate)[kElems]) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    dgate[i] = slope[i] * (params.gate_first ? dx[i] * x[i] : dy[i] * n[i] * scale[i]);
    dx[i] *= params.gate_first ? act[i] : 1.0f;
  }
}

// Means over a row, and sums while they are taken.
struct RowMeans {
  float g, gn;
};

template <bool kCentered, typename X, int kElems>
__device__ __forceinline__ void normalize(const Vec<X, kElems>& x, const RowStats& stats, float (&n)[kElems]) {
  unpack(x, n);
#pragma unroll
  for (int i = 0; i < kElems; ++i) n[i] = (kCentered ? n[i] - stats.mean : n[i]) * stats.rstd;
}

// Without a weight it is all zeros here, and weight_offset is 1.
template <typename W, int kElems>
__device__ __forceinline__ void scale_of(const Params& params, const Vec<W, kElems>& weight, float (&scale)[kElems]) {
  unpack(weight, scale);
#pragma unroll
  for (int i = 0; i < kElems; ++i) scale[i] += params.weight_offset;
}

// g, its sum and that of g * n.
template <bool kCentered, int kElems>
__device__ __forceinline__ void weigh(const float (&dy)[kElems], const float (&scale)[kElems], const float (&n)[kElems],
                                      float (&g)[kElems], RowMeans& sums) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    g[i] = dy[i] * scale[i];
    sums.gn = fmaf(g[i], n[i], sums.gn);
    if constexpr (kCentered) sums.g += g[i];
  }
}

template <bool kCentered, int kElems>
__device__ __forceinline__ void input_gradient(const float (&g)[kElems], const float (&n)[kElems],
                                               const RowMeans& means, float rstd, float (&dx)[kElems]) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) {
    const float rest = fmaf(-n[i], means.gn, kCentered ? g[i] - means.g : g[i]);
    dx[i] = rest * rstd;
  }
}

template <int kElems>
__device__ __forceinline__ void add(const float (&values)[kElems], float (&sums)[kElems]) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) sums[i] += values[i];
}

template <int kElems>
__device__ __forceinline__ void add_products(const float (&a)[kElems], const float (&b)[kElems],
                                             float (&sums)[kElems]) {
#pragma unroll
  for (int i = 0; i < kElems; ++i) sums[i] = fmaf(a[i], b[i], sums[i]);
}

}  // namespace infuse::norm_backward
