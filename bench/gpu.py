"""What the GPU records share: times by CUDA events, the charts' panels, options and the file."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from onepass.bench.record import environment

Call = Callable[[], object]
Calls = dict[str, Call]  # what is timed, by contender


def command_line(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--commit", help="where the checkout is not a repository")
    parser.add_argument("--quick", action="store_true")
    return parser


def milliseconds(call: Call, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def measure(contenders: Calls, *, rounds: int, most: int, budget: float) -> dict[str, list[float]]:
    """Milliseconds of each contender's calls: as many a round as take ``budget`` milliseconds, 2 to ``most``."""
    counts = {}
    for name, call in contenders.items():
        milliseconds(call, 2)
        counts[name] = max(2, min(most, int(budget / milliseconds(call, 1)[0])))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in sorted(contenders, reverse=turn % 2 == 1):
            times[name] += milliseconds(contenders[name], counts[name])
    return times


def row(case: Any, contender: str, times: Sequence[float], flops: float, **fields: object) -> dict[str, object]:
    """The record of a contender's times, in milliseconds, at a case (a dataclass) of so many FLOPs."""
    median, quartiles = statistics.median(times), statistics.quantiles(times, n=4)
    return {
        **asdict(case),
        "dtype": "bfloat16",
        **fields,
        "contender": contender,
        "ms": round(median, 5),
        "ms_quartiles": [round(quartiles[0], 5), round(quartiles[2], 5)],
        "calls": len(times),
        "tflops": round(flops / median * 1e-9, 1),
    }


def panel(axis: Any, rows: Sequence[Mapping[str, object]], names: Sequence[str], title: str, **fields: object) -> None:
    """TFLOP/s over the sequence length, a line for each contender, of the rows that have these fields."""
    for name in names:
        wanted = {**fields, "contender": name}
        points = [(r["seqlen"], r["tflops"]) for r in rows if all(r[field] == x for field, x in wanted.items())]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_title(title)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_ylabel("TFLOP/s")
    axis.set_xlabel("sequence length (32k tokens in all)")


def write(arguments: argparse.Namespace, name: str, rows: list[dict[str, object]], **summary: object) -> None:
    """Writes ``rows`` and the summary as ``name``.json into the folder of :func:`command_line`'s ``--output``."""
    where = environment(torch.device("cuda"))
    where["commit"] = arguments.commit or where["commit"]
    where["cudnn"] = torch.backends.cudnn.version()
    record = {"schema": 1, "environment": where, **summary, "results": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
