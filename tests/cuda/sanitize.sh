#!/bin/bash
# The C++ suite's small cases under compute-sanitizer's four tools. Usage: tests/cuda/sanitize.sh BUILD_FOLDER [FILTER]
set -euo pipefail
build=$1
filter=${2:-'*Features*cuda_*float16_plain:*Features*cuda_*causal:*Features*cuda_*everything:*Features*cuda_*ragged_causal:*Features*cuda_*dropout_causal_bias:*Features*cuda_*head_dim_v_larger:*Features*cuda_*ragged_head_dim_128:*Piecewise*cuda_*float*_piecewise_causal:*Piecewise*cuda_*piecewise_everything'}
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/tests/cpp/onepass_tests" --gtest_filter="$filter" --gtest_brief=1
done
