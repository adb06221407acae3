// cuda/portable/decode.cuh: few query rows over many cached keys. What counts is how many bytes are on their way: a
// warp loads 4 KB of K and 4 KB of V of its next unit straight into the registers that hold mma fragments while it
// computes, from whatever addresses the rows have.
//
// Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ: tokens, then channels, fill the 16 rows of the mma, query rows its 8 columns. The order of
// channels within a product is free, so that a lane's 16 bytes of a row are fragments as they stand. 8-bit storage is
// widened to float16, which holds every int8, e4m3 and e5m2; its queries are scaled into float16's range.
#pragma once

#include "cuda/portable/decode_finish.cuh"
#include "cuda/portable/decode_product.cuh"
#include "cuda/portable/decode_queries.cuh"

namespace onepass::cuda {

// Products → logits in log2 units, −inf for what a row does not see. A lane's columns are rows 8n + 2t + e.
template <class Config>
ONEPASS_DEVICE void finish_logits(float (&s)[Config::kTokenTiles][Config::kColumnTiles][4], const DecodeArguments& a,
                                  const DeviceSequence& sequence, const UnitOf<Config>& unit, const RowTerms* terms,
                                  const float (&factor)[2], bool masked) {
  constexpr int M = Config::kTokenTiles, N = Config::kColumnTiles;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float key_scale = 1.0f;
      if constexpr (Config::kStorage == DType::kInt8) {
        key_scale = __shfl_sync(~0u, unit.key_scale, 16 * m + 8 * half + g);
      }
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float of_row = N == 1 || Config::kCopiedQueries ? factor[e] : terms[8 * n + 2 * t + e].factor;
          s[m][n][2 * half + e] *= of_row * key_scale;
        }
    }
  const bool has_terms = !Config::kPlain && a.has_terms;
  if (!has_terms && !masked) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int index = 8 * n + 2 * t + e;
      RowTerms row;
      if constexpr (Config::kDirectQueries) {
        const Range keys = visible_keys(a, sequence, a.group(index));
        row.begin = keys.begin, row.end = keys.end;
      } else {
        row = terms[index];
      }
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) {
        const int token = 8 * i + g, key = unit.token + token;
        float& x = s[i / 2][n][2 * (i % 2) + e];
        if (has_terms) x = with_terms<false>(a.problem.attention, row, key, x);
        if (key < row.begin || key >= row.end || !unit.is_live(token)) x = -kInfinity;
      }
    }
}

// int8 with scales of its own: weights take those of the values, relative to the accumulator's unit.
template <class Config>
ONEPASS_DEVICE void scale_weights(float (&s)[Config::kTokenTiles][Config::kColumnTiles][4], DecodeState<Config>& state,
                                  float value_scale) {
  follow_scales(state, value_scale);
  const float inverse = state.unit > 0.0f ? 1.0f / state.unit : 1.0f;
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = __shfl_sync(~0u, value_scale, 16 * m + 8 * half + lane_id() / 4) * inverse;
#pragma unroll
      for (int n = 0; n < Config::kColumnTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[m][n][2 * half + e];
          x = x == 0.0f ? 0.0f : x * scale;  // a hidden token's scale may be anything
        }
    }
}

// Tells the compiler, which would keep registers for it, that nobody needs what x holds.
template <class X>
ONEPASS_DEVICE void forget(X& x) {
  auto* const words = reinterpret_cast<std::uint32_t*>(&x);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(X) / 4); ++i) asm volatile("" : "=r"(words[i]));
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
  using T = typename Config::T;
  constexpr int M = Config::kTokenTiles, N = Config::kColumnTiles, kSlices = Config::kSlices;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  static_assert(sizeof(ReaderPair) <= 32);
  auto* const reading = reinterpret_cast<ReaderPair*>(shared + Config::kReaderOffset) + warp;
  auto* const terms = reinterpret_cast<RowTerms*>(shared + Config::kTermsOffset);
  const bool fixed = !Config::kPlain && a.parts > 0;
  Share share;
  Reader reader;
  UnitOf<Config> next;
  uint4 keys[Config::kTokens / 8][Config::kKeyPieces], values[M][4][Config::kValuePieces];
  uint2 query_fragments[Config::kQueriesInRegisters ? Config::kHeadDim / 16 : 1] = {};
  int batch, head;
  allow_next_grid();
  // Plain calls guess what they will need before the grid ahead is done. Then keys of the same share are asked for at
  // once, lengths behind them, and the share is kept where every lane finds the length that it was worked out of.
  enum { kGuess, kCheck, kKnown };
