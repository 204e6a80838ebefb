// The only step from run-time values to template arguments. A value that has no instantiation is an error that names
// it and lists those that exist.
#pragma once

#include <string>
#include <type_traits>

#include "infuse/check.h"
#include "infuse/dtype.h"

namespace infuse {

// Calls `function` with std::integral_constant<int, value>.
template <int... kValues, typename Function>
void dispatch_int(const char* op, const char* what, int value, Function&& function) {
  bool found = false;
  ((!found && value == kValues ? (found = true, function(std::integral_constant<int, kValues>{})) : void()), ...);
  if (!found) {
    std::string known;
    ((known += (known.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    fail(op, what, ", got ", value, ", expected one of ", known);
  }
}

// Calls `function` with std::integral_constant<DType, dtype>.
template <typename Function>
void dispatch_dtype(const char* op, const char* what, DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16: return function(std::integral_constant<DType, DType::kFloat16>{});
    case DType::kFloat32: return function(std::integral_constant<DType, DType::kFloat32>{});
    default: fail(op, "dtype of ", what, ", got ", name(dtype), ", expected bfloat16, float16 or float32");
  }
}

}  // namespace infuse
