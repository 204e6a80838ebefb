// Tensor-core products of a warpgroup, four neighbouring warps (wgmma, sm_90a). Operands in shared memory are tiles of
// two-byte elements in rows of 128 bytes whose pieces of 16 bytes are swizzled as TMA does it (infuse/tma.cuh).
//
// D [64, kN] in fp32: thread t holds rows 16 (t / 32) + t % 32 / 4 and that + 8, columns 8 n + 2 (t % 4) and the next in
// d[4 n], d[4 n + 1] of the first row and d[4 n + 2], d[4 n + 3] of the second. Two neighbours 4 n, rounded, are an
// operand A [64, 16] in registers: a[0], a[1] the two rows of the first, a[2], a[3] those of the second.
//
// Products run in the background: fence_products before the first one and after other writes to the registers it uses,
// end_products after the last of a group, wait_for_products before registers or shared memory are used again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "infuse/async_copy.cuh"

namespace infuse {

constexpr int kSwizzledRowBytes = 128;
constexpr int kSwizzledColumns = 64;                     // of two bytes
constexpr int kSwizzleBytes = 8 * kSwizzledRowBytes;     // after which the pattern repeats; tiles are aligned to it

// A tile whose rows run along M or N and whose columns, along K, are adjacent. Move along K by k * 32 bytes for k steps
// of 16 columns, at most four; columns 64 and up are a tile of their own.
__device__ __forceinline__ std::uint64_t matrix_by_rows(SharedAddress tile) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{kSwizzleBytes >> 4} << 32) | (std::uint64_t{1} << 16) |
         ((tile & 0x3ffff) >> 4);
}

// A tile whose rows run along K and whose columns, along M or N, are adjacent ("transposed"). Columns 64 and up begin
// block_bytes further. A step of 16 rows along K is 2048 bytes.
__device__ __forceinline__ std::uint64_t matrix_by_columns(SharedAddress tile, std::uint32_t block_bytes) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{kSwizzleBytes >> 4} << 32) |
         (static_cast<std::uint64_t>(block_bytes >> 4) << 16) | ((tile & 0x3ffff) >> 4);
}

// The matrix `bytes` further.
__device__ __forceinline__ std::uint64_t moved(std::uint64_t matrix, std::uint32_t bytes) {
  return matrix + (bytes >> 4);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the registers across this place.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Lists of registers in the text of an instruction and of their operands, by tens.
#define INFUSE_TEXT_2(t) "%" #t "0, %" #t "1"
#define INFUSE_TEXT_4(t) INFUSE_TEXT_2(t) ", %" #t "2, %" #t "3"
#define INFUSE_TEXT_6(t) INFUSE_TEXT_4(t) ", %" #t "4, %" #t "5"
#define INFUSE_TEXT_8(t) INFUSE_TEXT_6(t) ", %" #t "6, %" #t "7"
#define INFUSE_TEXT_10(t) INFUSE_TEXT_8(t) ", %" #t "8, %" #t "9"
#define INFUSE_TENS_3 INFUSE_TEXT_10() ", " INFUSE_TEXT_10(1) ", " INFUSE_TEXT_10(2) ", "
#define INFUSE_TENS_4 INFUSE_TENS_3 INFUSE_TEXT_10(3) ", "
#define INFUSE_TENS_5 INFUSE_TENS_4 INFUSE_TEXT_10(4) ", "
#define INFUSE_TENS_6 INFUSE_TENS_5 INFUSE_TEXT_10(5) ", "
#define INFUSE_TENS_8 INFUSE_TENS_6 INFUSE_TEXT_10(6) ", " INFUSE_TEXT_10(7) ", "
#define INFUSE_TENS_9 INFUSE_TENS_8 INFUSE_TEXT_10(8) ", "
#define INFUSE_TENS_11 INFUSE_TENS_9 INFUSE_TEXT_10(9) ", " INFUSE_TEXT_10(10) ", "
#define INFUSE_TENS_12 INFUSE_TENS_11 INFUSE_TEXT_10(11) ", "
#define INFUSE_SUM_8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define INFUSE_SUM_16 INFUSE_SUM_8(0), INFUSE_SUM_8(8)
#define INFUSE_SUM_32 INFUSE_SUM_8(0), INFUSE_SUM_8(8), INFUSE_SUM_8(16), INFUSE_SUM_8(24)
#define INFUSE_SUM_40 INFUSE_SUM_32, INFUSE_SUM_8(32)
#define INFUSE_SUM_48 INFUSE_SUM_40, INFUSE_SUM_8(40)
#define INFUSE_SUM_56 INFUSE_SUM_48, INFUSE_SUM_8(48)
#define INFUSE_SUM_64 INFUSE_SUM_56, INFUSE_SUM_8(56)
#define INFUSE_SUM_72 INFUSE_SUM_64, INFUSE_SUM_8(64)
#define INFUSE_SUM_80 INFUSE_SUM_72, INFUSE_SUM_8(72)
#define INFUSE_SUM_88 INFUSE_SUM_80, INFUSE_SUM_8(80)
#define INFUSE_SUM_96 INFUSE_SUM_88, INFUSE_SUM_8(88)
#define INFUSE_SUM_112 INFUSE_SUM_96, INFUSE_SUM_8(96), INFUSE_SUM_8(104)
#define INFUSE_SUM_128 INFUSE_SUM_112, INFUSE_SUM_8(112), INFUSE_SUM_8(120)

// A in shared memory: after the sums come a, b, whether to accumulate, and whether A and B are transposed.
#define INFUSE_A_SHARED(n, type, text, sums, i0, i1, i2, i3, i4, ...)                                   \
  asm volatile("{\n  .reg .pred p;\n  setp.ne.b32 p, %" #i2                                             \
               ", 0;\n"                                                                                 \
               "  wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" text "}, %" #i0   \
               ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                                            \
               : sums                                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposedA)), \
                 "n"(static_cast<int>(kTransposedB)))

