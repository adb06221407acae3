"""piecewise_attention: two query/key pairs, chosen by distance, under one softmax."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from onepass._inputs import autocast, check_tensors, distinct, needs_gradient
from onepass._library import call
from onepass._ops import ops
from onepass.autograd import PiecewiseAttention, differentiable
from onepass.functional import AttentionResult


@overload
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[True],
) -> AttentionResult: ...
def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | AttentionResult:
    """Attention whose logits come from one of two query/key pairs, by distance; differentiable.

    With ``i' = i + seqlen_k − seqlen_q`` the logit of query i and key j is ``softmax_scale · q2 @ k2`` where
    ``i' − j ≥ dist_threshold`` and ``softmax_scale · q1 @ k1`` elsewhere. The method is FlagAttention's, for models
    whose rotary embedding changes its base beyond the length that they were trained on.

    Args:
        q1, q2: ``(batch, num_heads, seqlen_q, head_dim)`` of one dtype, as for :func:`attention`.
        k1, k2: ``(batch, num_heads_kv, seqlen_k, head_dim)``; ``num_heads`` is a multiple of ``num_heads_kv``.
        v: ``(batch, num_heads_kv, seqlen_k, head_dim_v)``.
        dist_threshold: in tokens, any integer: 0 or less takes the second pair for every past key, more than
            ``seqlen_k`` never.
        causal: query i sees key j iff ``j ≤ i'``.
        softmax_scale: factor of the logits, default ``1/√head_dim``.
        return_lse: also return the natural logarithm of the softmax denominators, float32
            ``(batch, num_heads, seqlen_q)``; differentiable.

    Returns:
        ``(batch, num_heads, seqlen_q, head_dim_v)`` in the dtype of ``q1`` (the autocast dtype under autocast); with
        ``return_lse`` an :class:`AttentionResult`. Time and memory are those of :func:`attention`: only the blocks that
        the threshold cuts are scored by both pairs.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`attention`.
    """
    check_tensors("piecewise_attention", q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    if not isinstance(dist_threshold, int | torch.SymInt):
        received = type(dist_threshold).__name__
        raise TypeError(f"piecewise_attention: dist_threshold: got {received}; need an int")
    operands = autocast(q1, k1, q2, k2, v)
    if needs_gradient(*operands):
        arguments = (*distinct(*operands), dist_threshold, causal, softmax_scale, return_lse)
        out, lse = differentiable(PiecewiseAttention, *arguments)
    else:
        out, lse = call(ops.piecewise_attention, *operands, dist_threshold, causal, softmax_scale)
    return AttentionResult(out, lse) if return_lse else out
