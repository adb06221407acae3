"""The benchmarks over KV caches: arithmetic, agreement of contenders, commands, and charts of the driver's lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from onepass.bench import cached
from onepass.bench.cached import CacheCase, CacheInputs
from onepass.bench.cached_contenders import CONTENDERS, contenders
from onepass.bench.lines import read_lines
from onepass.bench.plots import plot
from onepass.bench.record import read
from onepass.cli import main

CPU = torch.device("cpu")
DECODE = CacheCase("decode", 2, 4, 2, 1, 40, 16, dtype="float32", query_dtype="float32")
HYBRID = DECODE.at(kind="hybrid", batch=4, seqlen_q=7, prefill_fraction=50)


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cached.COLD_BYTES, "cpu", 50000)


def test_bytes_and_flops() -> None:
    case = CacheCase("decode", 8, 32, 8, 1, 4096, 128, dtype="bfloat16")
    assert case.kv_bytes() == 2 * 8 * 8 * 4096 * 128 * 2
    assert case.at(dtype="int8").kv_bytes() == 2 * 8 * 8 * 4096 * (128 + 4)
    assert case.at(dtype="fp8_e4m3").kv_bytes() * 4 == case.at(dtype="float32").kv_bytes()
    assert case.flops() == 4 * 8 * 32 * 4096 * 128
    mixed = case.at(kind="hybrid", seqlen_q=4096, prefill_fraction=25)
    assert mixed.query_lengths() == [4096] * 2 + [1] * 6
    assert mixed.flops() == 4 * 32 * 128 * (2 * 4096 * 4097 / 2 + 6 * 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8_e4m3"])
def test_bytes_are_those_of_the_cache(dtype: str) -> None:
    case = DECODE.at(dtype=dtype)
    inputs = CacheInputs.of(case, CPU)
    assert inputs.caches[0].nbytes == case.kv_bytes()
    assert len(inputs.caches) > 1
    assert inputs.plain[0].numel() * 4 >= case.kv_bytes()
    shared = inputs.keys[0].data_ptr() == inputs.caches[0].k.data_ptr()
    assert shared == (dtype in ("float32", "bfloat16", "float16"))


@pytest.mark.parametrize(
    "case",
    [
        DECODE,
        DECODE.at(num_heads_kv=4),
        DECODE.at(page_size=16),
        DECODE.at(seqlen_q=3),
        DECODE.at(dtype="int8"),
        HYBRID,
        HYBRID.at(page_size=8),
        HYBRID.at(dtype="int8"),
        HYBRID.at(seqlen_q=40),
        HYBRID.at(prefill_fraction=0),
        HYBRID.at(prefill_fraction=100),
    ],
    ids=lambda case: f"{case.kind}-{case.dtype}-{case.seqlen_q}-{case.prefill_fraction}-{case.page_size}",
)
def test_contenders_compute_the_same(case: CacheCase) -> None:
    inputs = CacheInputs.of(case, CPU)
    names = contenders(case, CPU)
    assert ("apart" in names) == (case.kind == "hybrid" and 0 < case.prefill_fraction < 100)

    def packed(result: Any) -> torch.Tensor:
        """The parts of a step, dense or packed, as (total, num_heads, head_dim)."""
        parts = result if isinstance(result, list) else [result]
        return torch.cat([part if part.dim() == 3 else part.transpose(1, 2).flatten(0, 1) for part in parts])

    want = packed(CONTENDERS["torch"](case, inputs)(0))
    tolerance = 0.03 if case.dtype == "int8" else 1e-5
    for name in names:
        got = packed(CONTENDERS[name](case, inputs)(0))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


SMALL = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--seqlen", "32", "--seconds", "0.01"]


def test_decode_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "decode.json"
    sizes = ["--seqlens", "32", "64", "--batches", "1", "2", "--types", "float32", "int8"]
    assert main(["bench", "decode", *SMALL, *sizes, "--output", str(output)]) == 0
    rows = read(output)["results"]
    assert {row["contender"] for row in rows} == {"onepass", "torch", "torch folded"}
    assert {row["sweep"] for row in rows} == {"seqlen_k", "batch"}
    for row in rows:
        assert row["gbps"] == pytest.approx(row["kv_bytes"] / row["ms"] * 1e-6, rel=0.02)
        assert row["share_of_read"] == pytest.approx(row["gbps"] / row["read_gbps"], rel=0.02)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "decode-batch-size.png",
        "decode-sequence-length.png",
    ]
    assert "milliseconds a step" in capsys.readouterr().out


def test_hybrid_command(tmp_path: Path) -> None:
    output = tmp_path / "hybrid.json"
    sizes = ["--seqlens", "32", "64", "--batches", "2", "4", "--batch", "4", "--queries", "8", "--types", "float32"]
    assert main(["bench", "hybrid", *SMALL, *sizes, "--fractions", "0", "50", "100", "--output", str(output)]) == 0
    rows = read(output)["results"]
    by_fraction = {row["prefill_fraction"]: set() for row in rows if row["sweep"] == "prefill_fraction"}
    for row in rows:
        if row["sweep"] == "prefill_fraction":
            by_fraction[row["prefill_fraction"]].add(row["contender"])
    assert {fraction for fraction, names in by_fraction.items() if "apart" in names} == {50}
    assert len(list(tmp_path.glob("hybrid-*.png"))) == 3


def test_more_queries_than_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--queries: got 50; need at most the 32 keys"):
        main(["bench", "hybrid", *SMALL, "--queries", "50", "--output", str(tmp_path / "hybrid.json")])


def _line(**changes: Any) -> str:
    line = {
        "onepass_bench": 1,
        "kind": "decode",
        "device": "cpu",
        "backend": "cpu",
        "machine": "a machine",
        "threads": 2,
        "batch": 1,
        "num_heads": 8,
        "num_heads_kv": 8,
        "seqlen_q": 1,
        "seqlen_k": 512,
        "head_dim": 64,
        "dtype": "bfloat16",
        "query_dtype": "bfloat16",
        "causal": True,
        "window": None,
        "alibi": False,
        "page_size": None,
        "num_splits": 0,
        "prefill_fraction": 100,
        "ms": 2.0,
        "ms_quartiles": [1.5, 3.0],
        "gbps": 5.0,
        "gflops": 7.0,
        "apart_ms": None,
        "apart_ms_quartiles": None,
    }
    return json.dumps({**line, **changes}, separators=(",", ":"))


def test_driver_lines_become_charts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [_line(seqlen_k=keys, batch=batch) for keys in (512, 1024) for batch in (1, 4)]
    lines += [_line(kind="prefill", seqlen_q=n, seqlen_k=n, alibi=alibi) for n in (128, 256) for alibi in (False, True)]
    hybrid = {"kind": "hybrid", "apart_ms": 3.0, "apart_ms_quartiles": [2.9, 3.5], "seqlen_q": 64}
    lines += [_line(prefill_fraction=percent, **hybrid) for percent in (0, 50, 100)]
    log.write_text("\n".join(["+ building", *lines, "done"]))
    record = read_lines(log)
    assert record is not None
    series = {(row["kind"], row["sweep"], row["contender"]) for row in record["results"]}
    assert series == {
        ("decode", "seqlen_k", "batch 1"),
        ("decode", "seqlen_k", "batch 4"),
        ("decode", "batch", "512 keys"),
        ("decode", "batch", "1024 keys"),
        ("prefill", "seqlen_k", "ALiBi"),
        ("prefill", "seqlen_k", "onepass"),
        ("hybrid", "prefill_fraction", "onepass"),
        ("hybrid", "prefill_fraction", "apart"),
    }
    assert {path.name for path in plot(log)} == {
        "log-decode-sequence-length.png",
        "log-decode-batch-size.png",
        "log-prefill-sequence-length.png",
        "log-hybrid-prefill-fraction.png",
    }


def test_lines_without_a_sweep_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(_line())
    with pytest.raises(SystemExit, match="got no sweep"):
        main(["bench", "plot", str(log)])
