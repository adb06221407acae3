"""Key/value caches and attention over them: decoding, speculative decoding, chunked prefill, and mixes of these.

A :class:`KVCache` owns the storage, contiguous or paged, in 16 or 32 bit, int8 or fp8; :func:`cached_attention` appends
new tokens and attends in one call. Storage alone is quantized: the result is that of exact attention over the
dequantized cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from onepass._library import call
from onepass._ops import _empty_in_order_of, _fake, _statistics_dtype, ops
from onepass.functional import AttentionResult, Window, as_score_dtype

Quantization = Literal["int8", "fp8_e4m3", "fp8_e5m2"]

_STORAGE = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# ScaleGranularity in include/onepass/kv_cache.h.
_NONE, _TENSOR, _TOKEN, _HEAD, _GROUP = range(5)


def _invalid(argument: str, received: Any, required: str) -> ValueError:
    return ValueError(f"KVCache: {argument}: got {received}; need {required}")


def _granularity(text: str) -> tuple[int, int]:
    """``(granularity, channels of a group)`` of ``"tensor" | "token" | "head" | "group:N"``."""
    name, _, group = text.partition(":")
    if name == "group" and group.isdigit() and int(group) > 0:
        return _GROUP, int(group)
    names = {"tensor": _TENSOR, "token": _TOKEN, "head": _HEAD}
    if text not in names:
        raise _invalid("scale_granularity", repr(text), '"tensor", "token", "head" or "group:N"')
    return names[text], 0


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
                raise _invalid(name, size, "at least 1")
        if quantization is None and dtype not in _FLOATS:
            raise _invalid("dtype", dtype, "float32, float16 or bfloat16 (or a quantization)")
        if quantization is not None and quantization not in _STORAGE:
            raise _invalid("quantization", repr(quantization), 'None, "int8", "fp8_e4m3" or "fp8_e5m2"')
        if page_size is not None and page_size < 1:
            raise _invalid("page_size", page_size, "at least 1, or None for a contiguous cache")
        if page_size is None and num_pages is not None:
            raise _invalid("num_pages", num_pages, "none without page_size")
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        blocks, tokens = batch, max_seqlen
        max_pages = 0
        if page_size is not None:
            max_pages = -(-max_seqlen // page_size)
            blocks, tokens = batch * max_pages if num_pages is None else num_pages, page_size
        storage = dtype if quantization is None else _STORAGE[quantization]
        self.k = torch.zeros((blocks, num_heads_kv, tokens, head_dim), dtype=storage, device=device)
        self.v = torch.zeros((blocks, num_heads_kv, tokens, head_dim_v), dtype=storage, device=device)
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
        cache._granularity, cache._group = (_NONE, 0) if scale_granularity is None else _granularity(scale_granularity)
        cache._host_seqlens, cache._host_table, cache._references = seqlens, None, None
        return cache

    def _set_scales(
        self, quantization: str | None, granularity: str, k_scale: float | None, v_scale: float | None
    ) -> None:
        self._granularity, self._group = _NONE, 0
        self.k_scale = self.v_scale = None
        given = k_scale is not None or v_scale is not None
        if quantization == "int8":
            self._granularity, self._group = _granularity(granularity)
            if self._granularity == _TENSOR and (k_scale is None or v_scale is None):
                raise _invalid("k_scale and v_scale", "none", "two numbers with one scale for the tensor")
        elif quantization is not None and given:
            self._granularity = _TENSOR
        if given and self._granularity != _TENSOR:
            raise _invalid("k_scale", k_scale, "none: tokens get scales of their own, or the storage needs none")
        if self._granularity != _NONE:
            self.k_scale = self._new_scale(self.k, 1.0 if k_scale is None else k_scale)
            self.v_scale = self._new_scale(self.v, 1.0 if v_scale is None else v_scale)

    def _new_scale(self, storage: Tensor, value: float) -> Tensor:
        blocks, heads, tokens, dim = storage.shape
        if self._granularity == _GROUP and dim % self._group:
            raise _invalid("scale_granularity", f"group:{self._group}", f"a divisor of head_dim {dim}")
        shape = {
            _TENSOR: (1,),
            _TOKEN: (blocks, tokens),
            _HEAD: (blocks, heads, tokens),
            _GROUP: (blocks, heads, tokens, dim // max(self._group, 1)),
        }[self._granularity]
        return torch.full(shape, value, dtype=torch.float32, device=storage.device)

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
            raise _invalid("sequence", sequence, f"0 to {self.batch - 1}")
        if not 0 <= length <= int(self.seqlens[sequence]):
            raise _invalid("length", length, f"0 to the {int(self.seqlens[sequence])} tokens of the sequence")
        self.seqlens[sequence] = length

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """``target``, freed first, begins with the first ``length`` tokens of ``source`` (default: all of them).

        Pages are shared; a shared page is copied when one of its sequences writes to it.
        """
        if self._references is None:
            raise ValueError("KVCache.fork: cache: got one that hands out no pages; need page_size")
        call(ops.page_pool_fork, *self._pool(), source, target, length)
        self._upload()

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
        sources, targets = call(ops.page_pool_reserve, *self._pool(), new)
        if sources.numel():
            sources, targets = sources.to(self.k.device), targets.to(self.k.device)
            for tensor in (self.k, self.v, self.k_scale, self.v_scale):
                if tensor is not None and tensor.shape[0] == self.k.shape[0]:
                    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
                    raw[targets] = raw[sources]
        if self._host_table is not self.page_table:
            assert self.page_table is not None
            assert self._host_table is not None
            self.page_table.copy_(self._host_table)
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
            self._granularity,
            self._group,
            self.first_key,
            self.batch_index,
        )


def cached_attention(
    q: Tensor,
    cache: KVCache,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    num_splits: int = 0,
    softmax_scale: float | None = None,
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_zero_for_future: bool = False,
    sinks: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    prob_threshold: float = 0.0,
    advance: bool = True,
    return_lse: bool = False,
) -> Any:
    """Exact attention of new queries over a cache. For inference: not differentiable.

    Args:
        q: ``(batch, num_heads, seqlen_q, head_dim)``, or packed ``(total_q, num_heads, head_dim)`` with
            ``cu_seqlens_q``: any mix of decode (one query), speculative tokens, chunked prefill and prefill.
        cache: holds the keys and values; query i of a sequence stands at position ``i + seqlen_k − seqlen_q``.
        cu_seqlens_q: int32 ``(batch + 1)``: bounds of each sequence's queries.
        max_seqlen_q: on CUDA a bound of the longest sequence of queries; default ``total_q``.
        causal: the last query sees every key, the one before it all but the last, and so on.
        k_new: appended first: ``(batch, num_heads_kv, tokens, head_dim)``, or packed like ``q``.
        v_new: likewise with ``head_dim_v``.
        num_splits: parts that a sequence's keys are split into and merged from exactly; 0: chosen for speed. With a
            fixed number a row's bits do not depend on what else is in the batch.
        softmax_scale: as for :func:`onepass.attention`, like the other score options.
        window: ``(left, right)``.
        softcap: 0: none.
        alibi_slopes: float32 ``(num_heads)`` or ``(batch, num_heads)``.
        alibi_zero_for_future: without a causal mask, leave future keys at 0.
        sinks: ``(num_heads)``: one more logit per head, in the denominator only.
        rotary_cos: rotary embedding of ``q`` and ``k_new`` (Su et al. 2021): ``(max_positions, pairs)``, float32 or
            the dtype of ``q``; positions count from the sequence's first valid token.
        rotary_sin: like ``rotary_cos``.
        rotary_interleaved: pairs are neighbouring channels (GPT-J) instead of two halves (Llama).
        prob_threshold: values whose weight relative to the row's largest is at most this are skipped, without
            renormalising; 0: exact.
        advance: with ``k_new``, count the new tokens in ``cache.seqlens``.
        return_lse: also return the natural logarithm of the softmax denominators, float32
            ``(batch, num_heads, seqlen_q)``, or packed ``(num_heads, total_q)``.

    Returns:
        ``(batch, num_heads, seqlen_q, head_dim_v)`` or ``(total_q, num_heads, head_dim_v)`` in the dtype of ``q``;
        with ``return_lse`` an :class:`onepass.AttentionResult`. Rows that see no key: out 0, lse −inf.

    Raises:
        ValueError: a shape or value that no backend could take, a full cache or a bad page; nothing has been written.
        TypeError: a dtype or device that the operation does not take.
        NotImplementedError: an input that requires a gradient, or a request that no backend here serves.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_new, v_new, sinks)):
        raise NotImplementedError(
            "cached_attention: q: got a tensor that requires a gradient; need torch.no_grad() (use onepass.attention "
            "to train)"
        )
    left, right = (None, None) if window is None else window
    if sinks is not None:
        sinks = as_score_dtype("cached_attention", "sinks", q, sinks)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(torch.float32)
    new = None
    if k_new is not None:
        new = cache._reserve(k_new, cu_seqlens_q, None)
    out, lse = call(
        ops.cached_attention,
        q,
        *cache._tensors(),
        cu_seqlens_q,
        0 if max_seqlen_q is None else max_seqlen_q,
        k_new,
        v_new,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        advance,
        causal,
        softmax_scale,
        left,
        right,
        softcap,
        alibi_slopes,
        alibi_zero_for_future,
        sinks,
        num_splits,
        prob_threshold,
        return_lse,
    )
    if advance:
        cache._advance(new)
    return AttentionResult(out, lse) if return_lse else out


def _empty_cached(a: Any) -> tuple[Tensor, Tensor]:
    rows = [a.q.shape[1], a.q.shape[0]] if a.q.dim() == 3 else list(a.q.shape[:3])
    out = _empty_in_order_of(a.q, [*a.q.shape[:-1], a.v.shape[-1]])
    return out, a.q.new_empty(rows if a.return_lse else [0], dtype=_statistics_dtype(a.q))


_fake("cached_attention", _empty_cached)
_fake("append_kv", lambda a: None)
