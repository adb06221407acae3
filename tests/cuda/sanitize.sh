#!/bin/bash
# The C++ suite's small cases under compute-sanitizer's four tools. Usage: tests/cuda/sanitize.sh BUILD_FOLDER [FILTER];
# FILTER "caches" stands for small cases of attention over caches, "hopper" for those of the sm_90a kernels. By design
# racecheck names hand-overs of the Hopper kernels (docs/hopper-forward.md).
set -euo pipefail
build=$1
filter=${2:-'*Features*cuda_*float16_plain:*Features*cuda_*causal:*Features*cuda_*everything:*Features*cuda_*ragged_causal:*Features*cuda_*dropout_causal_bias:*Features*cuda_*head_dim_v_larger:*Features*cuda_*ragged_head_dim_128:*Piecewise*cuda_*float*_piecewise_causal:*Piecewise*cuda_*piecewise_everything'}
if [[ $filter == caches ]]; then
  filter=
  for name in decode decode_one_pair decode_40_sequences decode_first_key decode_splits_3 speculative_16_rows \
    speculative_32_rows paged_16 paged_5_token_major int8_head int8_group_16 e4m3_32_rows hybrid_paged_int8 \
    chunked_prefill rotary_half append_hybrid_paged float32_storage decode_softcap; do
    filter+="*CachedAttention.WithinTwiceTheNaiveError/cuda_bfloat16_$name:"
  done
fi
if [[ $filter == hopper ]]; then
  filter='*Piecewise*/hopper_bfloat16_piecewise_causal:'
  for name in plain causal window key_bounds large_logits everything head_dim_v_larger few_rows ragged_causal ragged_tail \
    ragged_head_dim_128 many_tiles_causal many_tiles_head_dim_256; do
    filter+="*Features/*/hopper_bfloat16_$name:*Features/*/hopper_float16_$name:"
  done
fi
export ONEPASS_CLEAR_COUNTERS=1  # or else initcheck names the reads of counters that nobody has written
status=0
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/tests/cpp/onepass_tests" --gtest_filter="$filter" --gtest_brief=1 || status=1
done
exit $status
