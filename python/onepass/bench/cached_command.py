"""``onepass bench decode`` and ``onepass bench hybrid``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from onepass.bench.command import DTYPES, STORAGE, parser, progress, setup, show_files

if TYPE_CHECKING:
    from onepass.bench.cached import CacheCase, CacheResult


def add_parsers(kinds: Any) -> None:
    decode = parser(kinds, "decode", "one step over a KV cache, over its length and the batch size: KV GB/s")
    _add_shape(decode, types=["float32", "bfloat16", "int8", "fp8_e4m3"], batch=1)
    decode.add_argument("--queries", type=int, default=1, help="query tokens of each sequence")
    decode.set_defaults(run=_run, kind="decode", sweeps=_decode_sweeps)
    hybrid = parser(kinds, "hybrid", "batches that mix prefill and decode: one call against one for each")
    _add_shape(hybrid, types=["float32", "bfloat16"], batch=8)
    hybrid.add_argument("--queries", type=int, default=256, help="query tokens of a sequence that prefills")
    hybrid.add_argument(
        "--fractions", type=int, nargs="+", default=[0, 25, 50, 75, 100], help="percent of the sequences that prefill"
    )
    hybrid.add_argument("--fraction", type=int, default=50, help="that percentage in the other charts")
    hybrid.set_defaults(run=_run, kind="hybrid", sweeps=_hybrid_sweeps)


def _add_shape(added: argparse.ArgumentParser, types: list[str], batch: int) -> None:
    added.add_argument("--types", nargs="+", choices=STORAGE, default=types, help="storage, one panel each")
    added.add_argument("--query-dtype", choices=DTYPES, default="bfloat16", help="of queries over int8 and fp8")
    added.add_argument("--heads", type=int, default=32, help="query heads")
    added.add_argument("--kv-heads", type=int, default=8, help="key/value heads")
    added.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    added.add_argument("--seqlens", type=int, nargs="+", default=lengths, help="keys of a sequence")
    added.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="sequences, in that chart")
    added.add_argument("--batch", type=int, default=batch, help="sequences in the other charts")
    added.add_argument("--seqlen", type=int, default=4096, help="keys of a sequence in the other charts")
    added.add_argument("--page-size", type=int, help="tokens of a page (default: a contiguous cache)")
    added.add_argument("--splits", type=int, default=0, help="parts that keys are split into; 0: chosen for speed")
    added.add_argument("--seconds", type=float, default=1.0, help="time to spend on each case")


def _base(arguments: argparse.Namespace, dtype: str, **more: Any) -> CacheCase:
    from onepass.bench.cached import CacheCase

    return CacheCase(
        arguments.kind,
        arguments.batch,
        arguments.heads,
        arguments.kv_heads,
        arguments.queries,
        arguments.seqlen,
        arguments.head_dim,
        dtype=dtype,
        query_dtype=dtype if dtype in DTYPES else arguments.query_dtype,
        page_size=arguments.page_size,
        num_splits=arguments.splits,
        **more,
    )


def _decode_sweeps(arguments: argparse.Namespace) -> list[tuple[str, CacheCase]]:
    cases = []
    for dtype in arguments.types:
        base = _base(arguments, dtype)
        cases += [("seqlen_k", base.at(seqlen_k=seqlen)) for seqlen in arguments.seqlens]
        cases += [("batch", base.at(batch=batch)) for batch in arguments.batches]
    return cases


def _hybrid_sweeps(arguments: argparse.Namespace) -> list[tuple[str, CacheCase]]:
    cases = []
    for dtype in arguments.types:
        base = _base(arguments, dtype, prefill_fraction=arguments.fraction)
        cases += [("prefill_fraction", base.at(prefill_fraction=percent)) for percent in arguments.fractions]
        cases += [("seqlen_k", base.at(seqlen_k=seqlen)) for seqlen in arguments.seqlens]
        cases += [("batch", base.at(batch=batch)) for batch in arguments.batches]
    return cases


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from onepass.bench.cached_timing import measure, show
    from onepass.bench.record import write

    device = setup(arguments)
    cases: list[tuple[str, CacheCase]] = arguments.sweeps(arguments)
    for _, case in cases:
        if case.seqlen_q > case.seqlen_k:
            raise SystemExit(
                f"onepass bench {case.kind}: --queries: got {case.seqlen_q}; need at most the {case.seqlen_k} keys"
            )
    results: list[CacheResult] = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases))
        for sweep, case in cases:
            bar.update(task, description=case.label())
            results += measure(sweep, case, device, arguments.seconds)
            bar.advance(task)
    write(arguments.output, device, (result.row() for result in results))
    console = Console()
    show(results, Console(width=max(console.width, 120)))
    return show_files(arguments.output)
