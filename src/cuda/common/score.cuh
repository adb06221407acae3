// cuda/common/score.cuh: the terms of a logit beyond softmax_scale·q·k, and dropout, on accumulator fragments.
//
// A fragment is float[kRowTiles][kColumnTiles][4] in the layout of mma.m16n8: element e of tile (r, c) lies in row
// 16r + lane/4 + 8(e/2) and column 8c + 2(lane%4) + e%2. A `Layout` says which of the two axes the queries are on.
#pragma once

#include "core/philox.h"
#include "cuda/common/sequence.cuh"

namespace onepass::cuda {

// Rows are queries, columns are keys: S = Q·Kᵀ.
struct QueryRows {
  int query0, key0;  // of this thread's element (0, 0, 0)
  ONEPASS_DEVICE int query(int r, int, int e) const { return query0 + 16 * r + 8 * (e / 2); }
  ONEPASS_DEVICE int key(int, int c, int e) const { return key0 + 8 * c + e % 2; }
};

// Rows are keys, columns are queries: Sᵀ = K·Qᵀ.
struct KeyRows {
  int query0, key0;
  ONEPASS_DEVICE int query(int, int c, int e) const { return query0 + 8 * c + e % 2; }
  ONEPASS_DEVICE int key(int r, int, int e) const { return key0 + 16 * r + 8 * (e / 2); }
};

// What the score of one (batch, head) needs, in float and with the head's offsets applied.
struct ScoreTerms {
  float scale;    // softmax_scale
  float softcap;  // 0: none
  float inv_softcap;
  float alibi_slope;  // 0: none
  bool alibi_zero_for_future;
  const void* bias;  // of (batch, head); null: none
  DType bias_dtype;
  std::int64_t bias_query_stride, bias_key_stride;
};

ONEPASS_DEVICE ScoreTerms score_terms(const Problem& problem, int batch, int head) {
  ScoreTerms terms;
  terms.scale = problem.softmax_scale;
  terms.softcap = static_cast<float>(problem.softcap);
  terms.inv_softcap = problem.softcap > 0 ? static_cast<float>(1.0 / problem.softcap) : 0.0f;
  terms.alibi_slope =
      problem.alibi_slopes != nullptr ? problem.alibi_slopes[batch * problem.alibi_batch_stride + head] : 0.0f;
  terms.alibi_zero_for_future = problem.alibi_zero_for_future;
  terms.bias_dtype = problem.bias.dtype;
  terms.bias_query_stride = problem.bias.query_stride;
  terms.bias_key_stride = problem.bias.key_stride;
  terms.bias = nullptr;
  if (problem.bias.data != nullptr) {
    const std::int64_t offset = batch * problem.bias.batch_stride + head * problem.bias.head_stride;
    const int bytes = problem.bias.dtype == DType::kFloat32 ? 4 : 2;
    terms.bias = static_cast<const char*>(problem.bias.data) + offset * bytes;
  }
  return terms;
}

// Calls use(element, r, c, e) for every element of a fragment; r, c and e are constants after unrolling.
template <int R, int C, class Use>
ONEPASS_DEVICE void for_each_element(float (&fragment)[R][C][4], const Use& use) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) use(fragment[r][c][e], r, c, e);
}

// kExact: for float32 operands.
template <bool kExact>
ONEPASS_DEVICE float capped(const ScoreTerms& terms, float s) {
  const float x = s * terms.inv_softcap;
  return terms.softcap * (kExact ? tanhf(x) : tanh_by_exp(x));
}

ONEPASS_DEVICE float alibi(const ScoreTerms& terms, const DeviceSequence& sequence, int query, int key) {
  const int ahead = key - (query + sequence.diagonal);
  return -terms.alibi_slope * static_cast<float>(terms.alibi_zero_for_future ? max(-ahead, 0) : abs(ahead));
}

// 0 outside the sequence, where fragments reach but the tensor does not.
ONEPASS_DEVICE float bias(const ScoreTerms& terms, const DeviceSequence& sequence, int query, int key) {
  if (query >= sequence.seqlen_q || key >= sequence.seqlen_k) return 0.0f;
  return load_as_float(terms.bias, terms.bias_dtype, query * terms.bias_query_stride + key * terms.bias_key_stride);
}

// ALiBi and bias, after softcap.
template <class Layout, int R, int C>
ONEPASS_DEVICE void add_terms(float (&s)[R][C][4], const ScoreTerms& terms, const Layout& at,
                              const DeviceSequence& sequence) {
  if (terms.alibi_slope != 0.0f) {
    for_each_element(
        s, [&](float& x, int r, int c, int e) { x += alibi(terms, sequence, at.query(r, c, e), at.key(r, c, e)); });
  }
  if (terms.bias != nullptr) {
    for_each_element(
        s, [&](float& x, int r, int c, int e) { x += bias(terms, sequence, at.query(r, c, e), at.key(r, c, e)); });
  }
}

// Turns products q·k into logits (natural units).
template <bool kExact, class Layout, int R, int C>
ONEPASS_DEVICE void apply_terms(float (&s)[R][C][4], const ScoreTerms& terms, const Layout& at,
                                const DeviceSequence& sequence) {
  for_each_element(s, [&](float& x, int, int, int) { x *= terms.scale; });
  if (terms.softcap > 0.0f) for_each_element(s, [&](float& x, int, int, int) { x = capped<kExact>(terms, x); });
  add_terms(s, terms, at, sequence);
}

