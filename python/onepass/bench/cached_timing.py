"""Times contenders over KV caches in turns, together with a plain read of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from onepass.bench.cached import CacheCase, CacheInputs, CacheResult, read_by_product, read_by_sum, rotating
from onepass.bench.cached_contenders import CONTENDERS, contenders
from onepass.bench.timing import Timing, interleave

_READERS = {"read by product": read_by_product, "read by sum": read_by_sum}


def measure(sweep: str, case: CacheCase, device: torch.device, seconds: float) -> list[CacheResult]:
    """One result for every contender that can run the case."""
    inputs = CacheInputs.of(case, device)
    calls: dict[str, Callable[[], object]] = {}
    steps: dict[str, int] = {}
    for name in [*_READERS, *contenders(case, device)]:
        step = _READERS[name](inputs) if name in _READERS else CONTENDERS[name](case, inputs)
        if name.startswith("torch "):
            try:
                step(0)
            except RuntimeError as error:
                print(f"{name}: {case.label()}: {str(error).splitlines()[0]}")
                continue
        calls[name], steps[name] = rotating(step, len(inputs.caches), device)
    timings = {name: _per_step(timing, steps[name]) for name, timing in interleave(calls, device, seconds).items()}
    reading = min((timings.pop(name) for name in _READERS), key=lambda timing: timing.median)
    return [CacheResult(case, name, timing, reading, sweep) for name, timing in timings.items()]


def _per_step(timing: Timing, steps: int) -> Timing:
    return replace(timing, median=timing.median / steps, low=timing.low / steps, high=timing.high / steps)


def show(results: list[CacheResult], console: Console) -> None:
    """Prints one line for each case: every contender's milliseconds, and onepass' share of the read rate."""
    names = list(dict.fromkeys(result.contender for result in results))
    cases: dict[CacheCase, dict[str, CacheResult]] = {}
    for result in results:
        cases.setdefault(result.case, {})[result.contender] = result
    kind = results[0].case.kind
    table = Table(title=f"{kind}: milliseconds a step", box=None, pad_edge=False)
    for title in ("batch", "queries", "keys", "heads", "storage", *names, "GB/s", "% read"):
        table.add_column(title, justify="right", no_wrap=True)
    for case, found in cases.items():
        queries = f"{case.prefills}·{case.seqlen_q}+{case.decodes}" if kind == "hybrid" else str(case.seqlen_q)
        times = [f"{found[name].timing.median:.3f}" if name in found else "" for name in names]
        row = found["onepass"].row()
        rates = [f"{row['gbps']:.1f}", f"{100 * row['share_of_read']:.0f}"]
        heads = f"{case.num_heads}/{case.num_heads_kv}"
        table.add_row(str(case.batch), queries, str(case.seqlen_k), heads, case.dtype, *times, *rates)
    console.print(table)
