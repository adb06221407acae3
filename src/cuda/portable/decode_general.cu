// cuda/portable/decode_general.cu: cached attention for whatever the kernels on tensor cores leave: float32, mixed
// types, any stride and head dim, scales of groups of channels, thresholds. Lanes share the channels of a row, products
// are float32. One block computes one part of the keys for eight rows of a pair.
#include "cuda/portable/decode_finish.cuh"
#include "cuda/portable/decode_share.cuh"

namespace onepass::cuda {
namespace {

template <DType kStorage_, int kPerLane_>
struct GeneralConfig {
  static constexpr DType kStorage = kStorage_;
  static constexpr bool kPlain = false;
  static constexpr int kPerLane = kPerLane_, kHeadDim = 32 * kPerLane;
  static constexpr int kRows = kGeneralRows, kTokens = 32, kBatch = 4;  // keys at a time
  static constexpr int kWarps = kHeadDim > 128 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kOutputPitch = kHeadDim;
  static constexpr int kTermsOffset = kRows * kHeadDim * 4;
  static constexpr int kStateOffset = kTermsOffset + kRows * static_cast<int>(sizeof(RowTerms));
  static constexpr int kOutputOffset = kStateOffset + kWarps * kRows * static_cast<int>(sizeof(PartialState));
  static constexpr int kSharedBytes = kOutputOffset + kWarps * kRows * kOutputPitch * 4;
};

// Sums v[i] over the lanes; lane i gets that of v[i]. Every step halves the values that a lane is in charge of.
template <int kHalf = 16>
ONEPASS_DEVICE float sum_across(float (&v)[2 * kHalf]) {
  const bool upper = threadIdx.x & kHalf;
  float halved[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? v[i] : v[i + kHalf], kept = upper ? v[i + kHalf] : v[i];
    halved[i] = kept + __shfl_xor_sync(~0u, given, kHalf);
  }
  if constexpr (kHalf > 1) {
    return sum_across<kHalf / 2>(halved);
  } else {
    return halved[0];
  }
}

// Elements of a stored row: channel lane + 32·i, scaled; zeros behind the last channel, and in slots that are nowhere.
template <class Config>
ONEPASS_DEVICE void load_row(float (&x)[Config::kPerLane], const Operand& stored, const CacheScale& scale,
                             const KVStorage& cache, std::int64_t dim, TokenSlot slot, int head) {
  const int lane = threadIdx.x % 32;
  const std::int64_t offset = offset_in(stored, slot, head);
  const float* const scales = scale.data != nullptr ? scale.data + offset_in(scale, slot, head) : nullptr;
#pragma unroll
  for (int i = 0; i < Config::kPerLane; ++i) {
    const int d = lane + 32 * i;
    const bool live = d < dim && slot.block >= 0;
    x[i] = live ? stored_element<Config::kStorage>(stored.data, offset + d) : 0.0f;
    if (scales != nullptr && live) {
      x[i] *=
          cache.granularity == ScaleGranularity::kGroup ? scales[d / static_cast<int>(cache.group_channels)] : *scales;
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    cached_general_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kRows = Config::kRows, kPerLane = Config::kPerLane, kBatch = Config::kBatch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const KVStorage& cache = a.problem.cache;
  const Problem& p = a.problem.attention;
  allow_next_grid();
  wait_for_previous_grid();
  const int part = blockIdx.x % a.parts, block = blockIdx.x / a.parts % a.row_blocks;
  const int pair = blockIdx.x / a.parts / a.row_blocks, heads = static_cast<int>(cache.num_heads_kv);
  const int batch = pair / heads, head = pair % heads, first_row = block * kRows;
  const DeviceSequence sequence = cached_sequence(a, batch);
  const PairUnits units = units_of(a, sequence, first_row, Config::kTokens);
  const int parts = min(a.parts, units.count);  // others have no units
  if (part >= parts) return;
  const Part mine = part_of(units.count, part, parts);
  const int rows = min(kRows, sequence.seqlen_q * a.group_size - first_row);

  auto* const queries = reinterpret_cast<float*>(shared);
  auto* const terms = reinterpret_cast<RowTerms*>(shared + Config::kTermsOffset);
  for (int r = warp; r < kRows; r += Config::kWarps) {
    const RowPlace place = place_of(a, head, first_row + min(r, rows - 1));
    const int position =
        a.problem.rotary.cos != nullptr ? rotary_position(a.problem.rotary, cache, sequence, batch, place.query) : 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      queries[r * Config::kHeadDim + d] =
          r < rows && d < p.head_dim ? query_element(a, sequence, batch, place, position, d) : 0.0f;
    }
    if (lane == 0) {
      terms[r] = r < rows ? row_terms(a, sequence, batch, place, static_cast<float>(p.softmax_scale)) : RowTerms{};
    }
  }
  __syncthreads();

  // Lane l holds the logit of row l / 4 and of key l % 4 of those at hand.
  const RowTerms row = terms[lane / kBatch];
  float out[kRows][kPerLane] = {};
  float largest = -kInfinity, sum = 0.0f;
  const float threshold = static_cast<float>(a.problem.prob_threshold);

  const auto row_max = [](float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  };
  // Weights that count relative to a row's largest: that one is looked for first, in a pass of its own.
#pragma unroll 1
  for (int pass = threshold > 0.0f ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (int unit = mine.begin + warp; unit < mine.begin + mine.size; unit += Config::kWarps) {
      const int first = (units.first + unit) * Config::kTokens;
      TokenSlot of_lane{-1, 0};
      if (units.keys.contains(first + lane)) of_lane = slot_of(cache, a.block_tokens, batch, first + lane);
      const std::uint32_t live = __ballot_sync(~0u, of_lane.block >= 0);
#pragma unroll 1
      for (int j = 0; j < Config::kTokens; j += kBatch) {
        if ((live >> j & 15u) == 0) continue;
        float products[32];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const TokenSlot slot{__shfl_sync(~0u, of_lane.block, j + i), __shfl_sync(~0u, of_lane.offset, j + i)};
          float k[kPerLane];
          load_row<Config>(k, cache.k, cache.k_scale, cache, cache.head_dim, slot, head);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float product = 0.0f;
            if (r < rows) {
#pragma unroll
              for (int c = 0; c < kPerLane; ++c) {
                product = fmaf(queries[r * Config::kHeadDim + lane + 32 * c], k[c], product);
              }
            }
            products[kBatch * r + i] = product;
          }
        }
        const int key = first + j + lane % kBatch;
        float s = sum_across(products) * row.factor;
        if (a.has_terms) s = with_terms<true>(p, row, key, s);
        const bool visible = key >= row.begin && key < row.end && (live >> (j + lane % kBatch) & 1);
        if (!visible) s = -kInfinity;
        if (pass == 0) {
          largest = fmaxf(largest, s);
          continue;
        }
        const float next = threshold > 0.0f ? largest : fmaxf(largest, row_max(s));
        if (__any_sync(~0u, next > largest)) {
          const float factor =
              largest == -kInfinity ? (sum == 0.0f ? 0.0f : exp2_approx(-next)) : exp2_approx(largest - next);
          sum *= factor;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float of_row = __shfl_sync(~0u, factor, kBatch * r);
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) out[r][c] *= of_row;
          }
          largest = next;
        }
        float weight = exp2_approx(s - (largest == -kInfinity ? 0.0f : largest));
        sum += weight;
        if (!visible || (threshold > 0.0f && weight <= threshold)) weight = -1.0f;  // marks what is left out
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (!__any_sync(~0u, lane % kBatch == i && weight != -1.0f)) continue;
          const TokenSlot slot{__shfl_sync(~0u, of_lane.block, j + i), __shfl_sync(~0u, of_lane.offset, j + i)};
          float v[kPerLane];
          load_row<Config>(v, cache.v, cache.v_scale, cache, cache.head_dim_v, slot, head);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float of_row = __shfl_sync(~0u, weight, kBatch * r + i);
            if (of_row != -1.0f) {
#pragma unroll
              for (int c = 0; c < kPerLane; ++c) out[r][c] = fmaf(of_row, v[c], out[r][c]);
            }
          }
        }
      }
    }
    if (pass == 0) {
      largest = row_max(largest);
      auto* const of_warps = reinterpret_cast<float*>(shared + Config::kOutputOffset);
      if (lane % kBatch == 0) of_warps[warp * kRows + lane / kBatch] = largest;
      __syncthreads();
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) largest = fmaxf(largest, of_warps[w * kRows + lane / kBatch]);
      __syncthreads();
    }
  }

  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (lane % kBatch == 0) {
    reinterpret_cast<PartialState*>(shared + Config::kStateOffset)[kRows * warp + lane / kBatch] = {largest, sum, sum,
                                                                                                    0.0f};
  }
  auto* const outputs = reinterpret_cast<float*>(shared + Config::kOutputOffset) + warp * kRows * Config::kOutputPitch;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) outputs[r * Config::kOutputPitch + lane + 32 * c] = out[r][c];
  __syncthreads();
  const Parts all = fixed_parts(a, parts);
  const WarpRows own{warp, Config::kWarps};
  auto* const states = reinterpret_cast<PartialState*>(shared + Config::kStateOffset);
  auto* const out_of_warps = reinterpret_cast<float*>(shared + Config::kOutputOffset);
  finish_rows<Config>(a, sequence.query_start, batch, head, first_row, first_row + rows, all, own, states,
                      out_of_warps);
  if (parts == 1) return;
  merge_rows<Config>(a, sequence.query_start, batch, head, first_row, rows, all, own,
                     load_counter(arrivals_of<Config>(a, all, min(warp, kRows - 1))),
                     {states + warp, out_of_warps + warp * Config::kOutputPitch, kRows, Config::kWarps});
}

template <DType kStorage>
DecodeKernel general_of(std::int64_t head_dim) {
  const auto describe = [](auto config) -> DecodeKernel {
    using Config = decltype(config);
    return {cached_general_kernel<Config>, Config::kThreads, Config::kSharedBytes, 2, Config::kRows, Config::kHeadDim};
  };
  return head_dim > 128 ? describe(GeneralConfig<kStorage, 16>{}) : describe(GeneralConfig<kStorage, 4>{});
}

}  // namespace

DecodeKernel general_decode_kernel(DType storage, std::int64_t head_dim) {
  switch (storage) {
    case DType::kFloat16: return general_of<DType::kFloat16>(head_dim);
    case DType::kBFloat16: return general_of<DType::kBFloat16>(head_dim);
    case DType::kInt8: return general_of<DType::kInt8>(head_dim);
    case DType::kFloat8E4M3: return general_of<DType::kFloat8E4M3>(head_dim);
    case DType::kFloat8E5M2: return general_of<DType::kFloat8E5M2>(head_dim);
    default: return general_of<DType::kFloat32>(head_dim);
  }
}

}  // namespace onepass::cuda
