"""``scaled_dot_product_attention`` with the signature and semantics of ``torch.nn.functional``'s."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from onepass import functional
from onepass._ops import Score, ScoreTensors

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's ``scaled_dot_product_attention``, argument for argument.

    Args:
        query: ``(*batch, [num_heads,] seqlen_q, head_dim)``, any number of leading dimensions.
        key: ``(*batch, [num_heads_kv,] seqlen_k, head_dim)``; leading dimensions broadcast.
        value: ``(*batch, [num_heads_kv,] seqlen_k, head_dim_v)``.
        attn_mask: broadcastable to ``(*batch, [num_heads,] seqlen_q, seqlen_k)``. bool: True takes part; float: added
            to the logits, differentiable. Not together with ``is_causal``.
        dropout_p: applied whenever > 0, as PyTorch does.
        is_causal: query i sees key j iff j ≤ i (top-left aligned, unlike :func:`onepass.attention`).
        scale: of the logits, default ``1/√head_dim``.
        enable_gqa: allow fewer key/value heads (the third dimension from the end) than query heads.

    Returns:
        ``(*batch, [num_heads,] seqlen_q, head_dim_v)``. Rows whose keys are all masked are 0, as in PyTorch ≥ 2.5.

    Masks never leave the fast path: a bool mask of keys only (one row for all queries: padding) becomes bounds of the
    visible keys where these are contiguous (CPU), and any other a bias of the mask's own size.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`onepass.attention`.
    """
    if (
        attn_mask is None
        and not enable_gqa
        and not dropout_p
        and query.dim() == key.dim() == value.dim() == 4
        and query.size(1) == key.size(1) == value.size(1)
        and query.size(0) == key.size(0) == value.size(0)
        and (not is_causal or query.size(2) == key.size(2))
    ):
        out: Tensor = functional.attention(query, key, value, causal=is_causal, softmax_scale=scale)
        return out
    if attn_mask is not None and is_causal:
        raise ValueError(f"{_NAME}: attn_mask: got a mask with is_causal=True; need one of the two")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{_NAME}: {name}: got {tensor.dim()} dimensions; need at least 2")
    batch, heads = _leading_shape(query, key, value, enable_gqa)
    kv_heads = key.shape[-3] if enable_gqa and key.dim() > 2 else heads
    lowered = ScoreTensors() if attn_mask is None else _lowered_mask(attn_mask, batch, heads, query, key)
    result = functional.attention_with_state(
        _as_four(query, batch, heads),
        _as_four(key, batch, kv_heads),
        _as_four(value, batch, kv_heads),
        lowered,
        Score(causal=is_causal, softmax_scale=scale, dropout_p=dropout_p, top_left=True),
    ).out
    leading = () if query.dim() == key.dim() == value.dim() == 2 else (*batch, heads)
    return result.reshape(*leading, *result.shape[-2:])


def _leading_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[tuple[int, ...], int]:
    """The broadcast batch dimensions (before the heads) and the number of query heads."""

    def split(tensor: Tensor) -> tuple[tuple[int, ...], int]:
        return tuple(tensor.shape[:-3]), tensor.shape[-3] if tensor.dim() > 2 else 1

    (q_batch, q_heads), (k_batch, k_heads), (v_batch, v_heads) = split(query), split(key), split(value)
    try:
        batch = tuple(torch.broadcast_shapes(q_batch, k_batch, v_batch))
        heads = q_heads if enable_gqa else torch.broadcast_shapes((q_heads,), (k_heads,), (v_heads,))[0]
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: key, value: got {tuple(key.shape)} and {tuple(value.shape)} beside query {tuple(query.shape)}; "
            "need leading dimensions that broadcast (or enable_gqa=True for fewer key/value heads)"
        ) from None
    return batch, heads


def _as_four(tensor: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """``(batch, heads, seqlen, dim)``: a view, unless several broadcast batch dimensions must be merged."""
    if tensor.dim() == 2:
        tensor = tensor.unsqueeze(0)
    expanded = tensor.expand(*batch, heads, *tensor.shape[-2:])
    return expanded if len(batch) == 1 else expanded.reshape(-1, heads, *tensor.shape[-2:])


def _lowered_mask(mask: Tensor, batch: tuple[int, ...], heads: int, query: Tensor, key: Tensor) -> ScoreTensors:
    """The mask as bounds of the visible keys, or as a bias ``(batch|1, heads|1, seqlen_q|1, seqlen_k|1)``."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{_NAME}: attn_mask: got {mask.dtype}; need bool or a floating-point dtype")
    scores = (*batch, heads, query.shape[-2], key.shape[-2])
    if query.dim() == 2:
        scores = scores[-2:]
    try:
        broadcasts = torch.broadcast_shapes(mask.shape, scores) == scores
    except RuntimeError:
        broadcasts = False
    if not broadcasts:
        raise ValueError(f"{_NAME}: attn_mask: got shape {tuple(mask.shape)}; need one that broadcasts to {scores}")
    mask = mask[(None,) * max(0, 4 - mask.dim())]
    leading = mask.shape[:-3]
    if len(leading) != 1 or len(batch) != 1:  # fold the batch dimensions, one if none varies
        shared = all(size == 1 for size in leading)
        mask = mask.reshape(1, *mask.shape[-3:]) if shared else mask.expand(*batch, -1, -1, -1).flatten(0, -4)
    if mask.dtype != torch.bool:
        return ScoreTensors(bias=mask)
    if mask.shape[1] == mask.shape[2] == 1 and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = _contiguous_bounds(mask[:, 0, 0])
        if bounds is not None:
            begin, end = (bound.expand(math.prod(batch)).contiguous() for bound in bounds)
            return ScoreTensors(key_begin=begin, key_end=end)
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
    return ScoreTensors(bias=bias.masked_fill_(mask.logical_not(), -torch.inf))


def _contiguous_bounds(visible: Tensor) -> tuple[Tensor, Tensor] | None:
    """int32 (begin, end) of the True run in each row of ``(batch, seqlen_k)``; None when a row has several."""
    count = visible.sum(-1, dtype=torch.int32)
    begin = visible.int().argmax(-1).int()
    last = visible.shape[-1] - visible.flip(-1).int().argmax(-1).int()
    if visible.shape[-1] == 0 or bool((count > 0).logical_and(last - begin != count).any()):
        return None
    return begin, begin + count
