// Shared memory by address, and copies from global to shared memory that run in the background (cp.async, sm_80 and
// later). A thread sees what it copied itself after waiting; others need a barrier as well.
#pragma once

#include <cstdint>

#include "infuse/vec.cuh"

namespace infuse {

// In the CTA's shared memory. 32 bits, and no conversion at each access as for a pointer.
using SharedAddress = std::uint32_t;

// The dynamic shared memory of the launch, aligned to 16 bytes.
__device__ __forceinline__ SharedAddress dynamic_shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared));
}

// kBytes of 4 or 16; 16 bytes go past L1. The predicate is in the assembly, so that no branch separates the copies of
// an unrolled loop.
template <int kBytes>
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* source, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile(
        "{\n"
        "  .reg .pred valid;\n"
        "  setp.ne.b32 valid, %2, 0;\n"
        "  @valid cp.async.cg.shared.global [%0], [%1], 16;\n"
        "}"
        :
        : "r"(shared), "l"(source), "r"(static_cast<int>(valid))
        : "memory");
  } else {
    asm volatile(
        "{\n"
        "  .reg .pred valid;\n"
        "  setp.ne.b32 valid, %2, 0;\n"
        "  @valid cp.async.ca.shared.global [%0], [%1], 4;\n"
        "}"
        :
        : "r"(shared), "l"(source), "r"(static_cast<int>(valid))
        : "memory");
  }
}

// 16 bytes, zeros when not `valid`; the source is not read then.
__device__ __forceinline__ void copy_async_or_zeros(SharedAddress shared, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of copies. Groups complete in order; one may be empty.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A vector of 4 or 16 bytes, aligned to its size.
template <typename T, int kElems>
__device__ __forceinline__ Vec<T, kElems> load_shared(SharedAddress address) {
  Vec<T, kElems> vec;
  if constexpr (vec.kBytes == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(vec.words[0]), "=r"(vec.words[1]), "=r"(vec.words[2]), "=r"(vec.words[3])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(vec.kBytes == 4);
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(vec.words[0]) : "r"(address) : "memory");
  }
  return vec;
}

// 16 bytes when `valid`, else zeros. The predicate is in the assembly, so that no branch separates the loads of an
// unrolled loop.
template <typename T, int kElems>
__device__ __forceinline__ Vec<T, kElems> load_shared_if(SharedAddress address, bool valid) {
  static_assert(Vec<T, kElems>::kBytes == 16);
  Vec<T, kElems> vec = {};
  asm volatile(
      "{\n"
      "  .reg .pred valid;\n"
      "  setp.ne.b32 valid, %5, 0;\n"
      "  @valid ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(vec.words[0]), "+r"(vec.words[1]), "+r"(vec.words[2]), "+r"(vec.words[3])
      : "r"(address), "r"(static_cast<int>(valid))
      : "memory");
  return vec;
}

template <typename T, int kElems>
__device__ __forceinline__ void store_shared(SharedAddress address, const Vec<T, kElems>& vec) {
  if constexpr (vec.kBytes == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(vec.words[0]), "r"(vec.words[1]),
                 "r"(vec.words[2]), "r"(vec.words[3])
                 : "memory");
  } else {
    static_assert(vec.kBytes == 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(vec.words[0]) : "memory");
  }
}

// The same value, of which both compilers know nothing, so that they keep it instead of computing it anew wherever it
// is used. Every thread of the warp must call this; `zero` is a kernel parameter that is always 0.
__device__ __forceinline__ float opaque(float value, std::uint32_t zero) {
  return __shfl_xor_sync(0xffffffffu, value, static_cast<int>(zero));
}

__device__ __forceinline__ std::uint32_t opaque(std::uint32_t value, std::uint32_t zero) {
  return __float_as_uint(opaque(__uint_as_float(value), zero));
}

}  // namespace infuse