#pragma unroll 1
  for (int pass = Config::kPlain ? kGuess : kKnown;; ++pass) {
    if (pass != kGuess) wait_for_previous_grid();
    if (pass != kCheck) share = fixed ? fixed_share<Config>(a) : equal_share<Config>(a);
    const bool guess = pass == kGuess;
    if (guess && (share.left == 0 || share.alone || a.batch > 32)) pass = kCheck;  // nothing to keep
    if (share.left == 0) {
      if (guess) continue;
      return;
    }
    *reading = {share.pair, share.batch, share.head};
    __syncwarp();
    const int turn = share.alone ? 0 : warp;
    reader = {(share.pair.first + share.unit + turn) * Config::kTokens, share.pair.count - share.unit - turn,
              share.left - turn};
    if (!share.alone) {
      settle<Config>(reader, reading, a);
    } else if (warp > 0) {
      pass_pairs<Config>(reader, reading, a, warp);
    }
    find_unit<Config>(next, a, reader, *reading);
    if constexpr (Config::kPlain) {
      if (guess) {
        prefetch_unit<Config>(next, a);
        __syncwarp();
        continue;
      }
    }
    forget(keys), forget(values);  // of a guess that was wrong
    request_keys<Config>(keys, a, next, 0);
    request_values<Config>(values, a, next, 0);
    if constexpr (Config::kPlain) prefetch_second<Config>(next, a, reader, *reading, share.alone);
    batch = share.batch, head = share.head;
    if (Config::kAlone && share.alone) {
      if (reader.left <= 0) return;
      batch = reading->batch, head = reading->head;
    }
    if constexpr (Config::kDirectQueries) load_query_fragments<Config>(query_fragments, a, batch, head);
    if (pass == kKnown) break;
    const DeviceSequence found = cached_sequence<Config::kPlain>(a, min(lane, a.batch - 1));
    const bool same = found.seqlen_k == share.of_lane.seqlen_k && found.key_begin == share.of_lane.key_begin;
    if (__all_sync(~0u, same)) break;
    __syncwarp();
  }

  int first_unit = share.unit, left = share.left;
  int turn = warp;  // of the warp's next unit among those of the share from the pair's first on
  const bool alone = Config::kAlone && share.alone;
  if (alone) {
    first_unit = reading->units.count - reader.in_pair;
    left = reader.left, turn = 0;
    share.sequence = cached_sequence<Config::kPlain>(a, batch);
  }
  DeviceSequence sequence = Config::kDirectQueries ? share.sequence : cached_sequence<Config::kPlain>(a, batch);
  if constexpr (Config::kCopiedQueries) request_queries<Config>(a, batch, head, shared);
