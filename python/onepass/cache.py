"""Key/value caches: storage, contiguous or paged, in 16 or 32 bit, int8 or fp8 (:func:`onepass.cached_attention`
attends over them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from onepass import _cache_storage
from onepass._cache_scales import Granularity, invalid, new_scale, parse_granularity
from onepass._library import call
from onepass._ops import _fake, ops

Quantization = Literal["int8", "fp8_e4m3", "fp8_e5m2"]

_STORAGE = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class KVCache:
    """Keys and values of a batch of sequences that grow.

    Args:
        batch: sequences.
        max_seqlen: tokens that each sequence may have.
        num_heads_kv: key/value heads.
        head_dim: channels of a key, at most 512.
        head_dim_v: channels of a value; default ``head_dim``.
        dtype: of the storage when it is not quantized.
        device: of the storage.
        quantization: store int8 (symmetric) or fp8 instead of ``dtype``.
        scale_granularity: for int8, what shares one scale: ``"tensor"`` (given by ``k_scale`` and ``v_scale``),
            ``"token"`` (all heads of a token), ``"head"`` (a head of a token), ``"group:N"`` (N channels of that).
            All but ``"tensor"`` scale each token as it comes: ``max(absmax / 127, 1e-5)``.
        page_size: tokens of a page: makes the cache paged, with pages handed out as sequences grow.
        num_pages: of a paged cache; default: as many as all sequences at ``max_seqlen`` need.
        k_scale: float, with per-tensor int8 (required) and fp8 (default 1): stored · scale = value.
        v_scale: likewise.

    Attributes:
        k: ``(batch, num_heads_kv, max_seqlen, head_dim)``, or ``(num_pages, num_heads_kv, page_size, head_dim)``.
        v: likewise with ``head_dim_v``.
        seqlens: int32 ``(batch)``: tokens stored for each sequence.
        page_table: int32 ``(batch, max_pages)`` of a paged cache, else ``None``.
        first_key: ``None`` or int32 ``(batch)``: the first valid token of each sequence (left padding).
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    page_table: Tensor | None
    first_key: Tensor | None
    batch_index: Tensor | None
    _granularity: Granularity
    _group: int
    # Of a paged cache whose pages this object hands out: table, lengths and references on the host, where this is
    # decided. On the CPU table and lengths are page_table and seqlens themselves.
    _host_table: Tensor | None
    _host_seqlens: Tensor
    _references: Tensor | None

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        quantization: Quantization | None = None,
        scale_granularity: str = "head",
        page_size: int | None = None,
        num_pages: int | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> None:
        sizes = {"batch": batch, "max_seqlen": max_seqlen, "num_heads_kv": num_heads_kv, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise invalid(name, size, "at least 1")
        if quantization is None and dtype not in _FLOATS:
            raise invalid("dtype", dtype, "float32, float16 or bfloat16 (or a quantization)")
        if quantization is not None and quantization not in _STORAGE:
            raise invalid("quantization", repr(quantization), 'None, "int8", "fp8_e4m3" or "fp8_e5m2"')
        if page_size is not None and page_size < 1:
            raise invalid("page_size", page_size, "at least 1, or None for a contiguous cache")
        if page_size is None and num_pages is not None:
            raise invalid("num_pages", num_pages, "none without page_size")
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        blocks, tokens = batch, max_seqlen
        max_pages = 0
        if page_size is not None:
            max_pages = -(-max_seqlen // page_size)
            blocks, tokens = batch * max_pages if num_pages is None else num_pages, page_size
        storage = dtype if quantization is None else _STORAGE[quantization]
        self.k = _cache_storage.zeros((blocks, num_heads_kv, tokens, head_dim), storage, device)
        self.v = _cache_storage.zeros((blocks, num_heads_kv, tokens, head_dim_v), storage, device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.first_key = self.batch_index = self.page_table = None
        self._set_scales(quantization, scale_granularity, k_scale, v_scale)
        self._host_seqlens, self._host_table, self._references = self.seqlens, None, None
        if page_size is not None:
            self.page_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
            self._host_table = self.page_table
            self._references = torch.zeros(blocks, dtype=torch.int32)
            if self.k.device.type != "cpu":  # pages are handed out on the host
                self._host_table = torch.full((batch, max_pages), -1, dtype=torch.int32)
                self._host_seqlens = torch.zeros(batch, dtype=torch.int32)

    @classmethod
    def from_tensors(
        cls,
        k: Tensor,
        v: Tensor,
        seqlens: Tensor,
        *,
        page_table: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        scale_granularity: str | None = None,
        first_key: Tensor | None = None,
        batch_index: Tensor | None = None,
    ) -> KVCache:
        """A cache over tensors that someone else manages (no pages are handed out: ``page_table`` must be filled).

        Args:
            k: ``(rows, num_heads_kv, capacity, head_dim)``, or paged
                ``(num_pages, num_heads_kv, page_size, head_dim)``; strides are free but for a contiguous last
                dimension, so token-major storage is a transposed view.
            v: likewise with ``head_dim_v``.
            seqlens: int32 ``(batch)``.
            page_table: int32 ``(batch, max_pages)``.
            k_scale: float32 scales of quantized storage, shaped as ``scale_granularity`` says: ``(1)``,
                ``(rows, tokens)``, ``(rows, num_heads_kv, tokens)`` or ``(rows, num_heads_kv, tokens, head_dim / N)``.
            v_scale: likewise.
            scale_granularity: as for :class:`KVCache`; ``None`` without scales.
            first_key: int32 ``(batch)``: first valid token (left padding).
            batch_index: int32 ``(batch)``: the row that serves each sequence; contiguous storage only.
        """
        cache = cls.__new__(cls)
        cache.k, cache.v, cache.seqlens, cache.page_table = k, v, seqlens, page_table
        cache.k_scale, cache.v_scale, cache.first_key, cache.batch_index = k_scale, v_scale, first_key, batch_index
        cache._granularity, cache._group = (
            (Granularity.NONE, 0) if scale_granularity is None else parse_granularity(scale_granularity)
        )
        cache._host_seqlens, cache._host_table, cache._references = seqlens, None, None
        return cache

    def _set_scales(
        self, quantization: str | None, granularity: str, k_scale: float | None, v_scale: float | None
    ) -> None:
        self._granularity, self._group = Granularity.NONE, 0
        self.k_scale = self.v_scale = None
        given = k_scale is not None or v_scale is not None
        if quantization == "int8":
            self._granularity, self._group = parse_granularity(granularity)
            if self._granularity == Granularity.TENSOR and (k_scale is None or v_scale is None):
                raise invalid("k_scale and v_scale", "none", "two numbers with one scale for the tensor")
        elif quantization is not None and given:
            self._granularity = Granularity.TENSOR
        if given and self._granularity != Granularity.TENSOR:
            raise invalid("k_scale", k_scale, "none: tokens get scales of their own, or the storage needs none")
        if self._granularity != Granularity.NONE:
            self.k_scale = new_scale(self.k, self._granularity, self._group, 1.0 if k_scale is None else k_scale)
            self.v_scale = new_scale(self.v, self._granularity, self._group, 1.0 if v_scale is None else v_scale)

    @property
    def paged(self) -> bool:
        return self.page_table is not None

    @property
    def batch(self) -> int:
        return self.seqlens.shape[0]

    @property
    def max_seqlen(self) -> int:
        """Tokens that a sequence may have."""
        if self.page_table is None:
            return self.k.shape[2]
        return self.page_table.shape[1] * self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, scales included."""
        tensors = (self.k, self.v, self.k_scale, self.v_scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    @property
    def free_pages(self) -> int:
        """Pages that belong to no sequence."""
        if self._references is None:
            raise ValueError("KVCache.free_pages: cache: got one that hands out no pages; need page_size")
        return int((self._references == 0).sum())

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        seqlens: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
    ) -> None:
        """Stores new tokens behind those that each sequence has, quantizing on the way in.

        Args:
            k: ``(batch, num_heads_kv, tokens, head_dim)``, or packed ``(total, num_heads_kv, head_dim)``.
            v: likewise with ``head_dim_v``.
            seqlens: ``(batch)``: how many of the tokens count for each sequence; default all.
            cu_seqlens: int32 ``(batch + 1)`` for packed tokens.
            rotary_cos: rotate the keys first: ``(max_positions, pairs)``, float32 or the dtype of ``k``; positions
                count from the sequence's first valid token.
            rotary_sin: like ``rotary_cos``.
            rotary_interleaved: pairs are neighbouring channels (GPT-J) instead of two halves (Llama).

        Raises:
            ValueError: a sequence would outgrow the cache; nothing has been written.
            torch.OutOfMemoryError: too few free pages; nothing has been written.
        """
        counts = None
        if seqlens is not None:
            counts = torch.as_tensor(seqlens, dtype=torch.int32, device=self.k.device)
        new = self._reserve(k, cu_seqlens, counts)
        call(
            ops.append_kv, *self._tensors(), k, v, cu_seqlens, counts, rotary_cos, rotary_sin, rotary_interleaved, True
        )
        self._advance(new)

    def reset(self) -> None:
        """Forgets all tokens; pages become free."""
        for sequence in range(self.batch):
            self.free(sequence)

    def free(self, sequence: int) -> None:
        """Forgets one sequence; its pages become free unless another shares them."""
        self.truncate(sequence, 0)

    def truncate(self, sequence: int, length: int) -> None:
        """Keeps the first ``length`` tokens of a sequence (rejected speculative tokens, for example)."""
        if self._references is not None:
            call(ops.page_pool_truncate, *self._pool(), sequence, length)
            self._upload()
            return
        if not 0 <= sequence < self.batch:
            raise invalid("sequence", sequence, f"0 to {self.batch - 1}")
        if not 0 <= length <= int(self.seqlens[sequence]):
            raise invalid("length", length, f"0 to the {int(self.seqlens[sequence])} tokens of the sequence")
        self.seqlens[sequence] = length

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """``target``, freed first, begins with the first ``length`` tokens of ``source`` (default: all of them).

        Pages are shared; a shared page is copied when one of its sequences writes to it.
        """
        if self._references is None:
            raise ValueError("KVCache.fork: cache: got one that hands out no pages; need page_size")
        call(ops.page_pool_fork, *self._pool(), source, target, length)
        self._upload()

    def select(self, index: Tensor) -> None:
        """Sequence b becomes what sequence ``index[b]`` holds, in place (beam search, resampling).

        Args:
            index: integers ``(new batch)``; the batch may become larger or smaller. Sequences share pages until one of
                them writes to a page (a pool with pages for all grows with the batch); a contiguous cache copies its
                tokens.
        """
        _cache_storage.select(self, index)

    def grow(self, max_seqlen: int) -> None:
        """Makes room for ``max_seqlen`` tokens of every sequence: a contiguous cache moves to larger storage, a paged
        one gets the additional pages of all its sequences."""
        _cache_storage.grow(self, max_seqlen)

    def dense(self, dtype: torch.dtype = torch.float32, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Dequantized copies of keys and values, ``(batch, num_heads_kv, length, dim)``;
        ``length``: default the longest sequence's. What lies behind a sequence's own tokens is undefined."""
        return _cache_storage.dense(self, dtype, length)

    def __repr__(self) -> str:
        kind = f"pages of {self.k.shape[2]}" if self.paged else "contiguous"
        return (
            f"KVCache(batch={self.batch}, max_seqlen={self.max_seqlen}, num_heads_kv={self.k.shape[1]}, "
            f"head_dim={self.k.shape[3]}, {self.k.dtype}, {kind}, {self.nbytes} bytes)"
        )

    # Tokens per sequence that a call adds, and room for them in a paged cache. None: not needed on the host.
    def _reserve(self, k: Tensor, cu_seqlens: Tensor | None, counts: Tensor | None) -> Tensor | None:
        if self._references is None:
            return None
        if cu_seqlens is not None:
            new = cu_seqlens.diff().to("cpu", torch.int64)
        elif counts is not None:
            new = counts.to("cpu", torch.int64)
        else:
            new = torch.full((self.batch,), k.shape[2] if k.dim() == 4 else 0, dtype=torch.int64)
        on_device = self._host_table is not self.page_table
        before = self._host_table.clone() if on_device and self._host_table is not None else None
        sources, targets = call(ops.page_pool_reserve, *self._pool(), new)
        if sources.numel():
            sources, targets = sources.to(self.k.device), targets.to(self.k.device)
            for tensor in (self.k, self.v, self.k_scale, self.v_scale):
                if tensor is not None and tensor.shape[0] == self.k.shape[0]:
                    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
                    raw[targets] = raw[sources]
        if before is not None and self._host_table is not None and not torch.equal(before, self._host_table):
            assert self.page_table is not None
            self.page_table.copy_(self._host_table)  # most steps begin no page, and a copy waits for the device
        return new

    def _advance(self, new: Tensor | None) -> None:
        if new is not None and self._host_seqlens is not self.seqlens:
            self._host_seqlens += new.to(torch.int32)

    def _upload(self) -> None:
        if self._host_seqlens is not self.seqlens:
            assert self.page_table is not None
            assert self._host_table is not None
            self.seqlens.copy_(self._host_seqlens)
            self.page_table.copy_(self._host_table)

    def _pool(self) -> tuple[Any, ...]:
        return (self._host_table, self._host_seqlens, self._references, self.k.shape[2])

    def _tensors(self) -> tuple[Any, ...]:
        return (
            self.k,
            self.v,
            self.page_table,
            self.seqlens,
            self.k_scale,
            self.v_scale,
            int(self._granularity),
            self._group,
            self.first_key,
            self.batch_index,
        )


_fake("append_kv", lambda a: None)
