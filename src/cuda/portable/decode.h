// cuda/portable/decode.h: what the host and the decode kernels agree on.
//
// A pair is a (sequence, key/value head); its rows are all queries of all query heads of the group, query by query. The
// keys that some row sees are cut into units of 16 or 32, and all units of all pairs stand in one line. Blocks take
// equal shares of that line, or, with a fixed number of parts, one part of one pair each. Lengths live on the device,
// so every block works out its own share; bits depend on lengths alone, not on capacities or storage.
#pragma once

#include <bit>
#include <cstdint>

#include "core/cache_problem.h"

namespace onepass::cuda {

// n / divisor for 0 ≤ n < 2^31 by one multiplication: ⌈2^(31 + s) / d⌉ with 2^s ≥ d errs by less than 2^−31.
struct Divider {
  std::uint32_t factor = 1u << 31;
  int shift = 31;

  Divider() = default;
  explicit Divider(std::int64_t divisor) {
    const auto d = static_cast<std::uint64_t>(divisor < 1 ? 1 : divisor);
    shift = 31 + static_cast<int>(std::bit_width(d - 1));
    factor = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
  }
  constexpr int operator()(int n) const {
    return static_cast<int>((static_cast<std::uint64_t>(static_cast<std::uint32_t>(n)) * factor) >> shift);
  }
};

// Lengths and windows are below 2^30, so that positions are computed in 32 bits.
inline constexpr int kUnboundedTokens = 1 << 30;

// Of one row and one part of its keys; the undivided output of the part stands beside it.
struct PartialState {
  float largest;   // log2 units; −inf when no logit was above it
  float sum;       // of 2^(logit − largest)
  float rounded;   // the same of the weights as the product with V rounds them; the output is divided by this
  float repaired;  // not 0: infinities and NaNs among the values were left out and must be added
};

// Keys or values; strides in bytes.
struct StoredRows {
  const char* data;
  std::int64_t block_stride, head_stride;
  int token_stride;
};

// Constant memory is fetched by the line when it is first touched, and every launch touches it anew: what a call
// without options needs comes first, in the narrowest types, and such a call reads nothing of `problem`.
struct DecodeArguments {
  const std::int32_t *seqlens, *first_key;
  int batch, heads_kv, seqlen_q;
  int group_size;
  int capacity;                   // tokens that a sequence may have
  int window_left, window_right;  // at most kUnboundedTokens
  int parts;                      // of a pair; 0: equal shares
  Divider grid, block_tokens;
  const std::int32_t *page_table, *batch_index;
  int page_table_stride, page_tokens, num_blocks;
  float softmax_scale;
  StoredRows k, v;
  Operand q;
  Divider group;
  int rows, columns;        // of a slot
  PartialState* states;     // (slots, rows). Equal shares: two slots a block; else one a (pair, row block, part)
  float* partials;          // (slots, rows, columns)
  std::uint64_t* arrivals;  // (blocks, rows), of the pair that a block begins; else (pairs, row blocks, rows)
  std::uint64_t ticket;     // see cuda/ticket.h
  const void* sinks;
  DType sinks_dtype, dtype;
  Operand out;
  int head_dim_v;
  bool vectorized_out;
  bool has_terms;  // softcap or ALiBi
  RowVector lse;
  int max_rows;    // sequences of more rows are left to another kernel
  int row_blocks;  // of a.rows rows, each worked on like a pair; 1 with equal shares
  CachedProblem problem;
};

struct DecodeKernel {
  void (*kernel)(DecodeArguments);
  int threads, shared_bytes;
  int blocks_per_multiprocessor;
  int rows;     // at most, of a pair
  int columns;  // head dim that the kernel computes with
};

// Kernels on tensor cores for 16-byte aligned rows: float16 and bfloat16 queries over the same type or 8 bits (and
// bfloat16 over float16). plain_tokens: 0, or, of a plain call (see is_plain()), tokens that a unit must divide. Null
// when there is none. Each head dim is instantiated in a file of its own, decode_<dim>.cu.
template <int kHeadDim>
DecodeKernel decode_kernel_for(DType storage, int rows, int plain_tokens);

// For everything else: any types and strides, head dims up to 512, scales of groups of channels, thresholds; float32
// products. a.rows are kGeneralRows.
inline constexpr int kGeneralRows = 8;
DecodeKernel general_decode_kernel(DType storage, std::int64_t head_dim);

}  // namespace onepass::cuda