// The same, with the derivative of the logit by softmax_scale·q·k: 1 − tanh² under a softcap, else 1.
template <bool kExact, class Layout, int R, int C>
ONEPASS_DEVICE void apply_terms(float (&s)[R][C][4], float (&slopes)[R][C][4], const ScoreTerms& terms,
                                const Layout& at, const DeviceSequence& sequence) {
  for_each_element(s, [&](float& x, int r, int c, int e) {
    x *= terms.scale;
    slopes[r][c][e] = 1.0f;
  });
  if (terms.softcap > 0.0f) {
    for_each_element(s, [&](float& x, int r, int c, int e) {
      x = capped<kExact>(terms, x);
      const float t = x * terms.inv_softcap;
      slopes[r][c][e] = fmaf(-t, t, 1.0f);
    });
  }
  add_terms(s, terms, at, sequence);
}

// The same for one pair.
template <bool kExact>
ONEPASS_DEVICE float logit(const ScoreTerms& terms, const DeviceSequence& sequence, int query, int key, float product) {
  float s = product * terms.scale;
  if (terms.softcap > 0.0f) s = capped<kExact>(terms, s);
  if (terms.alibi_slope != 0.0f) s += alibi(terms, sequence, query, key);
  if (terms.bias != nullptr) s += bias(terms, sequence, query, key);
  return s;
}

struct DropoutRule {
  std::uint64_t seed, offset;
  std::uint32_t plane;      // batch·num_heads + head
  std::uint32_t threshold;  // a weight survives iff its word is at least this
  bool active;
  float survivor_scale;  // 1/(1 − p)
};

ONEPASS_DEVICE DropoutRule dropout_rule(const Problem& problem, int batch, int head) {
  return {problem.dropout_seed,
          problem.dropout_offset,
          static_cast<std::uint32_t>(batch * problem.num_heads + head),
          dropout_threshold(problem.dropout_p),
          problem.dropout_p > 0.0,
          static_cast<float>(1.0 / (1.0 - problem.dropout_p))};
}

// Random words of one m16n8 tile's four elements. One Philox call serves four keys of a query, so the lanes that share
// a call's words divide the calls among them and exchange. key tiles start at multiples of 4.
ONEPASS_DEVICE void dropout_words(const DropoutRule& rule, const QueryRows& at, int r, int c,
                                  std::uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1;  // an even lane draws for its upper row, an odd one for its lower row
  const Philox4 mine =
      dropout_bits(rule.seed, rule.offset, rule.plane, at.query(r, c, odd ? 2 : 0), at.key(r, c, 0) / 4);
  const std::uint32_t first = __shfl_xor_sync(~0u, odd ? mine.word[0] : mine.word[2], 1);
  const std::uint32_t second = __shfl_xor_sync(~0u, odd ? mine.word[1] : mine.word[3], 1);
  words[0] = odd ? first : mine.word[0];
  words[1] = odd ? second : mine.word[1];
  words[2] = odd ? mine.word[2] : first;
  words[3] = odd ? mine.word[3] : second;
}

// One step of a transpose across lanes: a lane without the bit gives its second word for its partner's first.
ONEPASS_DEVICE void exchange(std::uint32_t& first, std::uint32_t& second, bool bit, int lanes_apart) {
  const std::uint32_t got = __shfl_xor_sync(~0u, bit ? first : second, lanes_apart);
  first = bit ? got : first;
  second = bit ? second : got;
}

ONEPASS_DEVICE void dropout_words(const DropoutRule& rule, const KeyRows& at, int r, int c, std::uint32_t (&words)[4]) {
  // Lanes 4 apart hold neighbouring keys: lane/4 % 4 is the word that this lane needs of all four calls. It draws the
  // call of its element with that number, and a 4×4 transpose across the lanes hands the words out.
  const int mine = (threadIdx.x / 4) % 4;
  const bool bit0 = mine & 1, bit1 = mine & 2;
  Philox4 drawn = dropout_bits(rule.seed, rule.offset, rule.plane, at.query(r, c, 0) + (bit0 ? 1 : 0),
                               (at.key(r, c, 0) + (bit1 ? 8 : 0)) / 4);
  exchange(drawn.word[0], drawn.word[1], bit0, 4);
  exchange(drawn.word[2], drawn.word[3], bit0, 4);
  exchange(drawn.word[0], drawn.word[2], bit1, 8);
  exchange(drawn.word[1], drawn.word[3], bit1, 8);
#pragma unroll
  for (int e = 0; e < 4; ++e) words[e] = drawn.word[e];
}

ONEPASS_DEVICE bool survives(const DropoutRule& rule, int query, int key) {
  const Philox4 drawn = dropout_bits(rule.seed, rule.offset, rule.plane, query, key / 4);
  const std::uint32_t low = key % 2 ? drawn.word[1] : drawn.word[0], high = key % 2 ? drawn.word[3] : drawn.word[2];
  return (key % 4 < 2 ? low : high) >= rule.threshold;
}

// Calls use(r, c, e, survives) for every element of a fragment.
template <int R, int C, class Layout, class Use>
ONEPASS_DEVICE void for_each_dropout(const DropoutRule& rule, const Layout& at, const Use& use) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c) {
      std::uint32_t words[4];
      dropout_words(rule, at, r, c, words);
#pragma unroll
      for (int e = 0; e < 4; ++e) use(r, c, e, words[e] >= rule.threshold);
    }
}

}  // namespace onepass::cuda
