// csrc/cache.cpp: append_kv, cached_attention and page accounting, with their schemas. A cache travels as its tensors:
// KVCache in onepass/cache.py owns them.
#include <cstdint>
#include <span>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "context.h"
#include "onepass/kv_cache.h"
#include "tensor.h"

namespace onepass::binding {
namespace {

#define ONEPASS_CACHE                                                                         \
  "Tensor(a!) k, Tensor(b!) v, Tensor? page_table, Tensor(c!) seqlens, Tensor(d!)? k_scale, " \
  "Tensor(e!)? v_scale, SymInt scale_granularity, SymInt scale_group, Tensor? first_key, Tensor? batch_index"

// The arguments of ONEPASS_CACHE.
struct CacheArguments {
  explicit CacheArguments(Arguments& arguments)
      : k(arguments.tensor()),
        v(arguments.tensor()),
        page_table(arguments.optional_tensor()),
        seqlens(arguments.tensor()),
        k_scale(arguments.optional_tensor()),
        v_scale(arguments.optional_tensor()),
        granularity(arguments.integer()),
        scale_group(arguments.integer()),
        first_key(arguments.optional_tensor()),
        batch_index(arguments.optional_tensor()) {}

  KVCacheView view(const char* operation) const {
    return {.k = view_of(k, operation, "cache.k"),
            .v = view_of(v, operation, "cache.v"),
            .page_table = view_of(page_table, operation, "cache.page_table"),
            .seqlens = view_of(seqlens, operation, "cache.seqlens"),
            .k_scale = view_of(k_scale, operation, "cache.k_scale"),
            .v_scale = view_of(v_scale, operation, "cache.v_scale"),
            .scale_granularity = static_cast<ScaleGranularity>(granularity),
            .scale_group = scale_group,
            .first_key = view_of(first_key, operation, "cache.first_key"),
            .batch_index = view_of(batch_index, operation, "cache.batch_index")};
  }

  Tensor k, v;
  OptionalTensor page_table;
  Tensor seqlens;
  OptionalTensor k_scale, v_scale;
  std::int64_t granularity, scale_group;
  OptionalTensor first_key, batch_index;
};

struct RotaryArguments {
  explicit RotaryArguments(Arguments& arguments)
      : cos(arguments.optional_tensor()), sin(arguments.optional_tensor()), interleaved(arguments.boolean()) {}

  Rotary view(const char* operation) const {
    return {view_of(cos, operation, "rotary_cos"), view_of(sin, operation, "rotary_sin"), interleaved};
  }

  OptionalTensor cos, sin;
  bool interleaved;
};

OptionalTensor with_contiguous_rows(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(binding::with_contiguous_rows(*tensor)) : tensor;
}

void append_kv(Stack stack, std::uint64_t, std::uint64_t) {
  constexpr const char* kOperation = "append_kv";
  Arguments arguments(stack);
  const CacheArguments cache(arguments);
  const Tensor k_given = arguments.tensor(), v_given = arguments.tensor();
  const OptionalTensor cu_seqlens = arguments.optional_tensor(), counts = arguments.optional_tensor();
  const RotaryArguments rotary(arguments);
  const bool advance = arguments.boolean();
  translate_errors([&] {
    const Tensor k_new = binding::with_contiguous_rows(k_given), v_new = binding::with_contiguous_rows(v_given);
    const KVCacheView view = cache.view(kOperation);
    const CallContext context(view.k.device);
    onepass::append_kv(view, view_of(k_new, kOperation, "k_new"), view_of(v_new, kOperation, "v_new"),
                       {.cu_seqlens = view_of(cu_seqlens, kOperation, "cu_seqlens"),
                        .seqlens = view_of(counts, kOperation, "seqlens"),
                        .rotary = rotary.view(kOperation),
                        .advance = advance},
                       context.get());
  });
}

// The options between the cache and the results, in the order of the schema.
struct CachedArguments {
  explicit CachedArguments(Arguments& arguments)
      : cu_seqlens_q(arguments.optional_tensor()),
        max_seqlen_q(arguments.integer()),
        k_new(with_contiguous_rows(arguments.optional_tensor())),
        v_new(with_contiguous_rows(arguments.optional_tensor())),
        rotary(arguments),
        advance(arguments.boolean()),
        causal(arguments.boolean()),
        softmax_scale(arguments.optional_real()),
        window_left(arguments.optional_integer()),
        window_right(arguments.optional_integer()),
        softcap(arguments.real()),
        alibi_slopes(arguments.optional_tensor()),
        alibi_zero_for_future(arguments.boolean()),
        sinks(arguments.optional_tensor()),
        num_splits(arguments.integer()),
        prob_threshold(arguments.real()) {}

