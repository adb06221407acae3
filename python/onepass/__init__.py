"""Exact attention in one pass over the keys and values, for training and inference, on CPUs and NVIDIA GPUs.

``onepass.attention(q, k, v)`` is the main entry point; ``help(onepass.attention)`` explains its options.
"""

from onepass import _vmap as _vmap
from onepass._ops import ops as _ops
from onepass.cache import KVCache
from onepass.decode import cached_attention
from onepass.functional import (
    AttentionResult,
    alibi_slopes,
    attention,
    info,
    merge_states,
    varlen_attention,
)
from onepass.piecewise import piecewise_attention
from onepass.sdpa import scaled_dot_product_attention

__version__: str = _ops.version()

__all__ = [
    "AttentionResult",
    "KVCache",
    "alibi_slopes",
    "attention",
    "cached_attention",
    "info",
    "merge_states",
    "piecewise_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
