// cpu/cache_reader.h: where the rows and scales of one (sequence, key/value head) lie, block of keys by block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cache_problem.h"

namespace onepass::cpu {

// How rows are fetched ahead. Intel: a core has three times as many requests in flight in its second-level cache as in
// the first (measured at group 4: 11 % faster), so a whole block of keys. AMD: no such difference, and what is in the
// first level is one wait less; no more than stays there beside the arithmetic (measured on Zen 5: 5–15 % faster).
struct FetchPolicy {
  bool first_level;
  std::int64_t bytes;
};
inline const FetchPolicy& fetch_policy() {
#if defined(__x86_64__)
  static const FetchPolicy policy =
      __builtin_cpu_is("amd") ? FetchPolicy{true, std::int64_t{8} << 10} : FetchPolicy{false, INT64_MAX};
#else
  static const FetchPolicy policy{false, INT64_MAX};
#endif
  return policy;
}

inline void fetch_ahead(const void* address) { __builtin_prefetch(address, 0, 2); }

// Rows of this block of keys and of the next, which take turns.
inline constexpr std::uint64_t kFetchRing = 128;

// Fetches rows line by line, one line a call: arithmetic that calls it evenly leaves no time without requests in
// flight.
struct LineFetcher {
  const void* const* ring;  // [kFetchRing]
  std::uint64_t index;
  std::int64_t row_bytes;
  bool first_level;
  std::int64_t offset = 0;

  void next() {
    const char* const line = static_cast<const char*>(ring[index % kFetchRing]) + offset;
    if (first_level) {
      __builtin_prefetch(line, 0, 3);
    } else {
      __builtin_prefetch(line, 0, 2);
    }
    offset += kLineBytes;
    if (offset >= row_bytes) {
      offset = 0;
      ++index;
    }
  }
  // Keeps pace with arithmetic whose `unit`-th step stands for kBytes of storage.
  template <int kBytes>
  void keep_pace(std::int64_t unit) {
    if constexpr (kBytes >= kLineBytes) {
      for (int i = 0; i < kBytes / kLineBytes; ++i) next();
    } else if (unit % (kLineBytes / kBytes) == 0) {
      next();
    }
  }

  static constexpr std::int64_t kLineBytes = 64;
};

// The same in fewer instructions, for vectors so short that these count: four a line instead of nine.
struct LineWalker {
  const void* const* ring;  // [kFetchRing]
  std::uint64_t index;
  std::int64_t row_bytes;
  bool first_level;
  const char *line, *end;

  explicit LineWalker(const LineFetcher& from)
      : ring(from.ring), index(from.index), row_bytes(from.row_bytes), first_level(from.first_level) {
    start_row(from.offset);
  }
  void next() {
    if (first_level) {
      __builtin_prefetch(line, 0, 3);
    } else {
      __builtin_prefetch(line, 0, 2);
    }
    line += LineFetcher::kLineBytes;
    if (line >= end) [[unlikely]] {
      ++index;
      start_row(0);
    }
  }
  // Keeps pace with arithmetic whose `unit`-th step stands for kBytes of storage.
  template <int kBytes>
  void keep_pace(std::int64_t unit) {
    if constexpr (kBytes >= LineFetcher::kLineBytes) {
      for (int i = 0; i < kBytes / LineFetcher::kLineBytes; ++i) next();
    } else if (unit % (LineFetcher::kLineBytes / kBytes) == 0) {
      next();
    }
  }

 private:
  void start_row(std::int64_t offset) {
    const char* const row = static_cast<const char*>(ring[index % kFetchRing]);
    line = row + offset;
    end = row + row_bytes;
  }
};

template <class T>
class CacheReader {
 public:
  CacheReader(const KVStorage& cache, std::int64_t batch, std::int64_t head)
      : cache_(cache), batch_(batch), head_(head) {}

  // Keys [first, first + count) that exist within [begin, end): only those are ever read.
  struct Block {
    std::int64_t first, begin, end;
  };

