// Element types as a run-time value, free of torch and of CUDA's own types.
#pragma once

namespace infuse {

enum class DType : int { kNone, kBFloat16, kFloat16, kFloat32 };

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kNone: return "none";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat32: return "float32";
  }
  return "unknown";
}

constexpr int size_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kNone ? 0 : 2;
}

}  // namespace infuse
