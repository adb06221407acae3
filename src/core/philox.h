// core/philox.h: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
// and the dropout rule that every backend shares.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ONEPASS_HOST_DEVICE inline
#endif

namespace onepass {

struct Philox4 {
  std::uint32_t word[4];
};

ONEPASS_HOST_DEVICE Philox4 philox4x32_10(Philox4 counter, std::uint32_t key0, std::uint32_t key1) {
  constexpr std::uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;  // constants of the paper, section 5.1
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{kMul0} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{kMul1} * counter.word[2];
    counter = {
        {static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<std::uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The four random words of keys 4·key_quad … 4·key_quad + 3 of one query row of one (batch, query head) plane:
//   counter = {key_quad, query, plane, offset's low half}, key = seed with its high half xor offset's high half,
// so no two (seed, offset, plane, query, key) of one call share a word. plane = batch·num_heads + head.
ONEPASS_HOST_DEVICE Philox4 dropout_bits(std::uint64_t seed, std::uint64_t offset, std::uint32_t plane,
                                         std::uint32_t query, std::uint32_t key_quad) {
  const Philox4 counter{{key_quad, query, plane, static_cast<std::uint32_t>(offset)}};
  return philox4x32_10(counter, static_cast<std::uint32_t>(seed),
                       static_cast<std::uint32_t>(seed >> 32) ^ static_cast<std::uint32_t>(offset >> 32));
}

// A weight survives iff its word ≥ threshold = round(p·2³²): P(dropped) = p to within 2⁻³².
ONEPASS_HOST_DEVICE std::uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<std::uint32_t>(scaled);
}

}  // namespace onepass
