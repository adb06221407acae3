// cuda/portable/tile.cuh: tiles of rows in shared memory, and how they get there and back.
#pragma once

#include "core/problem.h"
#include "cuda/portable/ptx.cuh"

namespace onepass::cuda {

// kRows × kColumns elements of 2 bytes in chunks of 16 bytes. Chunk c of row r lies at chunk c ^ x(r) of its row, so
// that the eight rows of one 8×8 matrix (same c) fall into eight different bank groups.
template <int kRows, int kColumns>
struct HalfTile {
  static_assert(kColumns % 16 == 0);
  static constexpr int kBytes = kRows * kColumns * 2;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kChunks = kColumns / 8;  // of a row
  static constexpr int kElementsPerChunk = 8;

  // Rows of 64 elements all start in the same bank group; of shorter ones, two (or four) in a row fill one.
  ONEPASS_DEVICE static constexpr int swizzle(int row) {
    return kColumns % 64 == 0 ? row & 7 : kColumns % 32 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
  }
  ONEPASS_DEVICE static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ swizzle(row)) << 4);
  }
};

// kRows × kColumns floats; 4 floats of padding spread the rows over the banks.
template <int kRows, int kColumns>
struct FloatTile {
  static constexpr int kRowBytes = (kColumns + 4) * 4;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kChunks = kColumns / 4;
  static constexpr int kElementsPerChunk = 4;
  ONEPASS_DEVICE static constexpr int offset(int row, int chunk) { return row * kRowBytes + chunk * 16; }
};

template <class T, int kRows, int kColumns>
using SharedTile = std::conditional_t<std::is_same_v<T, float>, FloatTile<kRows, kColumns>, HalfTile<kRows, kColumns>>;

// Rows of one (batch, head) in global memory.
template <class T>
struct GlobalRows {
  T* data;
  std::int64_t stride;  // elements
  int columns;          // head_dim
  bool vectorized;      // every row starts 16-byte aligned and columns fills whole chunks
};

template <class T>
ONEPASS_DEVICE GlobalRows<T> global_rows(const Operand& operand, std::int64_t batch, std::int64_t head,
                                         std::int64_t token, int columns, bool vectorized) {
  return {static_cast<T*>(operand.data) + batch * operand.batch_stride + head * operand.head_stride +
              token * operand.token_stride,
          operand.token_stride, columns, vectorized};
}

// One chunk, element by element.
template <class T, int kElements>
ONEPASS_DEVICE uint4 gather_chunk(const T* row, int column, int columns) {
  uint4 chunk;
  T* const elements = reinterpret_cast<T*>(&chunk);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    elements[i] = column + i < columns ? row[column + i] : from_float<T>(0.0f);
  }
  return chunk;
}

// Starts copying rows [first, first + kRows) into a tile; rows outside `live` and columns past the head dim become
// zeros, so that 0·NaN never comes from memory that no query may see. The copy is complete after cp_async_wait and
// __syncthreads.
// kRecompute: addresses are worked out anew at every call, for loops that lack the registers to keep them.
template <class Tile, int kRows, int kThreads, bool kRecompute = false, class T>
ONEPASS_DEVICE void load_tile(std::uint32_t tile, const GlobalRows<const T>& rows, int first, int live_begin,
                              int live_end) {
  constexpr int kElements = Tile::kElementsPerChunk;
  constexpr int kRowsPerStep = kThreads >= Tile::kChunks ? kThreads / Tile::kChunks : 1;
  constexpr bool kRegular = kThreads % Tile::kChunks == 0 && kRows % kRowsPerStep == 0;
  if (kRegular && rows.vectorized && first >= live_begin && first + kRows <= live_end) {
    // The common case: a thread keeps its chunk, and its address advances by a constant.
    const int thread = kRecompute ? opaque(threadIdx.x) : threadIdx.x;
    const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const bool valid = chunk * kElements < rows.columns;
    const T* source = rows.data + (first + row) * rows.stride + (valid ? chunk * kElements : 0);
#pragma unroll
    for (int step = 0; step < kRows / kRowsPerStep; ++step) {
      cp_async_16(tile + Tile::offset(row + step * kRowsPerStep, chunk), source, valid);
      source += kRowsPerStep * rows.stride;
    }
    return;
  }
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * Tile::kChunks; index += kThreads) {
    const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    const int token = first + row, column = chunk * kElements;
    const bool live = token >= live_begin && token < live_end && column < rows.columns;
    const T* const source = rows.data + (live ? token * rows.stride : 0);
    const std::uint32_t destination = tile + Tile::offset(row, chunk);
    if (rows.vectorized) {
      cp_async_16(destination, source + (live ? column : 0), live);
    } else {
      store_shared(destination, live ? gather_chunk<T, kElements>(source, column, rows.columns) : uint4{0, 0, 0, 0});
    }
  }
}

// Writes tile rows [0, count) to global rows [first, first + count), by the lanes [0, kLanes) that call it.
template <class Tile, int kLanes, class T>
ONEPASS_DEVICE void store_tile(std::uint32_t tile, const GlobalRows<T>& rows, int first, int count, int lane) {
  for (int index = lane; index < count * Tile::kChunks; index += kLanes) {
    const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
    const int column = chunk * Tile::kElementsPerChunk;
    if (column >= rows.columns) continue;
    const uint4 value = load_shared<uint4>(tile + Tile::offset(row, chunk));
    T* const destination = rows.data + (first + row) * rows.stride + column;
    if (rows.vectorized) {
      *reinterpret_cast<uint4*>(destination) = value;
    } else {
      const T* const elements = reinterpret_cast<const T*>(&value);
#pragma unroll
      for (int i = 0; i < Tile::kElementsPerChunk; ++i) {
        if (column + i < rows.columns) destination[i] = elements[i];
      }
    }
  }
}

}  // namespace onepass::cuda
