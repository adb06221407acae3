// cuda/portable/backward_instantiate.cuh: the backward kernels of one head dim; included by backward_<dim>.cu only.
#pragma once

#include "cuda/portable/backward_keys.cuh"
#include "cuda/portable/backward_queries.cuh"
#include "cuda/portable/backward_wide.cuh"
#include "cuda/portable/row_statistics.cuh"

namespace onepass::cuda {

template <class T, int kHeadDim, bool kTerms, Pass kPass>
BackwardKernel describe_key_pass() {
  using Config = KeyPassConfig<T, kHeadDim, kTerms, kPass>;
  return {backward_keys_kernel<Config>, Config::kKeys, Config::kThreads, Config::kSharedBytes, kTerms};
}

// The kernels that exist: both accumulators at once up to 128, and float32 with terms only.
template <class T, int kHeadDim, bool kTerms>
BackwardKernel key_pass_of(Pass pass) {
  if constexpr (kHeadDim > 128) {
    return pass == Pass::kValue ? describe_key_pass<T, kHeadDim, kTerms, Pass::kValue>()
                                : describe_key_pass<T, kHeadDim, kTerms, Pass::kKey>();
  } else {
    return describe_key_pass<T, kHeadDim, kTerms, Pass::kBoth>();
  }
}

template <int kHeadDim>
inline constexpr bool kHasWide = kHeadDim == 128;

template <class T, int kHeadDim>
BackwardKernel describe_wide() {
  if constexpr (kHasWide<kHeadDim>) {
    using Config = WideConfig<T, kHeadDim>;
    return {backward_wide_kernel<Config>, Config::kKeys, Config::kThreads, Config::kSharedBytes, false};
  } else {
    return {};
  }
}

template <class Config>
BackwardKernel describe_convert() {
  return {convert_dq_kernel<Config>, Config::kQueries, Config::kThreads, Config::QueryTile::kBytes, Config::kTerms};
}

template <class T, int kHeadDim>
BackwardKernel convert_of(bool terms, bool wide) {
  constexpr Pass kPass = kHeadDim <= 128 ? Pass::kBoth : Pass::kKey;
  if constexpr (kHasWide<kHeadDim>) {
    if (wide) return describe_convert<WideConfig<T, kHeadDim>>();
  }
  return terms ? describe_convert<KeyPassConfig<T, kHeadDim, true, kPass>>()
               : describe_convert<KeyPassConfig<T, kHeadDim, false, kPass>>();
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::key_pass(DType dtype, bool terms, Pass pass) {
  switch (dtype) {
    case DType::kFloat16:
      return terms ? key_pass_of<__half, kHeadDim, true>(pass) : key_pass_of<__half, kHeadDim, false>(pass);
    case DType::kBFloat16:
      return terms ? key_pass_of<__nv_bfloat16, kHeadDim, true>(pass)
                   : key_pass_of<__nv_bfloat16, kHeadDim, false>(pass);
    default: return key_pass_of<float, kHeadDim, true>(pass);
  }
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::wide_key_pass(DType dtype) {
  return dtype == DType::kFloat16 ? describe_wide<__half, kHeadDim>() : describe_wide<__nv_bfloat16, kHeadDim>();
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::convert_dq(DType dtype, bool terms, bool wide) {
  return dtype == DType::kFloat16 ? convert_of<__half, kHeadDim>(terms, wide)
                                  : convert_of<__nv_bfloat16, kHeadDim>(terms, wide);
}

template <class T, int kHeadDim>
BackwardKernel describe_query_pass(void (*kernel)(BackwardArguments)) {
  using Config = QueryPassConfig<T, kHeadDim>;
  return {kernel, Config::kQueries, Config::kThreads, Config::Shape::shared_bytes(), true};
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::query_pass(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return describe_query_pass<__half, kHeadDim>(backward_queries_kernel<QueryPassConfig<__half, kHeadDim>>);
    case DType::kBFloat16:
      return describe_query_pass<__nv_bfloat16, kHeadDim>(
          backward_queries_kernel<QueryPassConfig<__nv_bfloat16, kHeadDim>>);
    default: return describe_query_pass<float, kHeadDim>(backward_queries_kernel<QueryPassConfig<float, kHeadDim>>);
  }
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::bias_gradient(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return describe_query_pass<__half, kHeadDim>(bias_gradient_kernel<QueryPassConfig<__half, kHeadDim>>);
    case DType::kBFloat16:
      return describe_query_pass<__nv_bfloat16, kHeadDim>(
          bias_gradient_kernel<QueryPassConfig<__nv_bfloat16, kHeadDim>>);
    default: return describe_query_pass<float, kHeadDim>(bias_gradient_kernel<QueryPassConfig<float, kHeadDim>>);
  }
}

template <class T, int kHeadDim>
BackwardKernel describe_statistics() {
  constexpr int kRows = kStatisticsRows<std::is_same_v<T, float>>;
  return {row_statistics_kernel<T, kHeadDim>, kRows, 2 * kRows, 2 * SharedTile<T, kRows, kHeadDim>::kBytes, false};
}

template <int kHeadDim>
BackwardKernel BackwardKernels<kHeadDim>::row_statistics(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return describe_statistics<__half, kHeadDim>();
    case DType::kBFloat16: return describe_statistics<__nv_bfloat16, kHeadDim>();
    default: return describe_statistics<float, kHeadDim>();
  }
}

template <int kHeadDim>
int BackwardKernels<kHeadDim>::bias_keys(DType dtype) {
  return dtype == DType::kFloat32 ? QueryTileShape<true, kHeadDim>::kKeys : QueryTileShape<false, kHeadDim>::kKeys;
}

}  // namespace onepass::cuda
