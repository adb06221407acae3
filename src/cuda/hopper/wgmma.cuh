// cuda/hopper/wgmma.cuh: D[64][N] (+)= A[64][16]·B[16][N] by one warpgroup, float32 accumulators.
//
// Wgmma<T, N>::ss takes A from shared memory (K-major) and B K-major: Q·Kᵀ; ss_columns both MN-major: (dSᵀ)ᵀ·K.
// Wgmma<T, N>::rs takes A from registers and B MN-major: P·V; rs_rows the same with B K-major: K·Qᵀ. accumulate = 0
// overwrites D. Accumulator element 4j + e of a lane lies in row 16·warp + lane/4 + 8·(e/2) and column
// 8j + 2·(lane%4) + e%2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/scalar.cuh"

namespace onepass::cuda::hopper {

ONEPASS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ONEPASS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving accesses to accumulators across this point.
template <int R>
ONEPASS_DEVICE void pin(float (&registers)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Waits until at most kPending groups are in flight; `ready` is what the finished ones wrote.
template <int kPending, int R>
ONEPASS_DEVICE void wgmma_wait(float (&ready)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(ready);
}

template <class T, int N>
struct Wgmma;

// Register lists: TEXT writes "%10, %11, …", OPERANDS names d[10], d[11], ….
#define OP_TEXT_10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define OP_D(i) "+f"(d[i])
#define OP_D4(b) OP_D(b), OP_D(b + 1), OP_D(b + 2), OP_D(b + 3)
#define OP_D8(b) OP_D4(b), OP_D4(b + 4)
#define OP_D16(b) OP_D8(b), OP_D8(b + 8)
#define OP_D32(b) OP_D16(b), OP_D16(b + 16)
#define OP_TEXT_16 OP_TEXT_10() ", %10, %11, %12, %13, %14, %15"
#define OP_TEXT_20 OP_TEXT_10() ", " OP_TEXT_10(1)
#define OP_TEXT_30 OP_TEXT_20 ", " OP_TEXT_10(2)
#define OP_TEXT_32 OP_TEXT_30 ", %30, %31"
#define OP_TEXT_40 OP_TEXT_30 ", " OP_TEXT_10(3)
#define OP_TEXT_48 OP_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define OP_TEXT_60 OP_TEXT_40 ", " OP_TEXT_10(4) ", " OP_TEXT_10(5)
#define OP_TEXT_64 OP_TEXT_60 ", %60, %61, %62, %63"
#define OP_TEXT_90 OP_TEXT_60 ", " OP_TEXT_10(6) ", " OP_TEXT_10(7) ", " OP_TEXT_10(8)
#define OP_TEXT_96 OP_TEXT_90 ", %90, %91, %92, %93, %94, %95"
#define OP_TEXT_128 \
  OP_TEXT_90 ", " OP_TEXT_10(9) ", " OP_TEXT_10(10) ", " OP_TEXT_10(11) ", %120, %121, %122, %123, %124, %125, " \
             "%126, %127"
#define OP_OPERANDS_16 OP_D16(0)
#define OP_OPERANDS_32 OP_D32(0)
#define OP_OPERANDS_40 OP_D32(0), OP_D8(32)
#define OP_OPERANDS_48 OP_D32(0), OP_D16(32)
#define OP_OPERANDS_64 OP_D32(0), OP_D32(32)
#define OP_OPERANDS_96 OP_D32(0), OP_D32(32), OP_D32(64)
#define OP_OPERANDS_128 OP_D32(0), OP_D32(32), OP_D32(64), OP_D32(96)

// R: registers of D = N/2; the numbers after it are the operands' positions behind D.
#define OP_WGMMA_RS(NAME, MAJOR, PTX, N, R, I0, I1, I2, I3, I4, I5)                                                   \
  template <int M>                                                                                                    \
  static ONEPASS_DEVICE void NAME(float(&d)[M], const std::uint32_t* a, std::uint64_t b, int accumulate) {            \
    static_assert(M >= R);                                                                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX \
                 "." PTX " {" OP_TEXT_##R "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, " MAJOR    \
                                          ";\n}\n"                                                                    \
                 : OP_OPERANDS_##R                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                              \
  }
#define OP_WGMMA_SS(NAME, MAJORS, PTX, N, R, I0, I1, I2)                                                              \
  template <int M>                                                                                                    \
  static ONEPASS_DEVICE void NAME(float(&d)[M], std::uint64_t a, std::uint64_t b, int accumulate) {                   \
    static_assert(M >= R);                                                                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX \
                 "." PTX " {" OP_TEXT_##R "}, %" #I0 ", %" #I1 ", p, 1, 1, " MAJORS ";\n}\n"                          \
                 : OP_OPERANDS_##R                                                                                    \
                 : "l"(a), "l"(b), "r"(accumulate));                                                                  \
  }
#define OP_WGMMA(TYPE, PTX, N, R, I0, I1, I2, I3, I4, I5)        \
  template <>                                                    \
  struct Wgmma<TYPE, N> {                                        \
    OP_WGMMA_SS(ss, "0, 0", PTX, N, R, I0, I1, I2)               \
    OP_WGMMA_SS(ss_columns, "1, 1", PTX, N, R, I0, I1, I2)       \
    OP_WGMMA_RS(rs, "1", PTX, N, R, I0, I1, I2, I3, I4, I5)      \
    OP_WGMMA_RS(rs_rows, "0", PTX, N, R, I0, I1, I2, I3, I4, I5) \
  };

#define OP_WGMMA_BOTH(N, R, ...)                     \
  OP_WGMMA(__nv_bfloat16, "bf16", N, R, __VA_ARGS__) \
  OP_WGMMA(__half, "f16", N, R, __VA_ARGS__)

OP_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
OP_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
OP_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
OP_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
OP_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
OP_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
OP_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

#undef OP_WGMMA_BOTH
#undef OP_WGMMA
#undef OP_WGMMA_SS
#undef OP_WGMMA_RS

}  // namespace onepass::cuda::hopper
