"""The functions of ``flag_attn`` (FlagAttention) with their argument names, order and results.

    from onepass.compat import flag_attn

Tensors are ``(batch, num_heads, seqlen, headdim)``; causal masks are aligned bottom-right. The CPU, float32, any
headdim up to 256 (512 over a cache), any page size and a headdim of the values of its own come on top. What differs:
rows that see no key get a log normalizer of −inf and an output of 0, and dropout draws onepass's mask (see
:func:`onepass.compat.flag_attn.testing.recompute_mask`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass import functional
from onepass import piecewise as _piecewise
from onepass._inputs import draw_dropout_state
from onepass._library import call
from onepass._ops import Score, ScoreTensors, ops
from onepass.cache import KVCache
from onepass.compat.flag_attn import testing
from onepass.decode import cached_attention

__all__ = [
    "flash_attention",
    "flash_attention_split_kv",
    "paged_attention",
    "piecewise_attention",
    "testing",
    "total_attention",
]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    dropout_p: float = 0.0,
    return_log_normalizer: bool = False,
    return_total_attention: bool = False,
    return_seed_offset: bool = False,
) -> Any:
    """Exact attention, differentiable.

    Args:
        q: ``(batch, num_heads, seqlen_q, headdim)``.
        k: ``(batch, num_heads_k, seqlen_k, headdim)``; ``num_heads`` is a multiple of ``num_heads_k``.
        v: ``(batch, num_heads_k, seqlen_k, headdim)``.
        causal: query i sees key j iff ``j ≤ i + seqlen_k − seqlen_q``.
        sm_scale: default ``1/√headdim``.
        dropout_p: probability of dropping an attention weight.
        return_log_normalizer: the natural logarithm of the softmax denominators, float32
            ``(batch, num_heads, seqlen_q)``.
        return_total_attention: the sum over queries of the attention weights before dropout, float32
            ``(batch, num_heads, seqlen_k)``.
        return_seed_offset: the two integers that fix the dropout mask.

    Returns:
        ``(batch, num_heads, seqlen_q, headdim)``; with any ``return_*`` flag the five of ``(out, log_normalizer,
        total_attention, seed, offset)``, ``None`` where not asked for (seed and offset also without dropout).

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`onepass.attention`.
    """
    if not (dropout_p or return_log_normalizer or return_total_attention or return_seed_offset):
        return functional.attention(q, k, v, causal=causal, softmax_scale=sm_scale)
    state = draw_dropout_state(q.device) if dropout_p > 0.0 else None
    out, log_normalizer, total = functional.attention_with_state(
        q,
        k,
        v,
        ScoreTensors(dropout_state=state),
        Score(causal, sm_scale, dropout_p),
        return_lse=return_log_normalizer,
        return_total_attention=return_total_attention,
    )
    if not (return_log_normalizer or return_total_attention or return_seed_offset):
        return out
    seed, offset = state.tolist() if state is not None and return_seed_offset else (None, None)
    return out, log_normalizer, total, seed, offset


def flash_attention_split_kv(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float | None = None
) -> Tensor:
    """:func:`flash_attention` of few queries over many keys, which are split among threads or blocks and merged
    exactly. :func:`flash_attention` chooses the same kernels by itself.
    """
    return functional.attention(q, k, v, causal=causal, softmax_scale=sm_scale)


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    causal: bool = False,
    sm_scale: float | None = None,
) -> Tensor:
    """:func:`onepass.piecewise_attention`: the logit is that of (q2, k2) where the distance of query and key is at
    least ``dist_threshold``, of (q1, k1) elsewhere; differentiable.

    Args:
        q1, q2: ``(batch, num_heads, seqlen_q, headdim)``.
        k1, k2: ``(batch, num_heads_k, seqlen_k, headdim)``.
        v: ``(batch, num_heads_k, seqlen_k, headdim)``.
        dist_threshold: in tokens, counted from ``i + seqlen_k − seqlen_q``.
        sm_scale: default ``1/√headdim``.
    """
    return _piecewise.piecewise_attention(q1, k1, q2, k2, v, dist_threshold, causal=causal, softmax_scale=sm_scale)


@torch.no_grad()
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    attn_scale: float,
    max_context_len: int,
    num_splits: int = 0,
) -> Tensor:
    """One query a sequence over a paged cache. Not differentiable.

    Args:
        query: ``(num_seqs, num_heads, headdim)``.
        key_cache: ``(num_blocks, num_heads_k, block_size, headdim)``.
        value_cache: likewise.
        context_lens: ``(num_seqs)`` integers: tokens of each sequence.
        block_tables: ``(num_seqs, max_num_blocks_per_seq)`` integers.
        attn_scale: factor of the logits.
        max_context_len: bound of ``context_lens``.
        num_splits: parts that the tokens of a sequence are split into; 0: chosen for speed.

    Returns:
        ``(num_seqs, num_heads, headdim)``.

    Raises:
        ValueError: a length beyond ``max_context_len`` or the blocks, or a block that does not exist.
    """
    blocks = -(-max_context_len // max(key_cache.shape[2], 1))
    table = block_tables[:, :blocks].to(torch.int32).contiguous()
    cache = KVCache.from_tensors(key_cache, value_cache, context_lens.to(torch.int32), page_table=table)
    out: Tensor = cached_attention(query.unsqueeze(2), cache, softmax_scale=attn_scale, num_splits=num_splits)
    return out.squeeze(2)


@torch.no_grad()
def total_attention(
    q: Tensor,
    k: Tensor,
    l: Tensor,  # noqa: E741  (the original's name)
    causal: bool = False,
    sm_scale: float | None = None,
) -> Tensor:
    """The sum over queries of the attention weights, from a given log normalizer. Not differentiable.

    Args:
        q: ``(batch, num_heads, seqlen_q, headdim)``.
        k: ``(batch, num_heads_k, seqlen_k, headdim)``.
        l: float32 ``(batch, num_heads, seqlen_q)``.
        sm_scale: default ``1/√headdim``.

    Returns:
        float32 ``(batch, num_heads, seqlen_k)``.
    """
    total: Tensor = call(ops.total_attention, q, k, l, causal, sm_scale)
    return total
