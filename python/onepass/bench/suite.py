"""The table of record for the CPU: shapes and dtypes against torch's SDPA and against the machine's sgemm rate.

Both contenders are measured in the same rounds as a 2048³ float32 matrix product, so that the ratio to torch and the
share of the matrix rate come from the same seconds of the same machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from onepass.bench.cases import DTYPES, KINDS, Case, Inputs
from onepass.bench.contenders import CONTENDERS
from onepass.bench.record import Result
from onepass.bench.timing import interleave

SGEMM = "sgemm 2048³"
SGEMM_GFLOP = 2 * 2048**3 * 1e-9

_SHAPES = [
    # batch, heads, seqlen, head_dim, causal
    (1, 16, 1024, 64, False),
    (1, 16, 1024, 64, True),
    (1, 8, 2048, 128, False),
    (1, 8, 2048, 128, True),
    (1, 4, 8192, 64, True),
]


def _square(kind: str, batch: int, heads: int, seqlen: int, head_dim: int, **options: Any) -> Case:
    return Case(kind, batch, heads, heads, seqlen, seqlen, head_dim, **options)


def _table(kind: str, dtype: str) -> list[Case]:
    return [_square(kind, *shape, dtype=dtype, causal=causal) for *shape, causal in _SHAPES]


# part → its cases for one dtype
PARTS: dict[str, Callable[[str], list[Case]]] = {
    "forward": lambda dtype: _table("prefill", dtype),
    "backward": lambda dtype: _table("backward", dtype),
    "window": lambda dtype: [_square("prefill", 1, 4, 8192, 64, dtype=dtype, window=512)],
    "small": lambda dtype: [_square("prefill", 1, 1, 16, 64, dtype=dtype, causal=causal) for causal in (False, True)],
}


@dataclass(frozen=True)
class Row:
    """One case with both times, and the matrix rate of the same rounds in GFLOP/s."""

    part: str
    onepass: Result
    torch: Result
    sgemm: float

    @property
    def ratio(self) -> float:
        """How many times faster than torch."""
        return self.torch.timing.median / self.onepass.timing.median

    @property
    def share(self) -> float:
        """onepass' GFLOP/s over sgemm's."""
        return self.onepass.gflops() / self.sgemm

    def row(self) -> dict[str, Any]:
        return {
            "part": self.part,
            **self.onepass.row(),
            "peer_ms": round(self.torch.timing.median, 5),
            "peer_ms_quartiles": [round(self.torch.timing.low, 5), round(self.torch.timing.high, 5)],
            "peer_gflops": round(self.torch.gflops(), 2),
            "ratio": round(self.ratio, 3),
            "sgemm_gflops": round(self.sgemm, 1),
            "share_of_sgemm": round(self.share, 3),
        }


def cases(parts: Iterable[str], dtypes: Iterable[str]) -> list[tuple[str, Case]]:
    """The suite's cases with their part's name."""
    chosen = list(dtypes)
    return [(part, case) for part in parts for dtype in DTYPES if dtype in chosen for case in PARTS[part](dtype)]


def measure(part: str, case: Case, device: torch.device, seconds: float) -> Row:
    """Times onepass, torch's SDPA and sgemm in turns."""
    inputs = Inputs.of(case, device)
    calls = {name: KINDS[case.kind](inputs, CONTENDERS[name](case, device)) for name in ("onepass", "torch")}
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    timings = interleave({**calls, SGEMM: lambda: a @ b}, device, seconds)
    results = {name: Result(case, name, timings[name]) for name in calls}
    return Row(part, results["onepass"], results["torch"], 1e3 * SGEMM_GFLOP / timings[SGEMM].median)


def summarise(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Geometric means and extremes of the ratios by part and dtype, from rows as :meth:`Row.row` gives them."""
    summary = {}
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault(f"{row['part']}, {row['dtype']}", []).append(row)
        by_group.setdefault(f"{row['part']}, all", []).append(row)
    for group in sorted(by_group):
        ratios = [row["ratio"] for row in by_group[group]]
        summary[group] = {
            "cells": len(ratios),
            "geometric_mean": round(statistics.geometric_mean(ratios), 3),
            "least": min(ratios),
        }
        for name, causal in (("full", False), ("causal", True)):
            shares = [row["share_of_sgemm"] for row in by_group[group] if row["causal"] is causal]
            if shares and not group.startswith(("small", "window")):
                summary[group][f"share_of_sgemm_{name}"] = [min(shares), max(shares)]
    return summary


def show(rows: Iterable[dict[str, Any]], console: Console) -> None:
    """Prints the table and its summary."""
    rows = list(rows)
    table = Table(
        title="onepass against torch SDPA, GFLOP/s",
        caption="shape: batch, heads, length, head_dim",
        box=None,
        pad_edge=False,
    )
    for title in ("part", "shape", "mask", "dtype", "onepass", "torch", "× torch", "% sgemm"):
        table.add_column(title, justify="left" if title in ("part", "mask", "dtype") else "right", no_wrap=True)
    for row in rows:
        shape = f"{row['batch']},{row['num_heads']},{row['seqlen_k']},{row['head_dim']}"
        mask = f"window {row['window']}" if row["window"] else "causal" if row["causal"] else "full"
        rates = (row["gflops"], row["peer_gflops"])
        if row["part"] == "small":
            numbers = [f"{1e3 * row[ms]:.1f} µs" for ms in ("ms", "peer_ms")]
        else:
            numbers = [f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}" for rate in rates]
        share = "" if row["part"] in ("small", "window") else f"{100 * row['share_of_sgemm']:.0f}"
        style = "red" if row["ratio"] < 1 else ""
        table.add_row(row["part"], shape, mask, row["dtype"], *numbers, f"{row['ratio']:.2f}", share, style=style)
    console.print(table)
    means = Table(title="geometric means of × torch", box=None, pad_edge=False)
    for title in ("", "cells", "mean", "least"):
        means.add_column(title, justify="right" if title else "left")
    for group, figures in summarise(rows).items():
        means.add_row(group, str(figures["cells"]), f"{figures['geometric_mean']:.2f}", f"{figures['least']:.2f}")
    console.print(means)
