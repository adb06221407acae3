// cuda/portable/decode_ptx.cuh: loads and byte conversions of the cache kernels.
#pragma once

#include "cuda/common/grid_order.cuh"
#include "cuda/common/ticket.cuh"
#include "cuda/portable/ptx.cuh"

namespace onepass::cuda {

// Brings a line of 128 bytes into the second-level cache, where later writes to it are seen: a hint at any time.
ONEPASS_DEVICE void prefetch_line(const void* source) { asm volatile("prefetch.global.L2 [%0];" ::"l"(source)); }

// An index from the second-level cache: unlike an ordinary load, one before wait_for_previous_grid() leaves nothing
// stale in the first-level cache.
ONEPASS_DEVICE int load_index(const std::int32_t* source) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

// counter += 1; the count before. What the warp has written is seen by those who count after it.
ONEPASS_DEVICE std::uint64_t count_arrival(std::uint64_t* counter) {
  std::uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(counter) : "memory");
  return before;
}

static __device__ const uint4 zero_bytes = {0, 0, 0, 0};

// Loads kBytes (8 or 16) that are read once.
template <int kBytes>
ONEPASS_DEVICE void load_streamed(uint4& value, const void* source) {
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
  } else {
    asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "l"(source));
  }
}
// Zeros instead of what is not valid. Not a predicated load, whose result would have to be zeroed first, which costs
// moves that wait for the loads.
template <int kBytes>
ONEPASS_DEVICE void load_streamed(uint4& value, const void* source, bool valid) {
  load_streamed<kBytes>(value, valid ? source : &zero_bytes);
}

// The transpose of an 8×8 matrix of 16-bit elements; lane l holds elements 2(l%4) and 2(l%4)+1 of row l/4.
ONEPASS_DEVICE std::uint32_t transpose_matrix(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

ONEPASS_DEVICE std::uint32_t subtract_halves(std::uint32_t a, std::uint32_t b) {
  asm("sub.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
ONEPASS_DEVICE std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
  asm("mul.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

// Four 8-bit elements as float16: bytes 0 and 1 in x, 2 and 3 in y. Exact.
struct HalfQuad {
  std::uint32_t x, y;
};

template <DType kStorage>
ONEPASS_DEVICE HalfQuad widen(std::uint32_t bytes) {
  if constexpr (kStorage == DType::kInt8) {
    bytes ^= 0x80808080u;  // x + 128; below the exponent of 1024 that is 1152 + x
    return {subtract_halves(__byte_perm(bytes, 0x64646464u, 0x4140), 0x64806480u),
            subtract_halves(__byte_perm(bytes, 0x64646464u, 0x4342), 0x64806480u)};
  } else if constexpr (kStorage == DType::kFloat8E5M2) {  // the upper byte of a float16
    return {__byte_perm(bytes, 0, 0x1404), __byte_perm(bytes, 0, 0x3424)};
  } else {
#if __CUDA_ARCH__ >= 890
    HalfQuad quad;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(quad.x), "=r"(quad.y)
        : "r"(bytes));
    return quad;
#else
    const auto wide = [](std::uint32_t upper) {  // e4m3 in the upper bytes
      const std::uint32_t not_numbers = __vcmpeq2(upper & 0x7F007F00u, 0x7F007F00u);
      const std::uint32_t shifted = (upper & 0x80008000u) | ((upper & 0x7F007F00u) >> 1);
      return multiply_halves(shifted, 0x5C005C00u) | (not_numbers & 0x7FFF7FFFu);  // the exponent reads 8 too low
    };
    return {wide(__byte_perm(bytes, 0, 0x1404)), wide(__byte_perm(bytes, 0, 0x3424))};
#endif
  }
}

// Zeroes the elements of a word of cache storage that are infinite or NaN; whether there were any.
template <DType kStorage>
ONEPASS_DEVICE bool make_word_finite(std::uint32_t& word) {
  std::uint32_t special = 0;
  if constexpr (kStorage == DType::kFloat16) special = __vcmpeq2(word & 0x7C007C00u, 0x7C007C00u);
  if constexpr (kStorage == DType::kBFloat16) special = __vcmpeq2(word & 0x7F807F80u, 0x7F807F80u);
  if constexpr (kStorage == DType::kFloat8E4M3) special = __vcmpeq4(word & 0x7F7F7F7Fu, 0x7F7F7F7Fu);
  if constexpr (kStorage == DType::kFloat8E5M2) special = __vcmpeq4(word & 0x7C7C7C7Cu, 0x7C7C7C7Cu);
  word &= ~special;
  return special != 0;
}

}  // namespace onepass::cuda
