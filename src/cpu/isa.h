// cpu/isa.h: which instruction-set tier the kernels use.
//
// Every kernel file is compiled once per tier by Highway's foreach_target and exports its entry points with
// HWY_EXPORT; `dispatch` picks the entry of the tier in use. Highway's own process-wide choice is left alone: the
// shared libhwy may serve others.
#pragma once

#include <hwy/highway.h>

#include <cstdint>
#include <string>

#include "core/backend.h"

namespace onepass::cpu {

// The tier in use: one bit of Highway's HWY_TARGETS, the best that this machine has. ONEPASS_CPU_ISA=<name>
// (avx3, avx2, ssse3, neon, sve, …) in the environment asks for that one and no other. 0: there is none.
std::int64_t isa_in_use();

// Why isa_in_use() is 0; nullopt when it is not.
Unsupported isa_missing();

// "AVX3 (of AVX3 AVX2 SSSE3)".
std::string describe_isa();

// The function of the tier in use. `table` is HWY_DISPATCH_TABLE(Function) of a file that includes foreach_target.h.
template <class F, std::size_t kSize>
F dispatch(F const (&table)[kSize]) {
  if constexpr (kSize == 1) {
    return table[0];  // one tier was compiled
  } else {
    hwy::ChosenTarget chosen;
    chosen.Update(isa_in_use());
    return table[chosen.GetIndex()];
  }
}

}  // namespace onepass::cpu
