"""Line charts of benchmark records, and of the lines that ``onepass-bench`` prints."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onepass.bench.lines import read_lines
from onepass.bench.record import read

STYLES = {
    "onepass": ("onepass", "C0"),
    "torch": ("torch SDPA", "C1"),
    "eager": ("eager", "C2"),
    "torch folded": ("torch SDPA, group folded into rows", "C3"),
    "torch flash": ("torch SDPA, flash", "C4"),
    "torch cuDNN": ("torch SDPA, cuDNN", "C5"),
    "apart": ("onepass, prefill and decode apart", "C6"),
}
AXES = {"seqlen_k": "sequence length", "batch": "batch size", "prefill_fraction": "prefill fraction"}
_LABELS = {
    "mebibytes": "peak memory beyond the inputs, MiB",
    "gflops": "GFLOP/s",
    "gbps": "KV GB/s",
    "ms": "milliseconds a step",
}
Row = dict[str, Any]


def plot(path: Path) -> list[Path]:
    """Draws every chart of a record beside it, as ``<record>-<axis>.png``, and returns the files.

    Raises:
        ValueError: when the file is no record, or holds nothing to draw.
    """
    record = read_lines(path) or read(path)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in record["results"]:
        if row.get("sweep"):
            groups[row["kind"], row["sweep"]].append(row)
    if not groups:
        raise ValueError(f"bench plot: {path}: got no sweep over sequence length, batch size or fraction; need one")
    several_kinds = len({kind for kind, _ in groups}) > 1
    files = []
    for (kind, sweep), rows in groups.items():
        figure = _figure(rows, kind, sweep, record["environment"])
        middle = f"-{kind}" if several_kinds else ""
        files.append(path.with_name(f"{path.stem}{middle}-{AXES[sweep].replace(' ', '-')}.png"))
        figure.savefig(files[-1], dpi=130)
    return files


def _quantity(row: Row) -> str:
    if "mebibytes" in row:
        return "mebibytes"
    return {"decode": "gbps", "hybrid": "ms"}.get(row["kind"], "gflops")


def _figure(rows: list[Row], kind: str, sweep: str, environment: dict[str, Any]) -> Figure:
    quantity = _quantity(rows[0])
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(max(4.6 * len(dtypes), 6.5) + 0.6, 4.6), layout="constrained")
    colors = _colors(rows)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=quantity != "ms")[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        _panel(panel, [row for row in rows if row["dtype"] == dtype], sweep, quantity, colors)
        panel.set(title=dtype, xlabel=AXES[sweep] + (", % of the sequences" if sweep == "prefill_fraction" else ""))
    for panel in panels:
        if panel.get_yscale() == "linear":
            panel.set_ylim(bottom=0)
    panels[0].set_ylabel(_LABELS[quantity])
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(len(handles), max(2, len(dtypes)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    where = f"{environment['machine']}, {environment['threads']} threads"
    if "torch" in environment:
        where += f", torch {environment['torch']}"
    figure.suptitle(f"{kind}: {_shape(rows, sweep)}\n{where}", fontsize=10)
    return figure


def _shape(rows: list[Row], sweep: str) -> str:
    """What all points of a chart have in common."""

    def common(field: str) -> Any:
        values = {row.get(field) for row in rows}
        return values.pop() if len(values) == 1 else None

    lengths = common("seqlen_k") if sweep != "seqlen_k" else None
    parts = [
        f"batch {common('batch')}" if sweep != "batch" and common("batch") else "",
        f"{lengths} keys" * bool(lengths),
    ]
    if rows[0]["kind"] in ("decode", "hybrid"):
        if sweep != "prefill_fraction" and common("prefill_fraction") is not None and rows[0]["kind"] == "hybrid":
            parts.append(f"{common('prefill_fraction')} % prefill")
        if common("seqlen_q"):
            parts.append(f"{common('seqlen_q')} queries" if common("seqlen_q") > 1 else "1 query")
        parts.append(f"pages of {common('page_size')}" if common("page_size") else "")
    else:
        mask = (
            f"window {common('window')}" if common("window") else {True: "causal", False: "full"}.get(common("causal"))
        )
        parts.append(mask or "")
    if common("num_heads"):
        parts.append(f"{common('num_heads')}/{common('num_heads_kv') or '…'} heads")
    parts.append(f"head_dim {common('head_dim')}" if common("head_dim") else "")
    return ", ".join(part for part in parts if part)


def _colors(rows: list[Row]) -> dict[str, str]:
    """The same for a contender in every panel."""
    names = dict.fromkeys(row["contender"] for row in rows)
    others = [name for name in names if name not in STYLES]
    return {name: STYLES[name][1] if name in STYLES else f"C{others.index(name) % 10}" for name in names}


def _panel(axes: Axes, rows: list[Row], sweep: str, quantity: str, colors: dict[str, str]) -> None:
    for contender in dict.fromkeys(row["contender"] for row in rows):
        points = sorted(
            ((r[sweep], r) for r in rows if r["contender"] == contender and r[quantity] is not None), key=_x
        )
        x = [value for value, _ in points]
        label, color = STYLES.get(contender, (contender, ""))[0], colors[contender]
        axes.plot(x, [row[quantity] for _, row in points], "o-", markersize=4, label=label, color=color)
        if quantity != "mebibytes" and points:
            low, high = zip(*(_spread(row, quantity) for _, row in points), strict=True)
            axes.fill_between(x, low, high, alpha=0.2, color=color)
    ticks = sorted({row[sweep] for row in rows})
    if quantity == "gbps" and "read_gbps" in rows[0]:
        read = [next(row["read_gbps"] for row in rows if row[sweep] == tick) for tick in ticks]
        axes.plot(ticks, read, "--", color="0.5", label="plain read of the same bytes")
    if sweep != "prefill_fraction":
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if max(map(float, ticks)) > 9999 else 0)
    if quantity == "mebibytes":
        axes.set_yscale("log", base=2)
    elif sweep == "seqlen_k" and quantity == "ms":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _x(point: tuple[float, Row]) -> float:
    return point[0]


def _spread(row: Row, quantity: str) -> tuple[float, float]:
    """The quantity at the quartiles of the time."""
    low, high = row["ms_quartiles"]
    if quantity == "ms":
        return low, high
    return row[quantity] * row["ms"] / high, row[quantity] * row["ms"] / low
