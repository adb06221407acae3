"""The operators by their formulas in PyTorch, under the names of ``flag_attn.testing``: what tests compare with.

They store the whole score matrix. ``upcast`` computes in float32 and rounds the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["flash_attention", "paged_attention", "piecewise_attention", "recompute_mask"]

_WORD = 0xFFFFFFFF


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    sm_scale: float | None = None,
    return_log_normalizer: bool = False,
    return_total_attention: bool = False,
    upcast: bool = False,
) -> Any:
    """Attention; with a ``return_*`` flag ``(out, log_normalizer, total_attention)``, ``None`` where not asked for.

    ``dropout_mask``: bool ``(batch, num_heads, seqlen_q, seqlen_k)``, true where a weight survives.
    """
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    k, v = _for_every_head(q, k, v)
    scores = (q @ k.mT) * _scale(q, sm_scale)
    if causal:
        scores = scores.masked_fill(_distance(q, k) < 0, -torch.inf)
    scores = scores.float()
    weights = _softmax(scores)
    kept = weights if dropout_mask is None else weights.masked_fill(~dropout_mask, 0.0)
    out = ((kept.to(v.dtype) @ v) / (1.0 - dropout_p)).to(dtype)
    if not (return_log_normalizer or return_total_attention):
        return out
    log_normalizer = torch.logsumexp(scores, -1) if return_log_normalizer else None
    return out, log_normalizer, weights.sum(-2) if return_total_attention else None


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int,
    causal: bool,
    sm_scale: float | None = None,
    upcast: bool = False,
) -> Tensor:
    """Attention whose scores come from the second pair where the distance is at least ``dist_threshold``."""
    dtype = q1.dtype
    if upcast:
        q1, k1, q2, k2, v = (tensor.float() for tensor in (q1, k1, q2, k2, v))
    k1, k2, v = _for_every_head(q1, k1, k2, v)
    distance = _distance(q1, k1)
    scores = torch.where(distance >= dist_threshold, q2 @ k2.mT, q1 @ k1.mT) * _scale(q1, sm_scale)
    if causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    return (_softmax(scores.float()).to(v.dtype) @ v).to(dtype)


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """One query a sequence, ``(num_seqs, num_heads, headdim)``, over pages gathered one sequence at a time."""
    out = torch.empty_like(query)
    for sequence, length in enumerate(context_lens.tolist()):
        pages = block_tables[sequence, : -(-length // key_cache.shape[2])].long()
        keys, values = (
            cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :length].float() for cache in (key_cache, value_cache)
        )
        row = query[sequence][None, :, None].float()
        out[sequence] = flash_attention(row, keys, values, False, sm_scale=scale)[0, :, 0].to(out.dtype)
    return out


def recompute_mask(
    B: int,
    H: int,
    M: int,
    N: int,
    dropout_p: float,
    seed: int,
    offset: int,
    device: torch.device | str,
) -> Tensor:
    """bool ``(B, H, M, N)``, true where a weight survives: the mask of a call that returned ``seed`` and ``offset``.

    Philox 4x32-10 (Salmon et al. 2011), four keys a draw, counter ``(key / 4, query, batch·H + head, offset)``.
    """
    if dropout_p == 0:
        return torch.ones(B, H, M, N, dtype=torch.bool, device=device)

    def axis(size: int, dim: int) -> Tensor:
        return torch.arange(size, device=device).reshape([-1 if d == dim else 1 for d in range(3)])

    quads = -(-N // 4)
    words = torch.broadcast_tensors(
        axis(quads, 2), axis(M, 1), axis(B * H, 0), torch.tensor(offset & _WORD, device=device)
    )
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD ^ (offset >> 32)
    for _ in range(10):
        high0, low0 = _multiply(words[0], 0xD2511F53)
        high1, low1 = _multiply(words[2], 0xCD9E8D57)
        words = (high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0)
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    threshold = min(int(dropout_p * 2**32 + 0.5), _WORD)
    return (torch.stack(tuple(words), -1) >= threshold).reshape(B, H, M, 4 * quads)[..., :N]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of 32-bit words, in int64 that must not overflow on the way up."""
    low, high = (word & 0xFFFF) * factor, (word >> 16) * factor
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def _for_every_head(q: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in tensors)


def _scale(q: Tensor, sm_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if sm_scale is None else sm_scale


def _distance(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    return rows - torch.arange(k.shape[2], device=q.device)


def _softmax(scores: Tensor) -> Tensor:
    """0 in rows that see nothing."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
