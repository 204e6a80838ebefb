// Errors of the host side: every message reads `op: what, got ..., expected ...`.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace infuse {

// Text of one part of a message. No <sstream>: it costs every translation unit half a second.
inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
template <typename Number>
std::string text(Number part) {
  return std::to_string(part);
}

template <typename... Parts>
std::string concat(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

// A std::runtime_error crosses torch's C interface and reaches Python as RuntimeError.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  throw std::runtime_error(concat(op, ": ", parts...));
}

template <typename... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (!condition) fail(op, parts...);
}

inline void check_cuda(cudaError_t status, const char* op, const std::string& what) {
  if (status != cudaSuccess) {
    fail(op, what, ", got ", cudaGetErrorName(status), " (", cudaGetErrorString(status), "), expected cudaSuccess");
  }
}

}  // namespace infuse
