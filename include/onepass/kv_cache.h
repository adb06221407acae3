// onepass/kv_cache.h: key/value caches: the view of one, appending to it, attention over it, and page accounting.
//
// Shapes: B batch, G key/value heads, D head_dim, Dv head_dim_v (both at most 512). A cache is made of blocks:
//   contiguous: k (rows, G, capacity, D), v (rows, G, capacity, Dv): one block for each sequence;
//   paged:      k (num_pages, G, page_size, D), v likewise, and page_table: token t of sequence b lies in page
//               page_table[b][t / page_size] at offset t % page_size.
// Strides are free except that the last dimension is contiguous, so head-major ("HND") storage and token-major ("NHD",
// given as a transposed view) are both taken as they are.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "onepass/attention.h"

namespace onepass {

// What shares one scale of a quantized cache: value = stored · scale. Scales are float32, K's and V's apart.
// int8 takes all but kNone, float8 takes kNone and kTensor. Only kTensor's scales are given by the caller; the others
// are written by append_kv: max(absmax / 127, 1e-5).
enum class ScaleGranularity : std::uint8_t {
  kNone = 0,    // no scales
  kTensor = 1,  // (1)
  kToken = 2,   // (blocks, block tokens): all heads of a token
  kHead = 3,    // (blocks, G, block tokens): a head of a token
  kGroup = 4,   // (blocks, G, block tokens, D / scale_group): scale_group channels of a head of a token
};

// Non-owning. Index tensors are int32 on the device of k. On the CPU they are checked before anything is written; on
// CUDA the kernels that read them skip what is out of range.
struct KVCacheView {
  TensorView k = {};           // float64 (reference), float32, float16, bfloat16, int8, float8_e4m3 or float8_e5m2
  TensorView v = {};           // dtype of k
  TensorView page_table = {};  // (B, max_pages); only for a paged cache. Entries past a sequence's length are not read.
  TensorView seqlens = {};     // (B): tokens stored for each sequence
  TensorView k_scale = {};
  TensorView v_scale = {};
  ScaleGranularity scale_granularity = ScaleGranularity::kNone;
  std::int64_t scale_group = 0;  // for kGroup: channels that share a scale; divides D and Dv
  TensorView first_key = {};     // (B): first valid token (left padding); default 0
  TensorView batch_index = {};   // (B): the row of k and v that serves each sequence; contiguous only; default b
};

// Rotary embedding (Su et al. 2021) of channels [0, 2·pairs) of a token at position p: pairs (x, y) become
// (x·cos[p] − y·sin[p], x·sin[p] + y·cos[p]), in float32. Positions count from the sequence's first valid token.
struct Rotary {
  TensorView cos = {};       // (max_positions, pairs): float32 or the dtype of the new tokens
  TensorView sin = {};       // like cos
  bool interleaved = false;  // pairs are channels (2i, 2i + 1) (GPT-J); else (i, i + pairs) (Llama)
};

struct AppendOptions {
  TensorView cu_seqlens = {};  // int32 (B + 1): k_new and v_new are packed, (total, G, dim)
  TensorView seqlens = {};     // int32 (B): tokens of each row of dense k_new and v_new that count; default all
  Rotary rotary = {};          // of k_new
  bool advance = true;         // add the new tokens to cache.seqlens
};

// Stores new tokens behind those that each sequence has, quantizing on the way. k_new (B, G, S, D), v_new
// (B, G, S, Dv), or packed. Throws Error before anything is written when one sequence lacks room.
//
// int8: round to nearest even of x / scale, at most ±127. A token whose values are not all finite gets the scale NaN
// and so stays visible as NaN. float8: cast to nearest even, saturating (also infinity), NaN stays.
ONEPASS_API void append_kv(const KVCacheView& cache, const TensorView& k_new, const TensorView& v_new,
                           const AppendOptions& options = {}, const ExecutionContext& context = {});

struct CachedOptions {
  bool causal = true;  // bottom-right: the last query of a sequence sees all its keys
  std::optional<double> softmax_scale = {};
  Window window = {};
  double softcap = 0.0;
  Alibi alibi = {};
  TensorView sinks = {};
  TensorView cu_seqlens_q = {};   // int32 (B + 1): q and out are packed, (total_q, H, dim); lse is (H, total_q)
  std::int64_t max_seqlen_q = 0;  // with cu_seqlens_q on CUDA: bound of the longest; 0: total_q
  TensorView k_new = {};          // append these first: shaped as for append_kv, packed by cu_seqlens_q
  TensorView v_new = {};
  bool advance = true;  // with k_new: add the new tokens to cache.seqlens
  Rotary rotary = {};   // of q and k_new. Query i of a sequence has the position of its key i + seqlen_k − seqlen_q
  // Parts that the keys of a sequence are split into, attended apart and merged exactly; 0: chosen for speed. With a
  // fixed number a row's bits do not depend on what else is in the batch, nor on the number of threads.
  std::int64_t num_splits = 0;
  // Values whose weight relative to the row's largest, exp(s − max), is at most this are skipped without
  // renormalising: lse and the denominator keep them. 0: exact.
  double prob_threshold = 0.0;
};

// Attention of q over the cache (and over k_new, stored first when given): any mix of decode, several query tokens,
// chunked prefill and prefill. q (B, H, Sq, D), outputs.out (B, H, Sq, Dv), outputs.lse float32 (B, H, Sq), or packed.
// Queries keep their dtype: the result is that of exact attention over the dequantized cache.
// outputs.total_attention is not taken. Rows without a visible key: out 0, lse −inf. Throws before writing anything.
ONEPASS_API void cached_attention(const TensorView& q, const KVCacheView& cache, const AttentionOutputs& outputs,
                                  const CachedOptions& options = {}, const ExecutionContext& context = {});

struct PageCopy {
  std::int32_t source, target;
};

// Which page belongs to whom, on the host. A view too: the state lives in the caller's memory (on the CPU page_table
// and seqlens can be the very tensors of the KVCacheView), so it can be copied and stored like any tensor.
// Sequences may share pages: reserve gives a sequence its own copy of a shared page before tokens are written to it.
class ONEPASS_API PagePool {
 public:
  // page_table int32 (sequences, max_pages): a sequence's pages, then −1s; seqlens int32 (sequences): tokens stored;
  // reference_counts int32 (num_pages). All contiguous, on the CPU. An empty pool: −1s, zeros, zeros.
  PagePool(const TensorView& page_table, const TensorView& seqlens, const TensorView& reference_counts,
           std::int64_t page_size);

