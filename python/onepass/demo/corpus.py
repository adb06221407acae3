"""The training text: the source code of Python's standard library, which every machine with Python has."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Packages that are not part of the library proper, or whose text is mostly data.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Bytes of source files; every 20th file is kept apart for validation."""

    train: Tensor  # (bytes), uint8
    validation: Tensor  # (bytes), uint8
    files: int

    @classmethod
    def load(cls, root: Path | None = None) -> Corpus:
        """Reads all ``*.py`` files under ``root`` (default: the standard library) in order of their paths.

        Raises:
            FileNotFoundError: when there is less than 1 MB of source.
        """
        root = root or Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts))
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        for index, path in enumerate(paths):
            parts[index % 20 == 19].append(path.read_bytes() + b"\n\n")
        train, validation = (
            torch.frombuffer(bytearray(b"".join(parts[held_out])), dtype=torch.uint8) if parts[held_out] else None
            for held_out in (False, True)
        )
        if train is None or validation is None or train.numel() < 1_000_000:
            raise FileNotFoundError(
                f"demo: standard library: got {len(paths)} source files in {root}; need 1 MB of them"
            )
        return cls(train, validation, len(paths))


def batch(text: Tensor, batch_size: int, seqlen: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random excerpts, int64 (batch_size, seqlen + 1): inputs and, shifted by one, targets."""
    starts = torch.randint(0, text.numel() - seqlen - 1, (batch_size,), generator=generator)
    rows = starts[:, None] + torch.arange(seqlen + 1)
    return text[rows].long().to(device)
