// cuda/portable/cached.cpp: host side of attention over caches: which kernel, how the keys are split, workspace.
#include <algorithm>
#include <numbers>

#include "core/parallel.h"
#include "cuda/graph_launch.h"
#include "cuda/portable/cached_tile.h"
#include "cuda/portable/choose.h"
#include "cuda/portable/decode.h"
#include "cuda/portable/operations.h"
#include "cuda/portable/ragged.h"
#include "cuda/ticket.h"

namespace onepass::cuda {
namespace {

constexpr std::int64_t kMaxCachedHeadDim = 512;
constexpr std::int64_t kMostParts = 64;    // that are chosen; a caller may ask for more
constexpr std::int64_t kLongestUnit = 32;  // tokens

// Rows of a (sequence, key/value head): all queries of all heads of the group.
std::int64_t longest_rows(const CachedProblem& problem) {
  return problem.attention.seqlen_q * problem.attention.group_size();
}

// Whether every row of a stored operand can be read 16 bytes at a time.
bool has_aligned_rows(const Operand& operand, const KVStorage& cache, std::int64_t dim) {
  return is_vectorizable(operand, cache.dtype, cache.num_blocks, cache.num_heads_kv, cache.block_tokens, dim);
}

bool has_vectorized_output(const Problem& p) {
  return is_vectorizable(p.out, p.dtype, p.batch, p.num_heads, p.total_q, p.head_dim_v);
}

// Within a unit, offsets of plain calls are computed in 32 bits.
bool has_near_tokens(const Operand& operand) { return std::abs(operand.token_stride) < (1 << 24); }

// What the kernels without options take: dense queries in rows of 16 bytes, the kernel's own head dim, keys that are
// bounded by lengths, windows and padding alone. Units must lie in one page, too.
bool is_plain(const CachedProblem& problem, std::int64_t kernel_head_dim) {
  const Problem& p = problem.attention;
  const KVStorage& cache = problem.cache;
  const NewTokens& pending = problem.pending;
  const bool same_type = p.dtype == cache.dtype || size_of(cache.dtype) == 1;  // queries are loaded as they are
  return same_type && p.head_dim == kernel_head_dim && p.head_dim_v == kernel_head_dim && p.cu_seqlens_q == nullptr &&
         p.alibi_slopes == nullptr && p.softcap == 0 && !problem.rotary && pending.each == 0 &&
         pending.counts == nullptr && pending.cu_seqlens == nullptr && problem.num_splits == 0 &&
         has_near_tokens(cache.k) && has_near_tokens(cache.v) && has_vectorized_output(p) &&
         is_vectorizable(p.q, p.dtype, p.batch, p.num_heads, p.total_q, p.head_dim);
}

// The kernel on tensor cores for up to `rows` rows, or none.
DecodeKernel matrix_kernel(const CachedProblem& problem, std::int64_t rows) {
  const KVStorage& cache = problem.cache;
  const DType queries = problem.attention.dtype;
  const bool bytes = size_of(cache.dtype) == 1;
  const bool products = queries == cache.dtype || bytes || cache.dtype == DType::kFloat16;
  if (queries == DType::kFloat32 || cache.dtype == DType::kFloat32 || !products || problem.prob_threshold > 0 ||
      cache.granularity == ScaleGranularity::kGroup || rows > 32 ||
      std::max(cache.head_dim, cache.head_dim_v) > kHeadDims.back() ||
      !has_aligned_rows(cache.k, cache, cache.head_dim) || !has_aligned_rows(cache.v, cache, cache.head_dim_v)) {
    return {};
  }
  return with_head_dim(padded_head_dim(problem.attention), [&](auto head_dim) {
    const bool plain = is_plain(problem, head_dim.value);
    const std::int64_t tokens = !plain ? 0 : cache.paged() ? cache.block_tokens : kLongestUnit;
    return decode_kernel_for<head_dim.value>(cache.dtype, static_cast<int>(rows), static_cast<int>(tokens));
  });
}

// Rows up to which a pair is decoded, rather than computed in tiles.
std::int64_t few_rows(const CachedProblem& problem) {
  return std::max(problem.cache.head_dim, problem.cache.head_dim_v) > 128 ? 16 : 32;
}

int window_of(std::int64_t tokens) {
  return static_cast<int>(tokens == kUnbounded ? kUnboundedTokens
                                               : std::clamp<std::int64_t>(tokens, -kUnboundedTokens, kUnboundedTokens));
}

DecodeArguments arguments_of(const CachedProblem& problem, const DecodeKernel& kernel, std::int64_t max_rows) {
  const Problem& p = problem.attention;
  const KVStorage& cache = problem.cache;
  const auto rows_of = [&](const Operand& operand) -> StoredRows {
    const auto bytes = static_cast<std::int64_t>(size_of(cache.dtype));
    return {static_cast<const char*>(operand.data), operand.batch_stride * bytes, operand.head_stride * bytes,
            static_cast<int>(operand.token_stride * bytes)};
  };
  DecodeArguments a{};
  a.problem = problem;
  a.k = rows_of(cache.k);
  a.v = rows_of(cache.v);
  a.q = p.q;
  a.out = p.out;
  a.lse = p.lse;
  a.seqlens = cache.seqlens;
  a.first_key = cache.first_key;
  a.batch_index = cache.batch_index;
  a.page_table = cache.page_table;
  a.page_table_stride = static_cast<int>(cache.page_table_stride);
  a.num_blocks = static_cast<int>(cache.num_blocks);
  a.page_tokens = static_cast<int>(cache.block_tokens);
  a.batch = static_cast<int>(p.batch);
  a.heads_kv = static_cast<int>(cache.num_heads_kv);
  a.seqlen_q = static_cast<int>(p.seqlen_q);
  a.softmax_scale = p.softmax_scale;
  a.dtype = p.dtype;
  a.sinks = p.sinks;
  a.sinks_dtype = p.sinks_dtype;
  a.head_dim_v = static_cast<int>(p.head_dim_v);
  a.block_tokens = Divider(cache.block_tokens);
  a.group = Divider(p.group_size());
  a.group_size = static_cast<int>(p.group_size());
  a.max_rows = static_cast<int>(max_rows);
  a.capacity = static_cast<int>(problem.cache.capacity());
  a.window_left = window_of(p.window_left);
  a.window_right = window_of(p.window_right);
  a.parts = static_cast<int>(
      std::min({problem.num_splits, problem.cache.capacity() + 1, std::int64_t{(1 << kTicketCountBits) - 1}}));
  a.row_blocks = 1;
  a.has_terms = p.softcap > 0 || p.alibi_slopes != nullptr;
  a.vectorized_out = has_vectorized_output(p);
  a.rows = kernel.rows;
  a.columns = kernel.columns;
  return a;
}

void run_parts(const CachedProblem& problem, const DecodeKernel& kernel, DecodeArguments a, std::int64_t blocks,
               const ExecutionContext& context) {
  const std::int64_t slots = a.parts == 0 ? 2 * blocks : a.parts == 1 ? 0 : blocks;
  const std::int64_t counters = a.parts == 0 ? blocks : a.parts == 1 ? 0 : blocks / a.parts;
  const auto rows = static_cast<std::size_t>(slots * a.rows), counted = static_cast<std::size_t>(counters * a.rows);
  const std::size_t partial_bytes = rows * a.columns * sizeof(float), state_bytes = rows * sizeof(PartialState);
  const Workspace workspace(context, problem.attention.device,
                            partial_bytes + state_bytes + counted * sizeof(std::uint64_t));
  a.partials = workspace.as<float>();
  a.states = reinterpret_cast<PartialState*>(workspace.as<char>() + partial_bytes);
  a.arrivals = reinterpret_cast<std::uint64_t*>(workspace.as<char>() + partial_bytes + state_bytes);
  a.ticket = begin_counting(a.arrivals, counted * sizeof(std::uint64_t), a.parts > 0 ? a.parts : blocks,
                            problem.attention.operation, context.stream);
  a.grid = Divider(blocks);
  launch_dependent(problem.attention.operation, kernel.kernel, {blocks, kernel.threads, kernel.shared_bytes},
                   problem.attention.device.index, context.stream, a);
}

// The kernel that a row gets must not depend on the rows of other sequences where its bits must not.
DecodeKernel chosen_kernel(const CachedProblem& problem, std::int64_t rows) {
  return matrix_kernel(problem, problem.num_splits > 0 ? few_rows(problem) : rows);
}

// Equal shares for every block that fits at once, or the number of parts that the caller wants.
void run_matrix(const CachedProblem& problem, const DecodeKernel& kernel, std::int64_t max_rows,
                const ExecutionContext& context) {
  const std::int64_t pairs = problem.attention.batch * problem.cache.num_heads_kv;
  const DecodeArguments a = arguments_of(problem, kernel, max_rows);
  const std::int64_t resident =
      std::int64_t{device_info(problem.attention.device.index).multiprocessors} * kernel.blocks_per_multiprocessor;
  const std::int64_t blocks = a.parts > 0 ? pairs * a.parts : resident;
  run_parts(problem, kernel, a, blocks, context);
}

// Sequences of at most max_rows rows.
void run_general(const CachedProblem& problem, std::int64_t max_rows, const ExecutionContext& context) {
  const std::int64_t head_dim = std::max(problem.cache.head_dim, problem.cache.head_dim_v);
  const DecodeKernel kernel = general_decode_kernel(problem.cache.dtype, head_dim);
  const std::int64_t pairs = problem.attention.batch * problem.cache.num_heads_kv;
  DecodeArguments a = arguments_of(problem, kernel, max_rows);
  a.row_blocks = static_cast<int>(ceil_div(max_rows, kernel.rows));
  if (problem.prob_threshold > 0) {
    a.parts = 1;  // weights are dropped relative to the row's largest
  } else if (a.parts == 0) {
    const std::int64_t wanted = 4 * device_info(problem.attention.device.index).multiprocessors /
                                std::max<std::int64_t>(1, pairs * a.row_blocks);
    a.parts = static_cast<int>(std::clamp<std::int64_t>(wanted, 1, kMostParts));
  }
  const std::int64_t blocks = pairs * a.row_blocks * a.parts;
  run_parts(problem, kernel, a, blocks, context);
}

CachedTileKernel tile_kernel(const CachedProblem& problem) {
  const Problem& p = problem.attention;
  if (problem.prob_threshold > 0 || std::max(p.head_dim, p.head_dim_v) > kHeadDims.back()) return {};
  return with_head_dim(padded_head_dim(p),
                       [&](auto head_dim) { return cached_tile_kernel_for<head_dim.value>(p.dtype); });
}

// Sequences of at least min_rows rows.
void run_tile(const CachedProblem& problem, const CachedTileKernel& kernel, std::int64_t min_rows,
              const ExecutionContext& context) {
  const Problem& p = problem.attention;
  const KVStorage& cache = problem.cache;
  CachedTileArguments tile{};
  tile.rows = arguments_of(problem, {}, 0);
  tile.rows.has_terms = has_terms(p);
  tile.min_rows = static_cast<int>(min_rows);
  tile.row_tiles = static_cast<int>(ceil_div(longest_rows(problem), kernel.rows));
  tile.last_rows_first = p.window_right != kUnbounded;
  tile.vectorized_q = is_vectorizable(p.q, p.dtype, p.batch, p.num_heads, p.total_q, p.head_dim);
  const bool bytes = size_of(cache.dtype) == 1;
  const bool aligned_k = has_aligned_rows(cache.k, cache, cache.head_dim);
  const bool aligned_v = has_aligned_rows(cache.v, cache, cache.head_dim_v);
  tile.direct_keys = cache.dtype == p.dtype && aligned_k;
  tile.direct_values = cache.dtype == p.dtype && aligned_v;
  tile.aligned_keys = bytes && aligned_k;
  tile.aligned_values = bytes && aligned_v;
  tile.scale_log2 = tile.rows.has_terms ? 1.0f : std::numbers::log2e_v<float> * p.softmax_scale;
  launch_dependent(p.operation, kernel.kernel,
                   {tile.row_tiles * p.batch * cache.num_heads_kv, kernel.threads, kernel.shared_bytes}, p.device.index,
                   context.stream, tile);
}

// Few rows are bound by memory, many by arithmetic; a batch may have sequences of both kinds. Few rows come first: they
// alone take memory, and a call that finds none must have written nothing.
void attend(const CachedProblem& problem, const ExecutionContext& context) {
  const std::int64_t rows = longest_rows(problem);
  const CachedTileKernel tile = tile_kernel(problem);
  const std::int64_t few = tile.kernel == nullptr ? rows : std::min(rows, few_rows(problem));
  if (rows <= few || problem.attention.ragged()) {
    if (const DecodeKernel kernel = chosen_kernel(problem, few); kernel.kernel != nullptr) {
      run_matrix(problem, kernel, few, context);
    } else {
      run_general(problem, few, context);
    }
  }
  if (rows > few) run_tile(problem, tile, few + 1, context);
}

}  // namespace

Unsupported supports_cached(const CachedProblem& problem) {
  const Problem& p = problem.attention;
  const std::int64_t head_dim = std::max(problem.cache.head_dim, problem.cache.head_dim_v);
  if (Unsupported reason = common_limits(p.device, p.dtype, 0)) return reason;
  if (problem.cache.dtype == DType::kFloat64) return "a float64 cache (float32, float16, bfloat16, int8 or float8)";
  if (head_dim > kMaxCachedHeadDim) return "head_dim " + std::to_string(head_dim) + " (at most 512)";
  const std::int64_t limit = kUnboundedTokens;
  if (p.seqlen_q + problem.cache.capacity() > limit || longest_rows(problem) > limit) {
    return "seqlen_q + capacity, or rows of a key/value head, beyond " + std::to_string(limit);
  }
  return std::nullopt;
}

void cached(const CachedProblem& problem, const ExecutionContext& context) {
  const Problem& p = problem.attention;
  const DeviceGuard guard(p.device.index);
  if (p.batch > 0 && p.num_heads > 0 && p.seqlen_q > 0) attend(problem, context);
  if (p.ragged()) clear_unowned_queries(p, p.out, p.head_dim_v, p.lse, context);
}

}  // namespace onepass::cuda