  CachedOptions view(const char* operation) const {
    return {.causal = causal,
            .softmax_scale = softmax_scale,
            .window = {window_left, window_right},
            .softcap = softcap,
            .alibi = {view_of(alibi_slopes, operation, "alibi_slopes"), alibi_zero_for_future},
            .sinks = view_of(sinks, operation, "sinks"),
            .cu_seqlens_q = view_of(cu_seqlens_q, operation, "cu_seqlens_q"),
            .max_seqlen_q = max_seqlen_q,
            .k_new = view_of(k_new, operation, "k_new"),
            .v_new = view_of(v_new, operation, "v_new"),
            .advance = advance,
            .rotary = rotary.view(operation),
            .num_splits = num_splits,
            .prob_threshold = prob_threshold};
  }

  OptionalTensor cu_seqlens_q;
  std::int64_t max_seqlen_q;
  OptionalTensor k_new, v_new;
  RotaryArguments rotary;
  bool advance, causal;
  std::optional<double> softmax_scale;
  std::optional<std::int64_t> window_left, window_right;
  double softcap;
  OptionalTensor alibi_slopes;
  bool alibi_zero_for_future;
  OptionalTensor sinks;
  std::int64_t num_splits;
  double prob_threshold;
};

void cached_attention(Stack stack, std::uint64_t, std::uint64_t) {
  constexpr const char* kOperation = "cached_attention";
  Arguments arguments(stack);
  const Tensor q_given = arguments.tensor();
  const CacheArguments cache(arguments);
  const CachedArguments options(arguments);
  const bool wants_lse = arguments.boolean();
  const auto [out, lse] = translate_errors([&] {
    const Tensor q_tensor = binding::with_contiguous_rows(q_given);
    const bool packed = options.cu_seqlens_q.has_value();
    const TensorView q = view_of(q_tensor, kOperation, "q", packed ? 3 : 4);
    const KVCacheView view = cache.view(kOperation);
    const std::int64_t dim = view_of(cache.v, kOperation, "cache.v", 4).shape[3];
    NewTensor result = packed ? empty_in_order_of(q, {q.shape[0], q.shape[1], dim})
                              : empty_in_order_of(q, {q.shape[0], q.shape[1], q.shape[2], dim});
    const DType statistic = accumulator_of(q.dtype);
    NewTensor rows = !wants_lse ? empty_contiguous({0}, statistic, q.device)
                     : packed   ? empty_contiguous({q.shape[1], q.shape[0]}, statistic, q.device)
                                : empty_contiguous({q.shape[0], q.shape[1], q.shape[2]}, statistic, q.device);
    const CallContext context(q.device);
    onepass::cached_attention(q, view, {.out = result.view, .lse = wants_lse ? rows.view : TensorView{}},
                              options.view(kOperation), context.get());
    return std::tuple(result.tensor, rows.tensor);
  });
  set_results(stack, out, lse);
}

// page_table, seqlens, reference_counts, page_size.
struct PoolArguments {
  explicit PoolArguments(Arguments& arguments)
      : page_table(arguments.tensor()),
        seqlens(arguments.tensor()),
        reference_counts(arguments.tensor()),
        page_size(arguments.integer()) {}

  PagePool pool() const {
    constexpr const char* kOperation = "page_pool";
    return PagePool(view_of(page_table, kOperation, "page_table", 2), view_of(seqlens, kOperation, "seqlens", 1),
                    view_of(reference_counts, kOperation, "reference_counts", 1), page_size);
  }

