// Stands in for csrc/include/infuse/async_copy.cuh on the CPU: the same functions, with checks. What a copy will
// overwrite is spoilt when the copy starts, and written when it is waited for.
#pragma once

#include <cstring>

#include "cuda_on_cpu.h"
#include "infuse/vec.cuh"

namespace infuse {

using SharedAddress = std::uint32_t;

inline SharedAddress dynamic_shared_memory() { return 0; }

inline char* shared_bytes_at(SharedAddress address, std::size_t bytes) {
  if (address % bytes != 0) emulation::die("misaligned access to shared memory");
  if (address + bytes > emulation::shared_memory.size()) emulation::die("beyond the shared memory");
  return emulation::shared_memory.data() + address;
}

template <int kBytes>
void copy_async(SharedAddress shared, const void* source, bool valid) {
  if (!valid) return;
  char* target = shared_bytes_at(shared, kBytes);
  emulation::check_access(source, kBytes, kBytes);
  std::memset(target, 0xff, kBytes);
  emulation::fibers[emulation::current].copy_groups.back().push_back(
      {target, static_cast<const char*>(source), kBytes});
}

inline void end_copy_group() { emulation::fibers[emulation::current].copy_groups.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = emulation::fibers[emulation::current].copy_groups;
  while (groups.size() > kPending + 1) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.shared, copy.source, copy.bytes);
    groups.erase(groups.begin());
  }
}

template <typename T, int kElems>
Vec<T, kElems> load_shared(SharedAddress address) {
  Vec<T, kElems> vec;
  std::memcpy(vec.words, shared_bytes_at(address, vec.kBytes), vec.kBytes);
  return vec;
}

template <typename T, int kElems>
Vec<T, kElems> load_shared_if(SharedAddress address, bool valid) {
  return valid ? load_shared<T, kElems>(address) : Vec<T, kElems>{};
}

template <typename T, int kElems>
void store_shared(SharedAddress address, const Vec<T, kElems>& vec) {
  std::memcpy(shared_bytes_at(address, vec.kBytes), vec.words, vec.kBytes);
}

inline float opaque(float value, std::uint32_t) { return value; }
inline std::uint32_t opaque(std::uint32_t value, std::uint32_t) { return value; }

}  // namespace infuse
