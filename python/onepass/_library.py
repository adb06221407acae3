"""Loads the operations (``torch.ops.onepass``) and turns their errors into Python's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

MINIMUM_TORCH = (2, 10)
LIBRARY = Path(__file__).parent / "lib" / "libonepass_torch.so"

# The binding puts the kind of error in front of the message, because torch makes a RuntimeError of every one.
_ERROR = re.compile(r"^(ValueError|TypeError|NotImplementedError|OutOfMemoryError|RuntimeError): ")
_KINDS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "NotImplementedError": NotImplementedError,
    "OutOfMemoryError": torch.OutOfMemoryError,
    "RuntimeError": RuntimeError,
}


def _load() -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(f"onepass: torch: got {torch.__version__}; need 2.10 or newer")
    if not LIBRARY.exists():
        raise ImportError(
            f"onepass: library: {LIBRARY} does not exist; install the wheel, or build it in the source tree with `make`"
        )
    torch.ops.load_library(str(LIBRARY))


def translated(error: RuntimeError) -> Exception:
    """The exception that an operation's ``error`` stands for (``error`` itself when it is not one of ours)."""
    # torch may append a trace of C++ frames, which are not part of the message.
    text = str(error).split("\nException raised from", 1)[0]
    match = _ERROR.match(text)
    if match is not None:
        return _KINDS[match[1]](text[match.end() :])
    # torch's own refusal of an argument that does not fit the schema
    if text.startswith("onepass::") and "Expected a value of type" in text:
        return TypeError(" ".join(text.split("\n", 1)[0].removeprefix("onepass::").split()))
    return error


def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """``operation(*args, **kwargs)`` with its errors translated."""
    try:
        return operation(*args, **kwargs)
    except RuntimeError as error:
        raise translated(error) from None


_load()