  // rows[i] = the row of key first + i, or of the nearest key of the block: an address that may be read, whose score
  // will be masked.
  void rows(const Operand& operand, const Block& block, std::int64_t count, const T** rows) const {
    for_each_run(block.begin, block.end, [&](std::int64_t key, std::int64_t run, Slot slot) {
      const T* row = operand.row<T>(slot.block, head_, slot.offset);
      for (std::int64_t i = 0; i < run; ++i) rows[key - block.first + i] = row + i * operand.token_stride;
    });
    const T* const low = rows[block.begin - block.first];
    const T* const high = rows[block.end - 1 - block.first];
    std::fill(rows, rows + (block.begin - block.first), low);
    std::fill(rows + (block.end - block.first), rows + count, high);
  }

  // The same for scales; 0 for keys that do not exist.
  void scales(const CacheScale& scale, const Block& block, std::int64_t count, float* scales) const {
    std::fill(scales, scales + (block.begin - block.first), 0.0f);
    std::fill(scales + (block.end - block.first), scales + count, 0.0f);
    for_each_run(block.begin, block.end, [&](std::int64_t key, std::int64_t run, Slot slot) {
      const float* from = scale.at(slot.block, head_, slot.offset);
      float* const to = scales + (key - block.first);
      if (scale.token_stride == 1) {
        std::copy_n(from, run, to);
      } else {
        for (std::int64_t i = 0; i < run; ++i) to[i] = from[i * scale.token_stride];
      }
    });
  }

  // Fetches the lines of what `scales` will read.
  void fetch_scales(const CacheScale& scale, const Block& block) const {
    if (!scale || scale.token_stride == 0) return;
    constexpr std::int64_t kLineFloats = 16;
    for_each_run(block.begin, block.end, [&](std::int64_t, std::int64_t run, Slot slot) {
      const float* from = scale.at(slot.block, head_, slot.offset);
      const std::int64_t step = std::max<std::int64_t>(1, kLineFloats / std::max<std::int64_t>(1, scale.token_stride));
      for (std::int64_t i = 0; i < run; i += step) fetch_ahead(from + i * scale.token_stride);
    });
  }

  // The scales of one key's channel groups.
  const float* group_scales(const CacheScale& scale, std::int64_t key) const {
    const Slot slot = cache_.slot(batch_, key);
    return scale.at(slot.block, head_, slot.offset);
  }

  const T* row(const Operand& operand, std::int64_t key) const {
    const Slot slot = cache_.slot(batch_, key);
    return operand.row<T>(slot.block, head_, slot.offset);
  }

  // Rows and scales of keys that mostly ascend: a slot is looked up (a division) once for keys that lie behind each
  // other.
  class Cursor {
   public:
    explicit Cursor(const CacheReader& reader) : r_(reader) {}

    const T* row(const Operand& operand, std::int64_t key) {
      move_to(key);
      return operand.row<T>(slot_.block, r_.head_, slot_.offset + (key - first_));
    }
    const float* scale(const CacheScale& scale, std::int64_t key) {
      move_to(key);
      return scale.at(slot_.block, r_.head_, slot_.offset + (key - first_));
    }

   private:
    void move_to(std::int64_t key) {
      if (key >= first_ && key < end_) return;
      slot_ = r_.cache_.slot(r_.batch_, key);
      first_ = key;
      end_ = key + r_.cache_.block_tokens - slot_.offset;
    }

    const CacheReader& r_;
    Slot slot_{};
    std::int64_t first_ = 0, end_ = 0;
  };

 private:
  // f(key, length, slot) for runs of keys that lie behind each other.
  template <class F>
  void for_each_run(std::int64_t begin, std::int64_t end, const F& f) const {
    while (begin < end) {
      const Slot slot = cache_.slot(batch_, begin);
      const std::int64_t run = std::min(end - begin, cache_.block_tokens - slot.offset);
      f(begin, run, slot);
      begin += run;
    }
  }

  const KVStorage& cache_;
  std::int64_t batch_, head_;
};

}  // namespace onepass::cpu