  // Makes room for counts[b] more tokens of every sequence b: all or, with an Error and no change, nothing.
  // Returns the pages whose content must be copied before the tokens are written (see copy_pages).
  std::vector<PageCopy> reserve(std::span<const std::int64_t> counts);

  // Gives back all pages of the sequence, or those behind its first `length` tokens, which become its length.
  void free(std::int64_t sequence) { truncate(sequence, 0); }
  void truncate(std::int64_t sequence, std::int64_t length);

  // `target`, freed first, shares the pages of the first `length` tokens of `source` (by default all of them).
  void fork(std::int64_t source, std::int64_t target, std::optional<std::int64_t> length = {});

  std::int64_t free_pages() const;

 private:
  std::int32_t& entry(std::int64_t sequence, std::int64_t index) const;
  void check_sequence(const char* operation, const char* argument, std::int64_t sequence) const;
  void check_pages(const char* operation, std::int64_t sequence, std::int64_t begin, std::int64_t end) const;
  void release(std::int64_t sequence, std::int64_t from);

  std::int32_t* page_table_;
  std::int32_t* seqlens_;
  std::int32_t* reference_counts_;
  std::int64_t sequences_, max_pages_, num_pages_, page_size_;
};

// Copies pages of k, v and their scales, in order (CPU).
ONEPASS_API void copy_pages(const KVCacheView& cache, std::span<const PageCopy> copies);

}  // namespace onepass
