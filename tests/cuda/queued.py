"""Kernels that are set up before the ones ahead of them have ended (programmatic dependent launch)."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_same_when_queued(run: Callable[[Callable[[], None]], list[torch.Tensor]]) -> None:
    """``run(wait)`` calls ``wait()`` between kernels: its results must have the same bits when it waits for the device
    there as when all its kernels are queued before the first one begins.
    """
    wants = run(torch.cuda.synchronize)
    for _ in range(5):
        torch.cuda._sleep(20_000_000)
        for got, want in zip(run(lambda: None), wants, strict=True):
            assert torch.equal(got, want)