#pragma unroll 1
  for (;;) {
    const PairUnits pair = units_of<Config>(a, sequence);
    if (!Config::kPlain && pair.count == 0) {
      sequence = cached_sequence(a, ++batch);
      continue;
    }
    const int rows = sequence.seqlen_q * a.group_size, here = min(pair.count - first_unit, left);
    const int tiles = (rows + 7) / 8;
    float factor[2] = {a.softmax_scale * kLog2e, a.softmax_scale * kLog2e};
    if constexpr (Config::kCopiedQueries) {  // asked for when no warp needed those of the last pair any more
      if (const int r = threadIdx.x; r < Config::kRows) {
        terms[r] = r < rows ? row_terms(a, sequence, batch, place_of(a, head, r), a.softmax_scale) : RowTerms{};
      }
      cp_async_wait<0>();
      __syncthreads();
    } else if constexpr (!Config::kDirectQueries) {
      __syncthreads();  // the last pair's rows are finished
      prepare_rows<Config>(a, sequence, batch, head, rows, shared);
      __syncthreads();
      if constexpr (Config::kQueriesInRegisters) {
        constexpr int kSteps = Config::kBytes ? 4 : 2;
#pragma unroll
        for (int i = 0; i < Config::kHeadDim / 16; ++i) {
          query_fragments[i] = query_fragment<Config>(shared, g, (i / kSteps * 4 + t) * kSteps + i % kSteps);
        }
      }
      if constexpr (N == 1) factor[0] = terms[2 * t].factor, factor[1] = terms[2 * t + 1].factor;
    }
    const Range all = tile_keys(a, sequence, 0, sequence.seqlen_q - 1).all;
    const bool differ = all.begin != pair.keys.begin || all.end != pair.keys.end;
    DecodeState<Config> state;
    bool own_scales = false;
    state.unit = 1.0f;
    if constexpr (Config::kBytes) {
      const KVStorage& cache = a.problem.cache;
      const bool one = cache.granularity == ScaleGranularity::kTensor;
      own_scales = Config::kStorage == DType::kInt8 && !one;
      state.unit = own_scales ? 0.0f : one ? cache.v_scale.data[0] : 1.0f;
    }

#pragma unroll 1
    for (; turn < here; turn += alone ? 1 : Config::kWarps) {
      const UnitOf<Config> unit = next;
      advance<Config>(reader, reading, a, alone);
      find_unit<Config>(next, a, reader, *reading);
      // What is loaded only when its turn comes is near by then.
      if constexpr (Config::kPlain && kSlices > 1) prefetch_unit<Config>(next, a);

      float s[M][N][4] = {};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        multiply_keys<Config>(s, keys, slice, tiles, query_fragments, shared);
        if (slice + 1 < kSlices) {
          request_keys<Config>(keys, a, unit, slice + 1);
        } else if (Config::kKeysEarly) {
          request_keys<Config>(keys, a, next, 0);
        }
      }

      const bool masked = unit.token < all.begin || unit.token + Config::kTokens > all.end || !is_whole<Config>(unit);
      finish_logits<Config>(s, a, sequence, unit, terms, factor, masked);
      weigh(state, s);
      if constexpr (Config::kStorage == DType::kInt8) {
        if (own_scales) scale_weights(s, state, unit.value_scale);
      }
      std::uint32_t weights[N][2 * M];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
          const std::uint32_t packed = pack<T>(s[i / 2][n][2 * (i % 2)], s[i / 2][n][2 * (i % 2) + 1]);
          if constexpr (Config::kProductSums) add_pair<T>(state.rounded[n], packed);
          weights[n][i] = transpose_matrix(packed);
        }

      if constexpr (!Config::kKeysEarly) request_keys<Config>(keys, a, next, 0);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (masked) {
          if constexpr (Config::kPlain) drop_hidden<Config>(values, unit);
          if (Config::kStorage != DType::kInt8 && differ) state.repaired |= make_values_finite<Config>(values);
        }
        multiply_values<Config>(state, values, slice, tiles, weights);
        if (slice + 1 < kSlices) {
          request_values<Config>(values, a, unit, slice + 1);
        } else {
          request_values<Config>(values, a, next, 0);
        }
      }
    }
    turn = alone ? 0 : turn - here;

    Parts parts;
    if (here < pair.count) {
      parts = fixed ? fixed_parts(a, min(a.parts, pair.count))
                    : shared_parts(share.end - left - first_unit, pair.count, share.size);
    }
    const std::int64_t query_start = Config::kPlain ? 0 : sequence.query_start;
    const int finished_batch = batch, finished_head = head;
    left -= here;
    first_unit = 0;
    bool next_batch = false;
    if (alone) {
      left = reader.left, batch = reading->batch, head = reading->head;
      next_batch = left > 0 && batch != finished_batch;
    } else if (left > 0 && ++head == a.heads_kv) {
      head = 0, ++batch, next_batch = true;
    }
    if constexpr (Config::kDirectQueries) {  // what the next pair waits for, before this one is finished
      if (next_batch) sequence = cached_sequence<Config::kPlain>(a, batch);
      if (left > 0) load_query_fragments<Config>(query_fragments, a, batch, head);
    }
    // One warp a row, the first of them another one for every pair: others go on at once.
    const WarpRows own =
        alone ? WarpRows{0, 1} : WarpRows{(warp + Config::kWarps - left % Config::kWarps) % Config::kWarps, 8};
    std::uint64_t found = 0;
    const auto look_at_counter = [&] {  // what it says is there when the part is
      if (parts.count > 1 && own.first < min(rows, 8)) found = load_counter(arrivals_of<Config>(a, parts, own.first));
    };
    auto* const states = reinterpret_cast<PartialState*>(shared + Config::kStateOffset) + (alone ? 8 * warp : 0);
    auto* const out =
        reinterpret_cast<float*>(shared + Config::kOutputOffset) + (alone ? 8 * warp : 0) * Config::kOutputPitch;
    if (alone) {
      __syncwarp();
      share_state(state, 0, rows, shared);
      __syncwarp();
      look_at_counter();
      finish_rows<Config, 1>(a, query_start, finished_batch, finished_head, 0, rows, parts, own, states, out);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n > 0 && n >= tiles) break;
        __syncthreads();  // rows that were shared before are finished
        if (Config::kCopiedQueries && n == 0 && left > 0) request_queries<Config>(a, batch, head, shared);
        share_state(state, n, rows, shared);
        __syncthreads();
        if (n + 1 >= tiles) look_at_counter();
        finish_rows<Config>(a, query_start, finished_batch, finished_head, 8 * n, rows, parts, own, states, out);
      }
    }
    if (parts.count > 1) {
      // Parts come to where the warp's rows were, and, of few rows, to the others, which nobody has.
      const int step = alone ? 1 : rows <= 4 ? 4 : 8;
      merge_rows<Config>(
          a, query_start, finished_batch, finished_head, 0, rows, parts, own, found,
          {states + own.first, out + own.first * Config::kOutputPitch, step, alone ? 8 : Config::kWarps * 8 / step});
    }
    if (left > 0) {
      if (!Config::kDirectQueries && next_batch) sequence = cached_sequence<Config::kPlain>(a, batch);
      continue;
    }
    return;
  }
}

}  // namespace onepass::cuda
