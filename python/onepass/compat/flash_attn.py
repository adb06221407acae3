"""The functions of ``flash_attn`` (FlashAttention-2) with their argument names, order and layouts.

    from onepass.compat.flash_attn import flash_attn_func

Tensors are ``(batch, seqlen, nheads, headdim)``, or packed ``(total, nheads, headdim)``; a window of −1 is unbounded;
causal masks are aligned bottom-right. The CPU, float32, headdim up to 256 (512 over a cache) and any page size come on
top. What differs: ``S_dmask``, which the original returns "for testing only", is ``None`` because probabilities are
never formed, and the log-sum-exp of a row that sees no key is −inf instead of +inf.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from onepass import functional
from onepass.compat._flash_kvcache import flash_attn_with_kvcache
from onepass.compat._flash_kvcache import paged_varlen as _paged_varlen
from onepass.compat._flash_kvcache import window as _window

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_WindowSize = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Exact attention, differentiable.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k: ``(batch, seqlen_k, nheads_k, headdim)``; ``nheads`` is a multiple of ``nheads_k``.
        v: ``(batch, seqlen_k, nheads_k, headdim)``.
        dropout_p: probability of dropping an attention weight.
        softmax_scale: default ``1/√headdim``.
        causal: query i sees key j iff ``j ≤ i + seqlen_k − seqlen_q``.
        window_size: ``(left, right)`` keys around the diagonal that a query sees, −1: unbounded.
        softcap: if > 0, logits become ``softcap · tanh(logit / softcap)``.
        alibi_slopes: float32 ``(nheads)`` or ``(batch, nheads)``: adds ``−slope · |i + seqlen_k − seqlen_q − j|``.
        deterministic: the backward pass gives the same bits every run.
        return_attn_probs: return ``(out, softmax_lse, None)``.

    Returns:
        out ``(batch, seqlen_q, nheads, headdim)``; ``softmax_lse`` is float32 ``(batch, nheads, seqlen_q)``.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`onepass.attention`.
    """
    result = functional.attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=causal,
        softmax_scale=softmax_scale,
        window=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    if return_attn_probs:
        return result.out.transpose(1, 2), result.lse, None
    return result.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` of one tensor ``(batch, seqlen, 3, nheads, headdim)``."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, dropout_p, **options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one tensor ``(batch, seqlen_k, 2, nheads_k, headdim)``."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, dropout_p, **options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention over a ragged batch: sequences packed one after the other.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``, or pages ``(num_blocks, page_block_size, nheads_k, headdim)``.
        v: likewise.
        cu_seqlens_q: int32 ``(batch + 1)`` cumulative lengths, first 0.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: length of the longest sequence of keys.
        block_table: int32 ``(batch, max_num_blocks_per_seq)``: k and v are pages; without dropout and gradient.

    The other options are those of :func:`flash_attn_func`.

    Returns:
        out ``(total_q, nheads, headdim)``; ``softmax_lse`` is float32 ``(nheads, total_q)``.
    """
    if block_table is not None:
        if dropout_p > 0.0:
            raise NotImplementedError(f"flash_attn_varlen_func: dropout_p: got {dropout_p} with a block_table; need 0")
        score = softmax_scale, causal, window_size, softcap, alibi_slopes
        return _paged_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, block_table, score, return_attn_probs)
    result = functional.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softmax_scale=softmax_scale,
        window=_window(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=return_attn_probs,
    )
    return (result.out, result.lse, None) if return_attn_probs else result


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` of one tensor ``(total, 3, nheads, headdim)``."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, **options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: _WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor ``(total_k, 2, nheads_k, headdim)``."""
    options: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }
    k, v = kv.unbind(1)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, **options)
