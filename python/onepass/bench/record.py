"""The JSON of a benchmark: where it ran, what was measured, what came out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onepass.bench.cases import Case
from onepass.bench.timing import Timing

SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """One contender's time for one case. ``sweep``: the field that varies along the chart that the case belongs to."""

    case: Case
    contender: str
    timing: Timing
    sweep: str | None = None

    def gflops(self) -> float:
        return self.case.flops() / self.timing.median * 1e-6

    def row(self) -> dict[str, Any]:
        return {
            **self.case.describe(),
            "sweep": self.sweep,
            "contender": self.contender,
            **self.timing.fields(),
            "gflops": round(self.gflops(), 2),
        }


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    import onepass

    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onepass": onepass.info().splitlines(),
        "commit": commit(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, device: torch.device, rows: Iterable[dict[str, Any]], **more: Any) -> None:
    """Writes rows of :class:`Result` (or of another type with ``row()``); ``more`` are further top-level entries."""
    record = {"schema": SCHEMA, **more, "environment": environment(device), "results": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A record written by :func:`write`.

    Raises:
        ValueError: when the file is none, or of another schema.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        schema = record["schema"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"bench plot: {path}: got no benchmark record; need a file that onepass bench wrote"
        ) from error
    if schema != SCHEMA:
        raise ValueError(f"bench plot: {path}: got schema {schema}; need {SCHEMA}")
    return record
