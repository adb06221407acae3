"""Line charts of benchmark records."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from onepass.bench.record import read

STYLES = {"onepass": ("onepass", "C0"), "torch": ("torch SDPA", "C1"), "eager": ("eager", "C2")}
AXES = {"seqlen_k": "sequence length", "batch": "batch size"}
Row = dict[str, Any]


def plot(path: Path) -> list[Path]:
    """Draws every chart of a record beside it, as ``<record>-<axis>.png``, and returns the files.

    Raises:
        ValueError: when the file is no record, or holds nothing to draw.
    """
    record = read(path)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in record["results"]:
        if row.get("sweep"):
            groups[row["kind"], row["sweep"]].append(row)
    if not groups:
        raise ValueError(f"bench plot: {path}: got no sweep over sequence length or batch size; need one")
    several_kinds = len({kind for kind, _ in groups}) > 1
    files = []
    for (kind, sweep), rows in groups.items():
        quantity = "mebibytes" if "mebibytes" in rows[0] else "gflops"
        figure = _figure(rows, kind, sweep, quantity, record["environment"])
        middle = f"-{kind}" if several_kinds else ""
        files.append(path.with_name(f"{path.stem}{middle}-{AXES[sweep].replace(' ', '-')}.png"))
        figure.savefig(files[-1], dpi=130)
    return files


def _figure(rows: list[Row], kind: str, sweep: str, quantity: str, environment: dict[str, Any]) -> Figure:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(4.6 * len(dtypes) + 0.6, 4.2), layout="constrained")
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        _panel(panel, [row for row in rows if row["dtype"] == dtype], sweep, quantity)
        panel.set(title=dtype, xlabel=AXES[sweep])
    panels[0].set_ylabel("peak memory beyond the inputs, MiB" if quantity == "mebibytes" else "GFLOP/s")
    panels[0].legend()
    first = rows[0]
    fixed = f"batch {first['batch']}" if sweep == "seqlen_k" else f"{first['seqlen_k']} tokens"
    mask = f"window {first['window']}" if first["window"] else "causal" if first["causal"] else "full"
    shape = f"{fixed}, {first['num_heads']}/{first['num_heads_kv']} heads, head_dim {first['head_dim']}, {mask}"
    where = f"{environment['machine']}, {environment['threads']} threads, torch {environment['torch']}"
    figure.suptitle(f"{kind}: {shape}\n{where}", fontsize=10)
    return figure


def _panel(axes: Axes, rows: list[Row], sweep: str, quantity: str) -> None:
    for contender in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((r[sweep], r) for r in rows if r["contender"] == contender and r[quantity] is not None)
        x = [value for value, _ in points]
        y = [row[quantity] for _, row in points]
        label, color = STYLES.get(contender, (contender, None))
        axes.plot(x, y, "o-", markersize=4, label=label, color=color)
        if quantity == "gflops" and points:
            # GFLOP/s at the quartiles of the time
            bounds = [[row["gflops"] * row["ms"] / q for q in reversed(row["ms_quartiles"])] for _, row in points]
            axes.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.2, color=color)
    axes.set_xscale("log", base=2)
    ticks = sorted({row[sweep] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if quantity == "mebibytes":
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
