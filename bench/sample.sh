#!/usr/bin/env bash
# bench/sample.sh [--quick] [ONEPASS_BENCH] [OPTION…]: prefill, grouped heads, ALiBi, decode, quantized decode, pages and
# hybrid batches with onepass-bench, each compared with the reference where that is quick. Prints one line of JSON a case:
#   bench/sample.sh > sample.jsonl && onepass bench plot sample.jsonl
# OPTIONs are added to every call, e.g. --device cuda. --quick: small shapes, a few seconds in all.
set -euo pipefail

quick=
if [ "${1:-}" = --quick ]; then
  quick=1
  shift
fi
bench=${1:-build/cpu/bench/onepass-bench}
[ $# -eq 0 ] || shift

if [ "$quick" ]; then
  few=(--iterations 2 --warmup 1 --check)
  cached=("${few[@]}" --rotate 1)
  lengths=(64 200)
  batches=(1 3)
  shape=(--heads 4 --kv-heads 2 --head-dim 32)
  plain=(--heads 4 --head-dim 32)
  chunk=(--queries 33)
else
  few=(--iterations 10)
  cached=(--iterations 10)
  lengths=(512 1024 2048 4096)
  batches=(1 4)
  shape=(--heads 32 --kv-heads 8 --head-dim 128)
  plain=(--heads 8 --head-dim 64)
  chunk=(--queries 256)
  # Correctness on a shape that the slow reference gets through.
  "$bench" prefill --seqlens 300 "${plain[@]}" --type float32 bfloat16 float16 --check "$@" >&2
  "$bench" decode --seqlens 700 "${shape[@]}" --kv-type float32 bfloat16 int8 fp8_e4m3 --check --rotate 0 "$@" >&2
fi

run() { "$bench" "$@"; }

run prefill --seqlens "${lengths[@]}" "${plain[@]}" --type float32 bfloat16 "${few[@]}" "$@"
run prefill --seqlens "${lengths[@]}" "${plain[@]}" --type float32 bfloat16 --alibi "${few[@]}" "$@"
run prefill --seqlens "${lengths[@]}" "${shape[@]}" --type bfloat16 "${few[@]}" "$@"
run decode --batch "${batches[@]}" --seqlens "${lengths[@]}" "${shape[@]}" --kv-type float32 bfloat16 float16 \
  int8 fp8_e4m3 fp8_e5m2 "${cached[@]}" "$@"
run decode --seqlens "${lengths[@]}" "${shape[@]}" --kv-type bfloat16 --page-size 16 "${cached[@]}" "$@"
run decode --seqlens "${lengths[@]}" "${shape[@]}" --kv-type int8 --scale group:16 --splits 3 --alibi "${cached[@]}" "$@"
run hybrid --batch 8 --seqlens "${lengths[@]: -1}" "${shape[@]}" --kv-type bfloat16 int8 \
  --prefill-fraction 0 25 50 75 100 "${chunk[@]}" "${cached[@]}" "$@"
