// The activations of gated MLPs as a run-time value, free of CUDA.
#pragma once

#include <string>

#include "infuse/check.h"

namespace infuse {

enum class Activation : int { kSilu, kGeluTanh, kGeluErf };

// By its name in ops/swiglu.py.
inline Activation activation_named(const char* op, const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  check(name == "gelu_erf", op, "activation, got ", name, ", expected silu, gelu_tanh or gelu_erf");
  return Activation::kGeluErf;
}

}  // namespace infuse
