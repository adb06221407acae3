"""What the benchmark commands share: their parsers, progress and files. Importing it needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DTYPES = ["float32", "bfloat16", "float16"]
STORAGE = [*DTYPES, "int8", "fp8_e4m3", "fp8_e5m2"]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _file(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, a folder; need a file's name")
    return Path(text)


def parser(kinds: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A subcommand with the options of every benchmark."""
    added: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text, formatter_class=_Help)
    added.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    added.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    added.add_argument("--output", type=_file, default=Path("bench_output") / f"{name}.json", help="the JSON file")
    return added


def setup(arguments: argparse.Namespace) -> Any:
    """Applies the options of :func:`parser` and returns the torch device."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("onepass bench: --device: got cuda; need a GPU that torch can use")
    return torch.device(arguments.device)


def progress() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def show_files(record: Path) -> int:
    """Draws a record's charts and says where everything is."""
    from onepass.bench.plots import plot

    print("written: " + ", ".join(str(path) for path in (record, *plot(record))))
    return 0
