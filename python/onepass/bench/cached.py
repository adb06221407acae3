"""Measured calls over KV caches: decoding, and hybrid batches of decode and prefill.

Bytes are those stored for the keys and values, scales included. Every call reads another of several copies of the
cache, so that it comes from memory as it does in a model of many layers, not from the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import onepass
from onepass.bench.cases import DTYPES
from onepass.bench.timing import Timing

STORAGE = (*DTYPES, "int8", "fp8_e4m3", "fp8_e5m2")
# Copies of a cache together fill this; last-level caches are smaller, or shared with too many.
COLD_BYTES = {"cpu": 512 << 20, "cuda": 256 << 20}
_TILE = 1 << 22


@dataclass(frozen=True)
class CacheCase:
    """One step over a cache of ``batch`` sequences of ``seqlen_k`` tokens, the new ones included.

    ``prefill_fraction`` percent of the sequences, the first ones, have ``seqlen_q`` query tokens (all of them in
    "decode"), the others one. ``dtype`` is that of the storage, ``query_dtype`` that of queries and output.
    """

    kind: str  # "decode" or "hybrid"
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "bfloat16"
    query_dtype: str = "bfloat16"
    prefill_fraction: int = 100
    page_size: int | None = None
    num_splits: int = 0

    @property
    def prefills(self) -> int:
        """Sequences with ``seqlen_q`` query tokens."""
        return round(self.batch * self.prefill_fraction / 100)

    @property
    def decodes(self) -> int:
        return self.batch - self.prefills

    def query_lengths(self) -> list[int]:
        return [self.seqlen_q] * self.prefills + [1] * self.decodes

    def kv_bytes(self) -> int:
        """Bytes that one pass over all keys and values reads."""
        element = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        scale = 4 if self.dtype == "int8" else 0  # one float32 per head of a token
        return 2 * self.batch * self.num_heads_kv * self.seqlen_k * (self.head_dim * element + scale)

    def flops(self) -> float:
        """4·H·D for every visible pair of query and key."""
        chunk = self.seqlen_q * self.seqlen_k - self.seqlen_q * (self.seqlen_q - 1) / 2
        pairs = self.prefills * chunk + self.decodes * self.seqlen_k
        return 4.0 * self.num_heads * self.head_dim * pairs

    def label(self) -> str:
        heads = f"{self.num_heads}/{self.num_heads_kv}"
        part = f" {self.prefill_fraction} % prefill" if self.kind == "hybrid" else ""
        return f"{self.kind} {self.batch}×{heads}×{self.seqlen_k}×{self.head_dim} {self.dtype}{part}"

    def at(self, **changes: Any) -> CacheCase:
        return replace(self, **changes)


@dataclass(frozen=True)
class CacheResult:
    """One contender's time for one case, with the time of reading the same bytes in the same rounds."""

    case: CacheCase
    contender: str
    timing: Timing
    read: Timing
    sweep: str

    def row(self) -> dict[str, Any]:
        nbytes, read = self.case.kv_bytes(), self.case.kv_bytes() / self.read.median * 1e-6
        rate = nbytes / self.timing.median * 1e-6
        return {
            **asdict(self.case),
            "sweep": self.sweep,
            "contender": self.contender,
            **self.timing.fields(),
            "kv_bytes": nbytes,
            "gbps": _significant(rate),
            "gflops": _significant(self.case.flops() / self.timing.median * 1e-6),
            "read_gbps": _significant(read),
            "share_of_read": _significant(rate / read),
        }


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


class Normal:
    """Random normal numbers without the time it takes to make many: one tile, repeated."""

    def __init__(self, device: torch.device) -> None:
        self._tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).to(device)

    def __call__(self, *shape: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=self._tile.device)
        flat, tile = out.view(-1), self._tile.to(dtype)
        for begin in range(0, flat.numel(), _TILE):
            part = flat[begin : begin + _TILE]
            part.copy_(tile[: part.numel()])
        return out


@dataclass(frozen=True)
class CacheInputs:
    """Queries packed ``(total, num_heads, head_dim)``, and copies of the keys and values.

    ``caches`` are onepass'; ``keys`` and ``values``, each ``(batch, num_heads_kv, seqlen_k, head_dim)`` in a float
    type, are for peers: the caches' own memory where these are contiguous and not quantized. ``plain`` is an array of
    rows that has as many bytes as the keys and values of all copies.
    """

    q: Tensor
    caches: Sequence[onepass.KVCache]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    plain: Sequence[Tensor]

    @classmethod
    def of(cls, case: CacheCase, device: torch.device) -> CacheInputs:
        normal = Normal(device)
        copies = max(1, -(-COLD_BYTES[device.type] // case.kv_bytes()))
        caches, keys, values = [], [], []
        peer_dtype = DTYPES[case.dtype if case.dtype in DTYPES else case.query_dtype]
        shape = (case.batch, case.num_heads_kv, case.seqlen_k, case.head_dim)
        for _ in range(copies):
            cache = _empty_cache(case, device)
            k, v = (normal(*shape, dtype=peer_dtype) for _ in range(2))
            cache.append(k, v)
            shared = cache.k.shape == k.shape and cache.k.dtype == k.dtype
            caches.append(cache)
            keys.append(cache.k if shared else k)
            values.append(cache.v if shared else v)
        q = normal(sum(case.query_lengths()), case.num_heads, case.head_dim, dtype=DTYPES[case.query_dtype])
        width = 4096
        rows = -(-case.kv_bytes() // (4 * width))
        return cls(q, caches, keys, values, [normal(rows, width, dtype=torch.float32) for _ in range(copies)])


def _empty_cache(case: CacheCase, device: torch.device) -> onepass.KVCache:
    quantized: Any = case.dtype if case.dtype not in DTYPES else None
    return onepass.KVCache(
        case.batch,
        case.seqlen_k,
        case.num_heads_kv,
        case.head_dim,
        dtype=DTYPES.get(case.dtype, torch.bfloat16),
        device=device,
        quantization=quantized,
        page_size=case.page_size,
    )


Step = Callable[[int], object]  # given the index of a copy


def read_by_product(inputs: CacheInputs) -> Step:
    """Reads as many bytes as the keys and values have: a matrix times a vector of ones."""
    ones = torch.ones(inputs.plain[0].shape[1], device=inputs.q.device)
    return lambda copy: inputs.plain[copy] @ ones


def read_by_sum(inputs: CacheInputs) -> Step:
    """The same by a sum. Which of the two is the quicker reader depends on the processor."""
    return lambda copy: inputs.plain[copy].sum()


def rotating(step: Step, copies: int, device: torch.device, graph_calls: int = 20) -> tuple[Callable[[], object], int]:
    """A call that takes the next copy each time, and how many steps it makes.

    On a GPU that is a CUDA graph of at least ``graph_calls`` steps, so that launching does not count.
    """
    if device.type != "cuda":
        state = [0]

        def call() -> object:
            state[0] = (state[0] + 1) % copies
            return step(state[0])

        return call, 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(0)
    torch.cuda.current_stream().wait_stream(stream)
    steps = max(graph_calls, copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(steps):
            step(index % copies)
    return graph.replay, steps
