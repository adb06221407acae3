"""``flash_attn_with_kvcache`` and paged keys of ``flash_attn_varlen_func``: FlashAttention-2's calls over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onepass._inputs import Window
from onepass.cache import KVCache
from onepass.decode import cached_attention

_Score = tuple[float | None, bool, tuple[int, int], float, Tensor | None]


def window(window_size: tuple[int, int]) -> Window | None:
    """FlashAttention's window (−1: unbounded) in onepass' form."""
    left, right = (None if side < 0 else side for side in window_size)
    return None if left is None and right is None else (left, right)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, into which new tokens are written first. Not differentiable.

    Args:
        q: ``(batch, seqlen, nheads, headdim)``.
        k_cache: ``(batch_cache, seqlen_cache, nheads_k, headdim)``, or with ``block_table`` pages
            ``(num_blocks, page_block_size, nheads_k, headdim)`` of any size.
        v_cache: likewise.
        k: ``(batch, seqlen_new, nheads_k, headdim)``: written behind the ``cache_seqlens`` tokens of each sequence,
            which the caller advances.
        v: likewise.
        rotary_cos: ``(seqlen_ro, rotary_dim / 2)``: rotary embedding of k, at positions ``cache_seqlens + i``, and of
            q, likewise if causal or local, else all at ``cache_seqlens``. Only with k and v.
        rotary_sin: like ``rotary_cos``.
        cache_seqlens: int or int32 ``(batch)``: tokens in the cache; default all of ``seqlen_cache``.
        cache_batch_idx: int32 ``(batch)``: the row of the cache that serves each sequence.
        cache_leftpad: int32 ``(batch)``: index of each sequence's first valid token.
        block_table: int32 ``(batch, max_num_blocks_per_seq)``.
        rotary_interleaved: pairs are neighbouring channels instead of two halves.
        num_splits: parts that the keys are split into; 0: chosen for speed.
        return_softmax_lse: return ``(out, softmax_lse)``.

    The other options are those of :func:`onepass.compat.flash_attn.flash_attn_func`.

    Returns:
        out ``(batch, seqlen, nheads, headdim)``; ``softmax_lse`` is float32 ``(batch, nheads, seqlen)``.

    Raises:
        ValueError, TypeError: as :func:`onepass.cached_attention`; nothing has been written.
    """
    name = "flash_attn_with_kvcache"
    batch, device = q.shape[0], q.device
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k, v: got one of the two; need both or none")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{name}: rotary_cos: got one without k and v; need them, too")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{name}: cache_seqlens: got none with k and v; need the number of tokens before them")
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)
    cache = KVCache.from_tensors(
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        cache_seqlens,
        page_table=block_table,
        first_key=cache_leftpad,
        batch_index=cache_batch_idx,
    )
    is_local = causal or window_size != (-1, -1)
    if rotary_cos is not None and rotary_sin is not None and k is not None:
        # The kernel rotates query i at the position of its key, counted from the first valid token.
        in_kernel = cache_leftpad is None and q.shape[1] == k.shape[1] and (is_local or q.shape[1] == 1)
        if not in_kernel:
            q = _rotated(q, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, step=int(is_local))
            k = _rotated(k, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, step=1)
            rotary_cos = rotary_sin = None
    result = cached_attention(
        q.transpose(1, 2),
        cache,
        causal=causal,
        k_new=None if k is None else k.transpose(1, 2),
        v_new=None if v is None else v.transpose(1, 2),
        num_splits=num_splits,
        softmax_scale=softmax_scale,
        window=window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        advance=False,
        return_lse=return_softmax_lse,
    )
    return (result.out.transpose(1, 2), result.lse) if return_softmax_lse else result.transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool, step: int) -> Tensor:
    """``x`` (batch, seqlen, heads, dim), token i turned by the angles of row ``first + step · i`` of the tables."""
    seqlen, pairs = x.shape[1], cos.shape[1]
    positions = first.long()[:, None] + step * torch.arange(seqlen, device=x.device)
    if x.device.type == "cpu" and int(positions.max()) >= cos.shape[0]:
        raise ValueError(
            f"flash_attn_with_kvcache: rotary_cos: got {cos.shape[0]} positions; need {int(positions.max()) + 1}"
        )
    cos, sin = (table[positions, None].float() for table in (cos, sin))
    first_half = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second_half = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = x[..., first_half].float(), x[..., second_half].float()
    out = x.clone()
    out[..., first_half], out[..., second_half] = (a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)
    return out


@torch.no_grad()
def paged_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    score: _Score,
    return_lse: bool,
) -> Any:
    """Packed queries over pages (num_blocks, page_block_size, nheads_k, headdim) that hold whole sequences."""
    softmax_scale, causal, window_size, softcap, alibi_slopes = score
    lengths = cu_seqlens_k.diff().to(torch.int32)
    cache = KVCache.from_tensors(k.transpose(1, 2), v.transpose(1, 2), lengths, page_table=block_table)
    result = cached_attention(
        q,
        cache,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_lse,
    )
    return (result.out, result.lse, None) if return_lse else result
