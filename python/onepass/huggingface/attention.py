"""The attention function that transformers' models call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass.decode import cached_attention
from onepass.functional import attention, varlen_attention
from onepass.huggingface.cache import CachedStates
from onepass.huggingface.masks import Visibility, VisibleKeys, Window


def onepass_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' calling convention (``AttentionInterface``).

    Args:
        query: (batch, num_heads, seqlen_q, head_dim).
        key, value: (batch, num_heads_kv, seqlen_k, head_dim), not repeated over the query heads of a group; those of an
            :class:`OnepassCache` are read where they are stored, except with a position bias, dropout, right padding or
            a mask without a description, which take dequantized copies.
        attention_mask: a :class:`VisibleKeys`; or a boolean mask (true: visible) or a float mask (added to the
            scores), broadcastable to (batch, num_heads, seqlen_q, seqlen_k); or None.
        sliding_window: tokens that a query sees, itself counted; used when no mask says it.
        softcap: cap·tanh(score/cap) when given. s_aux: (num_heads), sink logits. position_bias: broadcastable to
            (batch, num_heads, seqlen_q, seqlen_k), added to the scores and differentiable.
        alibi_slopes: float32 (num_heads), when ``position_bias`` is theirs but for a constant of each row; over an
            OnepassCache they replace it.
        cu_seq_lens_q, cu_seq_lens_k: int32 (sequences + 1), ends of packed sequences in a batch of one row.

    Returns:
        (batch, seqlen_q, num_heads, head_dim_v) and None: attention weights are never formed.
    """
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)

    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if isinstance(attention_mask, VisibleKeys):
        visibility = attention_mask.visibility
    else:
        visibility = _without_description(query, key, attention_mask, bool(is_causal), sliding_window)
    if key.shape[2] != visibility.seqlen_k or query.shape[2] != visibility.seqlen_q:
        raise ValueError(
            f"onepass.huggingface: attention_mask: got a mask for {visibility.seqlen_q} queries and "
            f"{visibility.seqlen_k} keys; need {query.shape[2]} and {key.shape[2]}"
        )

    packed: tuple[Tensor, Tensor, int | None, int | None] | None = None
    if visibility.cu_seqlens is not None:
        packed = (visibility.cu_seqlens, visibility.cu_seqlens, visibility.max_seqlen, visibility.max_seqlen)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None and not visibility.is_padded:
        packed = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)

    options: dict[str, Any] = {
        "causal": visibility.causal,
        "window": None if visibility.window == (None, None) else visibility.window,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    if isinstance(key, CachedStates) and isinstance(value, CachedStates):
        has_no_bias = position_bias is None or alibi_slopes is not None
        has_bounds_only = packed is None and visibility.dense is None and visibility.key_end is None
        if has_no_bias and has_bounds_only and dropout == 0.0 and visibility.keys_used == visibility.seqlen_k:
            return _cached(query, key, visibility, alibi_slopes, options), None
        key, value = key.dequantized(), value.dequantized()
    if packed is not None:
        return _packed(query, key, value, packed, position_bias, options), None

    if visibility.keys_used != visibility.seqlen_k:
        key, value = key[:, :, : visibility.keys_used], value[:, :, : visibility.keys_used]
        if position_bias is not None:
            position_bias = position_bias[..., : visibility.keys_used]
    bias = position_bias
    if visibility.dense is not None:
        mask_bias = visibility.bias(query.dtype)
        bias = mask_bias if bias is None else bias + mask_bias
    out = attention(query, key, value, bias=bias, key_begin=visibility.key_begin, key_end=visibility.key_end, **options)
    return out.transpose(1, 2).contiguous(), None


def _without_description(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, sliding_window: int | None
) -> Visibility:
    """The visibility of a call whose mask is None or a plain tensor.

    None means what it means to transformers' SDPA function: everything is visible, up to the diagonal if the module is
    causal; with more keys than queries the extra ones are a static cache's unused tail (an OnepassCache has none). One
    query sees every key.
    """
    (batch, _, seqlen_q, _), seqlen_k = query.shape, key.shape[2]
    if mask is not None:
        dense = mask[..., :seqlen_k]
        return Visibility(batch, seqlen_q, seqlen_k, seqlen_k, dense=dense)
    if isinstance(key, CachedStates):
        causal, keys_used = is_causal, seqlen_k
    else:
        causal = is_causal and seqlen_q > 1
        keys_used = min(seqlen_q, seqlen_k) if causal else seqlen_k
    window: Window = (None, None)
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
    return Visibility(batch, seqlen_q, seqlen_k, keys_used, causal, window)


def _cached(
    query: Tensor,
    states: CachedStates,
    visibility: Visibility,
    alibi_slopes: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention over the stored keys and values themselves."""
    layer, cache, left = states.layer, states.layer.cache, visibility.window[0]
    layer.sees(None if left is None else left + 1)
    cache.first_key = visibility.key_begin
    if layer.forgotten and cache.first_key is not None:
        cache.first_key = (cache.first_key - layer.forgotten).clamp(min=0)
    scored = {name: value for name, value in options.items() if name != "dropout_p"}
    return cached_attention(query, cache, alibi_slopes=alibi_slopes, **scored).transpose(1, 2).contiguous()


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: tuple[Tensor, Tensor, int | None, int | None],
    position_bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Rows that hold several sequences: (batch, heads, seqlen, dim) seen as (batch · seqlen, heads, dim)."""
    if position_bias is not None:
        raise NotImplementedError("onepass.huggingface: position_bias: got one with packed sequences; need None")
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = packed
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q.to(torch.int32),
        cu_seqlens_k.to(torch.int32),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **options,
    )
    return out.unflatten(0, (query.shape[0], query.shape[2]))
