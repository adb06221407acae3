"""Timing: contenders take turns in one process; medians over the rounds, with the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over rounds, and the first and third quartile."""

    median: float
    low: float
    high: float
    rounds: int

    def fields(self) -> dict[str, Any]:
        """As a record's row has them."""
        return {
            "ms": round(self.median, 5),
            "ms_quartiles": [round(self.low, 5), round(self.high, 5)],
            "rounds": self.rounds,
        }


def interleave(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 1.0, max_rounds: int = 50
) -> dict[str, Timing]:
    """Times every call once per round, in an order that alternates, for about ``seconds`` in all.

    There are at least 5 rounds, or 3 where one round alone takes longer than that time. A short call is repeated within
    its turn until the turn takes about a millisecond, so that the clock's and the loop's own cost does not count.
    """
    names = list(calls)
    repeats = {name: _calibrate(calls[name], device) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start, rounds, elapsed = time.perf_counter(), 0, 0.0
    while rounds < (3 if elapsed > seconds * max(rounds, 1) else 5) or (rounds < max_rounds and elapsed < seconds):
        for name in names if rounds % 2 == 0 else reversed(names):
            samples[name].append(_milliseconds(calls[name], repeats[name], device))
        rounds += 1
        elapsed = time.perf_counter() - start
    return {name: _summary(values) for name, values in samples.items()}


def _calibrate(call: Callable[[], object], device: torch.device) -> int:
    """Warms the call up (code paths, caches, thread pools) and returns how often it fits into a millisecond."""
    milliseconds = _milliseconds(call, 1, device)
    if milliseconds < 100:
        milliseconds = min(milliseconds, *(_milliseconds(call, 1, device) for _ in range(2)))
    return max(1, min(1000, round(1 / max(milliseconds, 1e-3))))


def _milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of one of ``repeats`` calls."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - start) / repeats


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))
