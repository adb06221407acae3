"""``onepass bench``: timings side by side with the peers, as JSON and charts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from onepass.bench import cached_command
from onepass.bench.command import DTYPES, parser, progress, setup, show_files

_PARTS = ["forward", "backward", "window", "small"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = subparsers.add_parser(
        "bench",
        help="time onepass side by side with its peers",
        description="Times onepass and its peers in turns in one process (medians with quartiles) and writes JSON and "
        "charts.",
    )
    kinds = bench.add_subparsers(metavar="benchmark", required=True)
    for kind, what in (("prefill", "the forward pass"), ("train", "forward and backward")):
        sweep = parser(kinds, kind, f"{what}, over sequence length and batch size")
        _add_shape(sweep)
        sweep.add_argument(
            "--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="batch sizes of the second chart"
        )
        sweep.add_argument("--batch", type=int, default=1, help="batch size of the first chart")
        sweep.add_argument("--seqlen", type=int, default=1024, help="sequence length of the second chart")
        sweep.add_argument("--seconds", type=float, default=1.0, help="time to spend on each case")
        sweep.add_argument(
            "--peers",
            nargs="*",
            default=["torch"],
            choices=["torch", "eager"],
            help="torch: its scaled_dot_product_attention; eager: the formula, which stores all scores",
        )
        sweep.set_defaults(run=_sweep, kind=kind)
    cached_command.add_parsers(kinds)
    memory = parser(kinds, "memory", "peak memory over sequence length, each call in a process of its own")
    _add_shape(memory, dtypes=["float32"], seqlens=[256, 512, 1024, 2048, 4096])
    memory.add_argument(
        "--kind", choices=["prefill", "train"], default="train", help="forward, or forward and backward"
    )
    memory.set_defaults(run=_memory)
    suite = parser(kinds, "suite", "the CPU table of record: shapes, dtypes, window, small calls, share of sgemm")
    suite.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure")
    suite.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="in which dtypes")
    suite.add_argument("--seconds", type=float, default=1.0, help="time to spend on each case")
    suite.add_argument("--update", action="store_true", help="keep the file's other parts, measured earlier")
    suite.set_defaults(run=_suite)
    plot = kinds.add_parser("plot", help="draw the charts of a record again", description="Draws a record's charts.")
    plot.add_argument("records", nargs="+", type=Path, help="JSON files that onepass bench wrote")
    plot.set_defaults(run=_plot)


def _add_shape(
    added: argparse.ArgumentParser,
    dtypes: list[str] | None = None,
    seqlens: list[int] | None = None,
) -> None:
    added.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=dtypes or ["float32", "bfloat16"], help="one panel each"
    )
    added.add_argument("--heads", type=int, default=8, help="query heads")
    added.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as query heads)")
    added.add_argument("--head-dim", type=int, default=64, help="channels of a head")
    added.add_argument(
        "--seqlens", type=int, nargs="+", default=seqlens or [128, 256, 512, 1024, 2048, 4096], help="sequence lengths"
    )
    added.add_argument("--full", action="store_true", help="no causal mask")
    added.add_argument("--window", type=int, help="sliding window: keys that a query sees, itself counted")


def _shapes(arguments: argparse.Namespace, kind: str) -> list[Any]:
    """One case per dtype, at the first chart's batch size and the second's length."""
    from onepass.bench.cases import Case

    kv_heads = arguments.kv_heads or arguments.heads
    options = {"causal": not arguments.full, "window": arguments.window}
    seqlen, batch = getattr(arguments, "seqlen", 0), getattr(arguments, "batch", 1)
    shape = (batch, arguments.heads, kv_heads, seqlen, seqlen, arguments.head_dim)
    return [Case(kind, *shape, dtype=dtype, **options) for dtype in arguments.dtypes]


def _sweep(arguments: argparse.Namespace) -> int:
    from onepass.bench.cases import KINDS, Inputs
    from onepass.bench.contenders import CONTENDERS
    from onepass.bench.record import Result, write
    from onepass.bench.timing import interleave

    device = setup(arguments)
    cases = []
    for case in _shapes(arguments, arguments.kind):
        cases += [("seqlen_k", case.at(seqlen_q=seqlen, seqlen_k=seqlen)) for seqlen in arguments.seqlens]
        cases += [("batch", case.at(batch=batch)) for batch in arguments.batches]
    results = []
    with progress() as bar:
        task = bar.add_task("", total=len(cases))
        for sweep, case in cases:
            bar.update(task, description=case.label())
            inputs = Inputs.of(case, device)
            names = ["onepass", *arguments.peers]
            calls = {name: KINDS[case.kind](inputs, CONTENDERS[name](case, device)) for name in names}
            timings = interleave(calls, device, arguments.seconds)
            results += [Result(case, name, timing, sweep) for name, timing in timings.items()]
            bar.advance(task)
    write(arguments.output, device, (result.row() for result in results))
    return show_files(arguments.output)


def _memory(arguments: argparse.Namespace) -> int:
    from onepass.bench.memory import measure
    from onepass.bench.record import write

    device = setup(arguments)
    cases = [
        case.at(seqlen_q=seqlen, seqlen_k=seqlen)
        for case in _shapes(arguments, arguments.kind)
        for seqlen in arguments.seqlens
    ]
    rows = []
    with progress() as bar:
        task = bar.add_task("", total=3 * len(cases))
        for case in cases:
            for contender in ("onepass", "torch", "eager"):
                bar.update(task, description=f"{case.label()}: {contender}")
                rows.append({**measure(case, contender, device).row(), "sweep": "seqlen_k"})
                bar.advance(task)
    write(arguments.output, device, rows)
    return show_files(arguments.output)


def _suite(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from onepass.bench import suite
    from onepass.bench.record import read, write

    device = setup(arguments)
    rows = []
    cases = suite.cases(arguments.parts, arguments.dtypes)
    with progress() as bar:
        task = bar.add_task("", total=len(cases))
        for part, case in cases:
            bar.update(task, description=case.label())
            rows.append(suite.measure(part, case, device, arguments.seconds).row())
            bar.advance(task)
    if arguments.update and arguments.output.exists():
        measured = {(row["part"], row["dtype"]) for row in rows}
        rows = [r for r in read(arguments.output)["results"] if (r["part"], r["dtype"]) not in measured] + rows
        rows.sort(key=lambda row: (_PARTS.index(row["part"]), DTYPES.index(row["dtype"])))
    write(arguments.output, device, rows, summary=suite.summarise(rows))
    suite.show(rows, Console())
    print(f"written: {arguments.output}")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    for record in arguments.records:
        try:
            show_files(record)
        except (OSError, ValueError) as error:
            raise SystemExit(f"onepass {error}") from error
    return 0
