// cuda/portable/append.cu: stores new tokens: rotated, scaled and cast in float32. One block a token, one warp a row (a
// head's key or value).
#include <algorithm>

#include "core/float8.h"
#include "cuda/common/scalar.cuh"
#include "cuda/graph_launch.h"
#include "cuda/portable/cached_sequence.cuh"
#include "cuda/portable/choose.h"
#include "cuda/portable/decode_ptx.cuh"
#include "cuda/portable/operations.h"

namespace onepass::cuda {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kPerLane = 16;  // channels of the longest row

struct AppendArguments {
  AppendProblem problem;
  Divider block_tokens;
  int tokens;    // blocks of a sequence
  bool advance;  // one block a sequence: it may change the length that no other block reads
};

ONEPASS_DEVICE std::int64_t capacity_of(const KVStorage& cache) {
  return cache.page_table != nullptr ? cache.max_pages * cache.block_tokens : cache.block_tokens;
}

// One of K and V.
struct Side {
  const Operand &source, &stored;
  const CacheScale& scale;
  int dim;
  bool rotated;
};
ONEPASS_DEVICE Side side_of(const AppendProblem& p, bool values) {
  const KVStorage& c = p.cache;
  if (values) return {p.v_new, c.v, c.v_scale, static_cast<int>(c.head_dim_v), false};
  return {p.k_new, c.k, c.k_scale, static_cast<int>(c.head_dim), p.rotary.cos != nullptr};
}

// Channels lane + 32·i of row `row` of the new tensor.
ONEPASS_DEVICE void load_new(float (&x)[kPerLane], const AppendProblem& p, const Side& side, std::int64_t row,
                             int position) {
  const int lane = threadIdx.x % 32;
  const RotaryTable& table = p.rotary;
  const int pairs = static_cast<int>(table.pairs);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    x[i] = d < side.dim ? load_as_float(side.source.data, p.dtype, row + d) : 0.0f;
    if (!side.rotated || d >= 2 * pairs) continue;
    const int pair = table.interleaved ? d / 2 : d % pairs;
    const bool second = table.interleaved ? d % 2 : d >= pairs;
    const int partner = table.interleaved ? d ^ 1 : second ? d - pairs : d + pairs;
    const float cosine = load_as_float(table.cos, table.dtype, position * table.cos_stride + pair);
    const float sine = load_as_float(table.sin, table.dtype, position * table.sin_stride + pair);
    const float other = load_as_float(side.source.data, p.dtype, row + partner);
    x[i] = second ? fmaf(other, sine, x[i] * cosine) : fmaf(x[i], cosine, -other * sine);
  }
}

// |x| as an integer that orders like it; infinities and NaNs above all numbers.
ONEPASS_DEVICE std::uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }
ONEPASS_DEVICE float scale_of(std::uint32_t largest) {
  return largest < 0x7F800000u ? fmaxf(__fdiv_rn(__uint_as_float(largest), 127.0f), 1e-5f)
                               : __uint_as_float(0x7FC00000u);
}

ONEPASS_DEVICE void store_stored(void* data, DType dtype, std::int64_t index, float x, float scale) {
  switch (dtype) {
    case DType::kInt8: {
      const float quotient = __fdiv_rn(x, scale);
      static_cast<std::int8_t*>(data)[index] =
          quotient != quotient ? std::int8_t{0}
                               : static_cast<std::int8_t>(rintf(fminf(fmaxf(quotient, -127.0f), 127.0f)));
      return;
    }
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2: {
      const bool e4m3 = dtype == DType::kFloat8E4M3;
      const float quotient = __fdiv_rn(x, scale);
      std::uint8_t bits = e4m3 ? 0x7F : 0x7E;  // NaN
      if (quotient == quotient) {
        bits = e4m3 ? detail::float8_magnitude<3, 7>(fminf(fabsf(quotient), 448.0f))
                    : detail::float8_magnitude<2, 15>(fminf(fabsf(quotient), 57344.0f));
      }
      static_cast<std::uint8_t*>(data)[index] =
          static_cast<std::uint8_t>(bits | (__float_as_uint(quotient) >> 31) << 7);
      return;
    }
    case DType::kFloat16: static_cast<__half*>(data)[index] = from_float<__half>(x); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x); return;
    default: static_cast<float*>(data)[index] = x;
  }
}

// Writes a row and the scales that are its own; `shared`: 512 floats of the warp. token_largest: of all heads.
ONEPASS_DEVICE void store_row(const float (&x)[kPerLane], const KVStorage& cache, const Side& side, TokenSlot slot,
                              int head, std::uint32_t token_largest, float* shared) {
  const int lane = threadIdx.x % 32;
  float* const scales = side.scale.data != nullptr ? side.scale.data + offset_in(side.scale, slot, head) : nullptr;
  const std::int64_t offset = offset_in(side.stored, slot, head);
  const bool grouped = cache.granularity == ScaleGranularity::kGroup;
  const int group = static_cast<int>(cache.group_channels);
  float scale = 1.0f;
  if (cache.granularity == ScaleGranularity::kTensor) scale = *scales;
  if (cache.granularity == ScaleGranularity::kToken) scale = scale_of(token_largest);
  if (cache.granularity == ScaleGranularity::kHead) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) largest = max(largest, magnitude(x[i]));
    scale = scale_of(__reduce_max_sync(~0u, largest));
  }
  if (grouped) {  // values, then the scales of their groups, by way of shared memory
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) shared[lane + 32 * i] = x[i];
    __syncwarp();
    for (int g = lane; g < side.dim / group; g += 32) {
      std::uint32_t largest = 0;
      for (int d = g * group; d < (g + 1) * group; ++d) largest = max(largest, magnitude(shared[d]));
      scales[g] = scale_of(largest);
    }
    __syncwarp();
  } else if (lane == 0 && (cache.granularity == ScaleGranularity::kHead ||
                           (cache.granularity == ScaleGranularity::kToken && head == 0))) {
    *scales = scale;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < side.dim) {
      store_stored(side.stored.data, cache.dtype, offset + d, x[i], grouped ? scales[d / group] : scale);
    }
  }
}