  Tensor page_table, seqlens, reference_counts;
  std::int64_t page_size;
};

void page_pool_reserve(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const PoolArguments pool(arguments);
  const Tensor counts = arguments.tensor();
  const Tensor pages = translate_errors([&] {
    const TensorView wanted = view_of(counts, "page_pool.reserve", "counts", 1);
    if (wanted.dtype != DType::kInt64 || wanted.device != Device{} || (wanted.shape[0] > 1 && wanted.strides[0] != 1)) {
      throw Error(ErrorCode::kInvalidType,
                  "page_pool.reserve: counts: got another kind of tensor; need contiguous int64 "
                  "on the CPU");
    }
    const auto copies =
        pool.pool().reserve({static_cast<const std::int64_t*>(wanted.data), static_cast<std::size_t>(wanted.shape[0])});
    const NewTensor result = empty_contiguous({2, static_cast<std::int64_t>(copies.size())}, DType::kInt64, {});
    auto* const sources = static_cast<std::int64_t*>(result.view.data);
    for (std::size_t i = 0; i < copies.size(); ++i) {
      sources[i] = copies[i].source;
      sources[copies.size() + i] = copies[i].target;
    }
    return result.tensor;
  });
  set_results(stack, pages);
}

void page_pool_truncate(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const PoolArguments pool(arguments);
  const std::int64_t sequence = arguments.integer(), length = arguments.integer();
  translate_errors([&] { pool.pool().truncate(sequence, length); });
}

void page_pool_fork(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const PoolArguments pool(arguments);
  const std::int64_t source = arguments.integer(), target = arguments.integer();
  const std::optional<std::int64_t> length = arguments.optional_integer();
  translate_errors([&] { pool.pool().fork(source, target, length); });
}

#define ONEPASS_ROTARY "Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool rotary_interleaved=False"
#define ONEPASS_POOL "Tensor(a!) page_table, Tensor(b!) seqlens, Tensor(c!) reference_counts, SymInt page_size"

}  // namespace
}  // namespace onepass::binding

STABLE_TORCH_LIBRARY_FRAGMENT(onepass, library) {
  library.def("append_kv(" ONEPASS_CACHE
              ", Tensor k_new, Tensor v_new, Tensor? cu_seqlens=None, "
              "Tensor? new_seqlens=None, " ONEPASS_ROTARY ", bool advance=True) -> ()");
  library.def("cached_attention(Tensor q, " ONEPASS_CACHE
              ", Tensor? cu_seqlens_q=None, SymInt max_seqlen_q=0, "
              "Tensor? k_new=None, Tensor? v_new=None, " ONEPASS_ROTARY
              ", bool advance=True, bool causal=True, "
              "float? softmax_scale=None, SymInt? window_left=None, SymInt? window_right=None, float softcap=0.0, "
              "Tensor? alibi_slopes=None, bool alibi_zero_for_future=False, Tensor? sinks=None, SymInt num_splits=0, "
              "float prob_threshold=0.0, bool return_lse=False) -> (Tensor out, Tensor lse)");
  library.def("page_pool_reserve(" ONEPASS_POOL ", Tensor counts) -> Tensor");
  library.def("page_pool_truncate(" ONEPASS_POOL ", SymInt sequence, SymInt length) -> ()");
  library.def("page_pool_fork(" ONEPASS_POOL ", SymInt source, SymInt target, SymInt? length=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, library) {
  library.impl("append_kv", &onepass::binding::append_kv);
  library.impl("cached_attention", &onepass::binding::cached_attention);
  library.impl("page_pool_reserve", &onepass::binding::page_pool_reserve);
  library.impl("page_pool_truncate", &onepass::binding::page_pool_truncate);
  library.impl("page_pool_fork", &onepass::binding::page_pool_fork);
}
STABLE_TORCH_LIBRARY_IMPL(onepass, CUDA, library) {
  library.impl("append_kv", &onepass::binding::append_kv);
  library.impl("cached_attention", &onepass::binding::cached_attention);
}
