// cpu/dropout-inl.h: the Philox bits of core/philox.h, one query a lane, four keys a draw.
#if defined(ONEPASS_CPU_DROPOUT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DROPOUT_INL_H_
#undef ONEPASS_CPU_DROPOUT_INL_H_
#else
#define ONEPASS_CPU_DROPOUT_INL_H_
#endif

#include "core/philox.h"
#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

using Words = hn::Vec<WordTag>;

// The 64-bit products of 32-bit lanes, as high and low halves.
HWY_INLINE void multiply_words(Words a, Words b, Words& high, Words& low) {
  const WordTag w;
  const hn::RepartitionToWide<WordTag> wide;
  const auto even = hn::MulEven(a, b);
  const auto odd = hn::MulEven(hn::BitCast(w, hn::ShiftRight<32>(hn::BitCast(wide, a))),
                               hn::BitCast(w, hn::ShiftRight<32>(hn::BitCast(wide, b))));
  high = hn::OddEven(hn::BitCast(w, odd), hn::BitCast(w, hn::ShiftRight<32>(even)));
  low = hn::OddEven(hn::BitCast(w, hn::ShiftLeft<32>(odd)), hn::BitCast(w, even));
}

// Ten rounds on four words a lane, in place; key0 and key1 are the same for all lanes.
HWY_INLINE void philox_words(Words& w0, Words& w1, Words& w2, Words& w3, std::uint32_t key0, std::uint32_t key1) {
  const WordTag w;
  const Words mul0 = hn::Set(w, 0xD2511F53u), mul1 = hn::Set(w, 0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_words(w0, mul0, high0, low0);
    multiply_words(w2, mul1, high1, low1);
    w0 = hn::Xor(hn::Xor(high1, w1), hn::Set(w, key0));
    w1 = low1;
    w2 = hn::Xor(hn::Xor(high0, w3), hn::Set(w, key1));
    w3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Zeroes one key's weights in the lanes that drop it. Unsigned comparison by flipped sign bits.
HWY_INLINE void drop_row(Words bits, Ints flipped_threshold, float* weights) {
  const FloatTag f;
  const IntTag n;
  const Ints flipped = hn::Xor(hn::BitCast(n, bits), hn::Set(n, INT32_MIN));
  const auto dropped = hn::RebindMask(f, hn::Gt(flipped_threshold, flipped));
  hn::Store(hn::IfThenElse(dropped, hn::Zero(f), hn::Load(f, weights)), f, weights);
}

// The words that key the generator.
struct PhiloxKey {
  std::uint32_t low, high;
  explicit PhiloxKey(const Problem& p)
      : low(static_cast<std::uint32_t>(p.dropout_seed)),
        high(static_cast<std::uint32_t>(p.dropout_seed >> 32) ^ static_cast<std::uint32_t>(p.dropout_offset >> 32)) {}
};

// Zeroes the dropped weights of a tile; survivors keep theirs (1/(1 − p) is left to the caller).
inline HWY_NOINLINE void drop_weights(const Problem& problem, const ScoreTile& tile, const Lanes& lanes) {
  const WordTag w;
  const std::uint32_t threshold = dropout_threshold(problem.dropout_p);
  const Ints flipped = hn::Set(IntTag(), static_cast<std::int32_t>(threshold ^ 0x80000000u));
  const PhiloxKey key(problem);
  const std::int64_t end_key = tile.first_key + tile.keys;
  for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
    for (std::int64_t quad = tile.first_key / 4; quad * 4 < end_key; ++quad) {
      Words w0 = hn::Set(w, static_cast<std::uint32_t>(quad)), w1 = hn::Load(w, lanes.query + column),
            w2 = hn::Load(w, lanes.plane + column), w3 = hn::Set(w, static_cast<std::uint32_t>(problem.dropout_offset));
      philox_words(w0, w1, w2, w3, key.low, key.high);
      const std::int64_t row = quad * 4 - tile.first_key;
      float* const at = tile.scores + row * tile.width + column;
      drop_row(w0, flipped, at);
      if (row + 1 < tile.keys) drop_row(w1, flipped, at + tile.width);
      if (row + 2 < tile.keys) drop_row(w2, flipped, at + 2 * tile.width);
      if (row + 3 < tile.keys) drop_row(w3, flipped, at + 3 * tile.width);
    }
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
