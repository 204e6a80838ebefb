// Loads and stores of vectors, in accesses of up to 16 bytes; every address is a multiple of its access.
#pragma once

#include <cstdint>

#include "infuse/vec.cuh"

namespace infuse {

// Data that is read once, and data that many rows share or that will be read again: through the read-only path. Neither
// has a hint for L1: on an H200 L1::no_allocate, at loads or at stores, makes a kernel that moves memory 4% slower.
enum class Reuse { kOnce, kShared };

// The two predicated loads leave `words` as they are when not `valid`. The predicate is in the assembly, so that no
// branch separates the loads of an unrolled loop and all of them are in flight together; `volatile`, so that they are
// issued in the order of the source.
template <Reuse kReuse>
__device__ __forceinline__ void load_16_bytes(std::uint32_t* words, const void* address, bool valid) {
  if constexpr (kReuse == Reuse::kOnce) {
    asm volatile(
        "{\n"
        "  .reg .pred valid;\n"
        "  setp.ne.b32 valid, %5, 0;\n"
        "  @valid ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(address), "r"(static_cast<int>(valid)));
  } else {
    asm volatile(
        "{\n"
        "  .reg .pred valid;\n"
        "  setp.ne.b32 valid, %5, 0;\n"
        "  @valid ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(address), "r"(static_cast<int>(valid)));
  }
}

__device__ __forceinline__ void load_4_bytes(std::uint32_t* words, const void* address, bool valid) {
  asm volatile(
      "{\n"
      "  .reg .pred valid;\n"
      "  setp.ne.b32 valid, %2, 0;\n"
      "  @valid ld.global.nc.u32 %0, [%1];\n"
      "}"
      : "+r"(words[0])
      : "l"(address), "r"(static_cast<int>(valid)));
}

// The vector at `address` when `valid`, else zeros.
template <Reuse kReuse, typename T, int kElems>
__device__ __forceinline__ Vec<T, kElems> load(const T* address, bool valid) {
  constexpr int kBytes = Vec<T, kElems>::kBytes;
  Vec<T, kElems> vec = {};
  if constexpr (kBytes == 2) {
    if (valid) vec.words[0] = __ldg(reinterpret_cast<const unsigned short*>(address));
  } else if constexpr (kBytes == 4) {
    load_4_bytes(vec.words, address, valid);
  } else if constexpr (kBytes == 8) {
    if (valid) {
      const uint2 pair = __ldg(reinterpret_cast<const uint2*>(address));
      vec.words[0] = pair.x;
      vec.words[1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      load_16_bytes<kReuse>(vec.words + 4 * i, reinterpret_cast<const char*>(address) + 16 * i, valid);
    }
  }
  return vec;
}

template <typename T, int kElems>
__device__ __forceinline__ void store(T* address, const Vec<T, kElems>& vec) {
  constexpr int kBytes = Vec<T, kElems>::kBytes;
  const std::uint32_t* words = vec.words;
  if constexpr (kBytes == 2) {
    *reinterpret_cast<unsigned short*>(address) = static_cast<unsigned short>(words[0]);
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<std::uint32_t*>(address) = words[0];
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(address)[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }
}

}  // namespace infuse