__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendArguments a) {
  __shared__ float groups[kWarps][32 * kPerLane];
  __shared__ std::uint32_t largest[2];
  allow_next_grid();
  wait_for_previous_grid();
  const AppendProblem& p = a.problem;
  const KVStorage& cache = p.cache;
  const int batch = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens, count = new_tokens(p.tokens, batch);
  const std::int64_t capacity = capacity_of(cache);
  const int stored = clamp_to(cache.seqlens[batch], 0, capacity);
  const std::int64_t first = p.tokens.cu_seqlens != nullptr ? p.tokens.cu_seqlens[batch] : 0;
  const std::int64_t source = first + token;
  const bool exists = p.tokens.cu_seqlens == nullptr || (source >= 0 && source < p.total_new);
  const std::int64_t position = std::int64_t{stored} + token;
  TokenSlot slot{-1, 0};
  if (token < count && exists && position < capacity) {
    slot = slot_of(cache, a.block_tokens, batch, static_cast<int>(position));
  }
  if (slot.block >= 0) {
    const int heads = static_cast<int>(cache.num_heads_kv), warp = threadIdx.x / 32;
    const int start = cache.first_key != nullptr ? max(cache.first_key[batch], 0) : 0;
    const int rotary = p.rotary.cos != nullptr ? clamp_to(position - start, 0, p.rotary.max_positions - 1) : 0;
    const bool of_token = cache.granularity == ScaleGranularity::kToken;
    if (of_token) {
      if (threadIdx.x < 2) largest[threadIdx.x] = 0;
      __syncthreads();
    }
    for (int pass = of_token ? 0 : 1; pass < 2; ++pass) {
      for (int row = warp; row < 2 * heads; row += kWarps) {
        const Side side = side_of(p, row >= heads);
        const int head = row % heads;
        float x[kPerLane];
        load_new(x, p, side,
                 batch * side.source.batch_stride + head * side.source.head_stride + source * side.source.token_stride,
                 rotary);
        if (pass == 1) {
          store_row(x, cache, side, slot, head, largest[row >= heads], groups[warp]);
          continue;
        }
        std::uint32_t of_row = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) of_row = max(of_row, magnitude(x[i]));
        of_row = __reduce_max_sync(~0u, of_row);
        if (threadIdx.x % 32 == 0) atomicMax(&largest[row >= heads], of_row);
      }
      __syncthreads();
    }
  }
  if (a.advance) {
    __syncthreads();  // everybody has read the length
    if (threadIdx.x == 0) cache.seqlens[batch] = clamp_to(std::int64_t{stored} + count, 0, capacity);
  }
}

__global__ void __launch_bounds__(256) advance_kernel(const __grid_constant__ AppendArguments a) {
  allow_next_grid();
  wait_for_previous_grid();
  const KVStorage& cache = a.problem.cache;
  const int batch = blockIdx.x * 256 + threadIdx.x;
  if (batch >= cache.batch) return;
  const std::int64_t capacity = capacity_of(cache);
  const int stored = clamp_to(cache.seqlens[batch], 0, capacity);
  cache.seqlens[batch] = clamp_to(std::int64_t{stored} + new_tokens(a.problem.tokens, batch), 0, capacity);
}

}  // namespace

Unsupported supports_append(const AppendProblem& problem) {
  if (Unsupported reason = common_limits(problem.device, problem.dtype, 0)) return reason;
  if (problem.cache.dtype == DType::kFloat64) return "a float64 cache (float32, float16, bfloat16, int8 or float8)";
  if (problem.cache.batch * problem.max_new > kMaxBlocks) {
    return std::to_string(problem.cache.batch * problem.max_new) + " new tokens (at most " +
           std::to_string(kMaxBlocks) + ")";
  }
  return std::nullopt;
}

void append(const AppendProblem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  AppendArguments arguments{problem, Divider(problem.cache.block_tokens), static_cast<int>(problem.max_new),
                            problem.advance && problem.max_new == 1};
  launch_dependent(problem.operation, append_kernel, {problem.cache.batch * problem.max_new, kThreads},
                   problem.device.index, context.stream, arguments);
  if (problem.advance && problem.max_new > 1) {
    launch_dependent(problem.operation, advance_kernel, {ceil_div(problem.cache.batch, 256), 256}, problem.device.index,
                     context.stream, arguments);
  }
}

}  // namespace onepass::cuda
