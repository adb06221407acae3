"""The benchmark tools: arithmetic of cases, agreement of contenders, records, charts and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from onepass.bench import suite
from onepass.bench.cases import KINDS, Case, Inputs
from onepass.bench.contenders import CONTENDERS
from onepass.bench.memory import measure
from onepass.bench.plots import plot
from onepass.bench.record import Result, read, write
from onepass.bench.timing import Timing, interleave
from onepass.cli import main

CPU = torch.device("cpu")
BASE = Case("prefill", 1, 4, 2, 48, 48, 16)


@pytest.mark.parametrize(
    ("case", "gflop"),
    [
        (Case("prefill", 1, 16, 16, 1024, 1024, 64, causal=False), 4.294967296),
        (Case("prefill", 1, 16, 16, 1024, 1024, 64), 2.147483648),
        (Case("backward", 1, 16, 16, 1024, 1024, 64), 5.36870912),
        (Case("train", 1, 16, 16, 1024, 1024, 64), 7.516192768),
        (Case("prefill", 1, 4, 4, 8192, 8192, 64, window=512), 4 * 4 * 64 * (8192 * 512 - 512 * 511 / 2) * 1e-9),
    ],
    ids=lambda value: value.label() if isinstance(value, Case) else "",
)
def test_flops(case: Case, gflop: float) -> None:
    assert case.flops() * 1e-9 == pytest.approx(gflop)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": False}, {"window": 7}, {"seqlen_q": 20}, {"batch": 2, "num_heads_kv": 4}],
    ids=["causal", "full", "window", "unequal", "plain heads"],
)
def test_contenders_compute_the_same(kind: str, changes: dict[str, int]) -> None:
    case = BASE.at(kind=kind, **changes)
    inputs = Inputs.of(case, CPU)
    results = {name: KINDS[kind](inputs, make(case, CPU))() for name, make in CONTENDERS.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["eager"], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_interleave_counts_calls_fairly() -> None:
    calls = {"a": 0, "b": 0}

    def counted(name: str) -> None:
        calls[name] += 1
        torch.ones(20, 20) @ torch.ones(20, 20)

    timings = interleave({name: lambda name=name: counted(name) for name in calls}, CPU, seconds=0.05)
    assert timings["a"].rounds == timings["b"].rounds >= 5
    assert 0 < timings["a"].low <= timings["a"].median <= timings["a"].high


def test_record_round_trip_and_charts(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows = [
        Result(BASE.at(seqlen_q=n, seqlen_k=n), name, Timing(n * 1e-2, n * 9e-3, n * 2e-2, 5), "seqlen_k").row()
        for n in (128, 256)
        for name in ("onepass", "torch")
    ]
    write(path, CPU, rows)
    record = read(path)
    assert record["results"] == rows
    assert {"machine", "threads", "torch", "onepass", "commit"} <= record["environment"].keys()
    assert rows[0]["gflops"] == pytest.approx(BASE.at(seqlen_q=128, seqlen_k=128).flops() / 1.28e-3 * 1e-9, rel=1e-3)
    (chart,) = plot(path)
    assert chart.name == "run-sequence-length.png"
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "got no benchmark record"),
        ('{"results": []}', "got no benchmark record"),
        ('{"schema": 99, "results": []}', "got schema 99; need 1"),
        ('{"schema": 1, "environment": {}, "results": []}', "got no sweep"),
    ],
)
def test_plot_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(["bench", "plot", str(path)])


@pytest.mark.parametrize("kind", ["prefill", "train"])
def test_sweep_command(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / f"{kind}.json"
    sizes = ["--seqlens", "16", "32", "--seqlen", "16", "--batches", "1", "2", "--heads", "2", "--head-dim", "8"]
    assert main(["bench", kind, *sizes, "--dtypes", "float32", "--seconds", "0.01", "--output", str(output)]) == 0
    rows = read(output)["results"]
    assert {(row["contender"], row["sweep"]) for row in rows} == {
        (name, sweep) for name in ("onepass", "torch") for sweep in ("seqlen_k", "batch")
    }
    assert all(row["kind"] == kind and row["ms"] > 0 for row in rows)
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert str(output) in capsys.readouterr().out


def test_memory_of_eager_grows_with_the_square() -> None:
    """One head of 2k × 2k float32 scores is 16 MiB; onepass must stay far below."""
    case = Case("prefill", 1, 1, 1, 2048, 2048, 32)
    eager, ours = (measure(case, name, CPU).mebibytes for name in ("eager", "onepass"))
    assert eager is not None
    assert eager > 16
    assert ours is not None
    assert ours < 4


def test_suite_small_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "suite.json"
    command = ["bench", "suite", "--seconds", "0.01", "--output", str(output), "--parts", "small"]
    assert main([*command, "--dtypes", "float32"]) == 0
    assert main([*command, "--dtypes", "bfloat16", "--update"]) == 0
    record = json.loads(output.read_text())
    assert [(row["part"], row["dtype"], row["causal"]) for row in record["results"]] == [
        ("small", dtype, causal) for dtype in ("float32", "bfloat16") for causal in (False, True)
    ]
    assert record["summary"]["small, all"]["cells"] == 4
    assert "geometric means" in capsys.readouterr().out


def test_suite_covers_the_table() -> None:
    cases = suite.cases(["forward", "backward", "window", "small"], ["float32", "bfloat16", "float16"])
    assert len(cases) == 5 * 3 + 5 * 3 + 3 + 6
    assert len({case for _, case in cases}) == len(cases)
