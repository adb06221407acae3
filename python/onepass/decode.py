"""Attention over key/value caches: decoding, speculative decoding, chunked prefill, and mixes of these in one call.

Storage alone is quantized: the result is that of exact attention over the dequantized cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass._inputs import Window, as_score_dtype
from onepass._library import call
from onepass._ops import _empty_in_order_of, _fake, _statistics_dtype, ops
from onepass.cache import KVCache
from onepass.functional import AttentionResult


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
