"""The interface of FastForwardAttention (``ff_attention``): decoding over a cache that one object owns.

    from onepass.compat.ffa import FastForwardAttn as FFA
    ffa = FFA(K, V, max_timesteps)
    out = ffa.attention(q, k, v, softmax_scale, timestep, prob_thresh)

Differences from the original: it runs on the CPU too, takes bfloat16 and any head_dim up to 512, refuses what the
original would have answered with a printed line or a write past its cache, and both cached tensors have the layout
``(batch, num_heads, max_timesteps, head_dim)`` (the original's keys are interleaved for its kernel).
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from onepass.cache import KVCache
from onepass.decode import cached_attention

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FastForwardAttn:
    """Attention of one new token per sequence over all earlier ones.

    Args:
        K: keys of the prompt, ``(batch, num_heads, prompt_length, head_dim)``: float32, float16 or bfloat16.
        V: values of the prompt, likewise.
        max_timesteps: tokens that a sequence may have, prompt included.
        ft_kernel_launch: taken for compatibility; it chose between two ways to launch one CUDA kernel.

    Raises:
        ValueError: K and V of different or wrong shape, or longer than ``max_timesteps``.
        TypeError: another dtype.
    """

    def __init__(self, K: Tensor, V: Tensor, max_timesteps: int, ft_kernel_launch: bool = False) -> None:
        if K.dim() != 4 or K.shape != V.shape:
            raise ValueError(
                f"FastForwardAttn: K, V: got {tuple(K.shape)} and {tuple(V.shape)}; need two tensors of one shape "
                "(batch, num_heads, prompt_length, head_dim)"
            )
        if K.dtype not in _DTYPES or V.dtype != K.dtype:
            raise TypeError(f"FastForwardAttn: K, V: got {K.dtype} and {V.dtype}; need float32, float16 or bfloat16")
        if max_timesteps < K.shape[2]:
            raise ValueError(
                f"FastForwardAttn: max_timesteps: got {max_timesteps}; need at least the prompt's {K.shape[2]} tokens"
            )
        cache = KVCache(K.shape[0], max_timesteps, K.shape[1], K.shape[3], dtype=K.dtype, device=K.device)
        cache.append(K.detach(), V.detach())
        self.k_cache, self.v_cache = cache.k, cache.v

    def get_cache(self) -> tuple[Tensor, Tensor]:
        """The cached keys and values, ``(batch, num_heads, max_timesteps, head_dim)``: views, not copies."""
        return self.k_cache, self.v_cache

    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, timestep: int, prob_thresh: float = 0.0, /
    ) -> Tensor: ...

    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        softmax_scale: float,
        timestep: int,
        prob_thresh: float = 0.0,
        /,
    ) -> Tensor: ...

    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        softmax_scale: float,
        timestep: int,
        seq_lengths: Tensor,
        prob_thresh: float = 0.0,
        /,
    ) -> Tensor: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        """Stores the new token of each sequence at ``timestep`` and attends over tokens 0 to ``timestep``.

        Args:
            q, k, v: the new token, ``(batch, num_heads, 1, head_dim)`` or the same elements in another shape.
            k_cache, v_cache: as from :meth:`get_cache`, when the call should use caches other than its own.
            softmax_scale: factor of the logits.
            timestep: tokens stored so far, padding included.
            seq_lengths: int32 ``(batch)``: index of each sequence's first valid token (left padding). The original
                takes it with explicit caches only.
            prob_thresh: values whose weight relative to the largest, exp(s − max), is at most this are skipped, without
                renormalising; 0: exact.

        Returns:
            ``(batch, num_heads, head_dim)`` in the dtype of ``q``.

        Raises:
            ValueError, TypeError: before anything is written, when an argument does not fit the cache, and when the
                cache has no room at ``timestep``.
        """
        rest = list(arguments)
        caches = self.get_cache()
        if len(rest) > 1 and all(isinstance(argument, Tensor) and argument.dim() == 4 for argument in rest[:2]):
            caches = rest.pop(0), rest.pop(0)
        has_lengths = len(rest) > 2 and isinstance(rest[2], Tensor) and rest[2].dim() > 0
        seq_lengths = rest.pop(2) if has_lengths else None
        if not 2 <= len(rest) <= 3:
            raise TypeError(
                f"FastForwardAttn.attention: arguments: got {3 + len(arguments)}; need (q, k, v[, k_cache, v_cache], "
                "softmax_scale, timestep[, seq_lengths][, prob_thresh])"
            )
        softmax_scale, timestep = float(rest[0]), int(rest[1])
        prob_thresh = float(rest[2]) if len(rest) == 3 else 0.0
        return _attention(q, k, v, *caches, softmax_scale, timestep, seq_lengths, prob_thresh)


@torch.no_grad()
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    softmax_scale: float,
    timestep: int,
    seq_lengths: Tensor | None,
    prob_thresh: float,
) -> Tensor:
    batch, num_heads, max_timesteps, head_dim = k_cache.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.numel() != batch * num_heads * head_dim:
            raise ValueError(
                f"FastForwardAttn.attention: {name}: got {tuple(tensor.shape)}; need one token of each sequence, "
                f"{(batch, num_heads, 1, head_dim)}"
            )
    if not 0 <= timestep < max_timesteps:
        raise ValueError(
            f"FastForwardAttn.attention: timestep: got {timestep}; need 0 to {max_timesteps - 1}, the last of "
            "max_timesteps"
        )
    lengths = torch.full((batch,), timestep, dtype=torch.int32, device=k_cache.device)
    first_key = None if seq_lengths is None else seq_lengths.to(torch.int32).reshape(-1)
    cache = KVCache.from_tensors(k_cache, v_cache, lengths, first_key=first_key)
    q, k, v = (tensor.reshape(batch, num_heads, 1, head_dim) for tensor in (q, k, v))
    out = cached_attention(q, cache, k_new=k, v_new=v, softmax_scale=softmax_scale, prob_threshold=prob_thresh)
    return out.view(batch, num_heads, head_dim)
