// Stands in for csrc/include/infuse/memory.cuh on the CPU: the same functions, with checks.
#pragma once

#include <cstring>

#include "cuda_on_cpu.h"
#include "infuse/vec.cuh"

namespace infuse {

enum class Reuse { kOnce, kShared };

template <typename T, int kElems>
constexpr int kAccessBytes = Vec<T, kElems>::kBytes < 16 ? Vec<T, kElems>::kBytes : 16;

template <Reuse kReuse>
void load_16_bytes(std::uint32_t* words, const void* address, bool valid) {
  if (!valid) return;
  emulation::check_access(address, 16, 16);
  std::memcpy(words, address, 16);
}

template <Reuse kReuse, typename T, int kElems>
Vec<T, kElems> load(const T* address, bool valid) {
  Vec<T, kElems> vec = {};
  if (valid) {
    emulation::check_access(address, vec.kBytes, kAccessBytes<T, kElems>);
    std::memcpy(vec.words, address, vec.kBytes);
  }
  return vec;
}

template <typename T, int kElems>
void store(T* address, const Vec<T, kElems>& vec) {
  emulation::check_access(address, vec.kBytes, kAccessBytes<T, kElems>);
  std::memcpy(static_cast<void*>(address), vec.words, vec.kBytes);
}

}  // namespace infuse