// A in registers: after the sums come its four registers, b, whether to accumulate, and whether B is transposed.
#define INFUSE_A_REGISTERS(n, type, text, sums, i0, i1, i2, i3, i4, i5, i6)                                          \
  asm volatile("{\n  .reg .pred p;\n  setp.ne.b32 p, %" #i5                                                          \
               ", 0;\n"                                                                                              \
               "  wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" text "}, {%" #i0 ", %" #i1     \
               ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"                                              \
               : sums                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),              \
                 "n"(static_cast<int>(kTransposedB)))

// One instruction for each width.
#define INFUSE_MULTIPLY(FORM, type)                                                                             \
  if constexpr (kN == 16) {                                                                                    \
    FORM(16, type, INFUSE_TEXT_8(), INFUSE_SUM_8(0), 8, 9, 10, 11, 12, 13, 14);                                \
  } else if constexpr (kN == 32) {                                                                             \
    FORM(32, type, INFUSE_TEXT_10() ", " INFUSE_TEXT_6(1), INFUSE_SUM_16, 16, 17, 18, 19, 20, 21, 22);         \
  } else if constexpr (kN == 64) {                                                                             \
    FORM(64, type, INFUSE_TENS_3 INFUSE_TEXT_2(3), INFUSE_SUM_32, 32, 33, 34, 35, 36, 37, 38);                 \
  } else if constexpr (kN == 80) {                                                                             \
    FORM(80, type, INFUSE_TENS_3 INFUSE_TEXT_10(3), INFUSE_SUM_40, 40, 41, 42, 43, 44, 45, 46);                \
  } else if constexpr (kN == 96) {                                                                             \
    FORM(96, type, INFUSE_TENS_4 INFUSE_TEXT_8(4), INFUSE_SUM_48, 48, 49, 50, 51, 52, 53, 54);                 \
  } else if constexpr (kN == 112) {                                                                            \
    FORM(112, type, INFUSE_TENS_5 INFUSE_TEXT_6(5), INFUSE_SUM_56, 56, 57, 58, 59, 60, 61, 62);                \
  } else if constexpr (kN == 128) {                                                                            \
    FORM(128, type, INFUSE_TENS_6 INFUSE_TEXT_4(6), INFUSE_SUM_64, 64, 65, 66, 67, 68, 69, 70);                \
  } else if constexpr (kN == 144) {                                                                            \
    FORM(144, type, INFUSE_TENS_6 INFUSE_TEXT_10(6) ", " INFUSE_TEXT_2(7), INFUSE_SUM_72, 72, 73, 74, 75, 76, 77, 78); \
  } else if constexpr (kN == 160) {                                                                            \
    FORM(160, type, INFUSE_TENS_6 INFUSE_TEXT_10(6) ", " INFUSE_TEXT_10(7), INFUSE_SUM_80, 80, 81, 82, 83, 84, 85, 86); \
  } else if constexpr (kN == 176) {                                                                            \
    FORM(176, type, INFUSE_TENS_8 INFUSE_TEXT_8(8), INFUSE_SUM_88, 88, 89, 90, 91, 92, 93, 94);                \
  } else if constexpr (kN == 192) {                                                                            \
    FORM(192, type, INFUSE_TENS_9 INFUSE_TEXT_6(9), INFUSE_SUM_96, 96, 97, 98, 99, 100, 101, 102);             \
  } else if constexpr (kN == 224) {                                                                            \
    FORM(224, type, INFUSE_TENS_11 INFUSE_TEXT_2(11), INFUSE_SUM_112, 112, 113, 114, 115, 116, 117, 118);      \
  } else if constexpr (kN == 256) {                                                                            \
    FORM(256, type, INFUSE_TENS_12 INFUSE_TEXT_8(12), INFUSE_SUM_128, 128, 129, 130, 131, 132, 133, 134);      \
  } else {                                                                                                     \
    static_assert(kN == 0, "a width without an instruction here");                                             \
  }

// To be called after the wait for products whose operand A lies in registers, and before others are written. ptxas takes
// those registers for free as soon as the product has been issued (CUDA 13.0), but they are read until it is done. This
// is an access to them which never happens: `never` is a number that is not negative, or NaN; `shared` any address that
// is a multiple of 16.
template <int kSteps>
__device__ __forceinline__ void keep_until_here(const std::uint32_t (&a)[kSteps][4], SharedAddress shared,
                                                float never) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    asm volatile(
        "{\n"
        "  .reg .pred p;\n"
        "  setp.lt.f32 p, %5, 0f00000000;\n"
        "  @p st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"r"(shared),
        "r"(a[step][0]), "r"(a[step][1]), "r"(a[step][2]), "r"(a[step][3]), "f"(never)
        : "memory");
  }
}

// d = a b, or d += a b. kTransposedA, kTransposedB: that operand is a matrix_by_columns.
template <typename T, int kN, bool kTransposedA = false, bool kTransposedB = false>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    INFUSE_MULTIPLY(INFUSE_A_SHARED, "bf16")
  } else {
    INFUSE_MULTIPLY(INFUSE_A_SHARED, "f16")
  }
}

// The same with A in registers.
template <typename T, int kN, bool kTransposedB = false>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                                         bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    INFUSE_MULTIPLY(INFUSE_A_REGISTERS, "bf16")
  } else {
    INFUSE_MULTIPLY(INFUSE_A_REGISTERS, "f16")
  }
}

#undef INFUSE_MULTIPLY
#undef INFUSE_A_SHARED
#undef INFUSE_A_REGISTERS

#endif

}  // namespace infuse
