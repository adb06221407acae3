"""What is measured: the shape of a call, its arithmetic, and the contenders that can run it.

A new kind of case (decode, hybrid) is one more entry in :data:`KINDS`; a new peer one more function in
``contenders.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One measured call. Lengths in tokens; ``window``: keys that a query sees, itself counted, None for all."""

    kind: str  # "prefill": forward, "train": forward and backward, "backward": backward alone
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None

    def flops(self) -> float:
        """4·B·H·(visible query-key pairs)·D forward, 2.5 times as much backward."""
        forward = 4.0 * self.batch * self.num_heads * self.visible_pairs() * self.head_dim
        return forward * {"prefill": 1.0, "backward": 2.5, "train": 3.5}[self.kind]

    def visible_pairs(self) -> float:
        """Query-key pairs of one head that the mask lets through; a causal mask counts as half."""
        if self.window is None:
            return self.seqlen_q * self.seqlen_k / (2 if self.causal else 1)
        return float(sum(min(self.window, i + 1 + self.seqlen_k - self.seqlen_q) for i in range(self.seqlen_q)))

    def label(self) -> str:
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        heads = f"{self.num_heads}" if self.num_heads == self.num_heads_kv else f"{self.num_heads}/{self.num_heads_kv}"
        return f"{self.kind} {self.batch}×{heads}×{self.seqlen_k}×{self.head_dim} {mask} {self.dtype}"

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def at(self, **changes: Any) -> Case:
        return replace(self, **changes)


@dataclass(frozen=True)
class Inputs:
    """Random normal tensors: q, dout (batch, num_heads, seqlen_q, head_dim), k and v (batch, num_heads_kv, …)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        trains = case.kind != "prefill"

        def normal(heads: int, seqlen: int, grad: bool) -> Tensor:
            values = torch.randn(case.batch, heads, seqlen, case.head_dim, generator=generator)
            return values.to(device=device, dtype=DTYPES[case.dtype]).requires_grad_(grad and trains)

        return cls(
            normal(case.num_heads, case.seqlen_q, True),
            normal(case.num_heads_kv, case.seqlen_k, True),
            normal(case.num_heads_kv, case.seqlen_k, True),
            normal(case.num_heads, case.seqlen_q, False),
        )


# attention(q, k, v) → out
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward(inputs: Inputs, attention: Attention) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return attention(inputs.q, inputs.k, inputs.v)

    return call


def train(inputs: Inputs, attention: Attention) -> Callable[[], object]:
    def call() -> object:
        out = attention(inputs.q, inputs.k, inputs.v)
        return torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)

    return call


def backward(inputs: Inputs, attention: Attention) -> Callable[[], object]:
    out = attention(inputs.q, inputs.k, inputs.v)

    def call() -> object:
        return torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout, retain_graph=True)

    return call


# kind → what is timed, given the inputs and a contender's attention
KINDS: dict[str, Callable[[Inputs, Attention], Callable[[], object]]] = {
    "prefill": forward,
    "train": train,
    "backward": backward,
}
