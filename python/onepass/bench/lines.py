"""The lines of the C++ driver ``onepass-bench``, as a record that charts can be drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Fields of a line that can be an axis, and how those that vary beside it are written in a legend ("": not at all).
_AXES = ("seqlen_k", "batch", "prefill_fraction")
_LEGEND: dict[str, Callable[[Any], str]] = {
    "backend": str,
    "device": str,
    "threads": lambda count: f"{count} threads",
    "batch": lambda count: f"batch {count}",
    "num_heads": lambda count: f"{count} heads",
    "num_heads_kv": lambda count: f"{count} key/value heads",
    "seqlen_q": lambda count: f"{count} queries",
    "seqlen_k": lambda count: f"{count} keys",
    "head_dim": lambda count: f"head_dim {count}",
    "causal": lambda causal: "causal" if causal else "full",
    "window": lambda window: f"window {window}" if window else "",
    "alibi": lambda alibi: "ALiBi" if alibi else "",
    "query_dtype": lambda dtype: f"{dtype} queries",
    "page_size": lambda size: f"pages of {size}" if size else "",
    "num_splits": lambda count: f"{count} splits" if count else "",
    "prefill_fraction": lambda percent: f"{percent} % prefill",
}


def read_lines(path: Path) -> dict[str, Any] | None:
    """The lines in a file as a record with a row for every point of every chart; ``None`` when it holds no lines.

    An axis is a field that varies while others stay; these others name the series.
    """
    lines = [_line(text) for text in path.read_text().splitlines()]
    results = [line for line in lines if line is not None]
    if not results:
        return None
    first = results[0]
    rows = [row for kind in dict.fromkeys(line["kind"] for line in results) for row in _rows(kind, results)]
    return {"environment": {"machine": first["machine"], "threads": first["threads"]}, "results": rows}


def _line(text: str) -> Row | None:
    """One case of ``onepass-bench``; anything else in a log (compiler output, shell traces) is passed over."""
    if not text.startswith('{"onepass_bench":'):
        return None
    try:
        line: Row = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line


def _rows(kind: str, results: list[Row]) -> list[Row]:
    found = [line for line in results if line["kind"] == kind]
    square = all(line["seqlen_q"] == line["seqlen_k"] for line in found)
    fields = [field for field in _LEGEND if not (field == "seqlen_q" and square)]
    rows = []
    for axis in _AXES:
        series: dict[tuple[Any, ...], list[Row]] = {}
        others = [field for field in fields if field != axis]
        for line in found:
            series.setdefault((line["dtype"], *(line[field] for field in others)), []).append(line)
        series = {key: lines for key, lines in series.items() if len({line[axis] for line in lines}) > 1}
        dtypes = {key[0] for key in series}
        varying = [
            field
            for i, field in enumerate(others, start=1)
            if any(len({key[i] for key in series if key[0] == dtype}) > 1 for dtype in dtypes)
        ]
        for lines in series.values():
            name = ", ".join(filter(None, (_LEGEND[field](lines[0][field]) for field in varying)))
            rows += [row for line in lines for row in _contenders(line, name, axis)]
    return rows


def _contenders(line: Row, name: str, axis: str) -> list[Row]:
    """A hybrid case has two: the batch in one call, and its two parts apart."""
    row = {**line, "contender": name or "onepass", "sweep": axis}
    if line.get("apart_ms") is None:
        return [row]
    parts = {**line, "ms": line["apart_ms"], "ms_quartiles": line["apart_ms_quartiles"], "sweep": axis}
    return [
        {**row, "contender": f"one call, {name}" if name else "onepass"},
        {**parts, "contender": f"apart, {name}" if name else "apart"},
    ]
