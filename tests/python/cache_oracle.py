"""What a cache holds, dequantized in float64, and attention over it by its formula: the oracle of caches."""

from __future__ import annotations

import math

import onepass
import torch
from torch import Tensor

BATCH, HEADS, HEADS_KV, DIM = 3, 8, 2, 64
STORAGES = [
    {},
    {"dtype": torch.float32},
    {"quantization": "int8"},
    {"quantization": "int8", "scale_granularity": "token"},
    {"quantization": "int8", "scale_granularity": "group:16"},
    {"quantization": "int8", "scale_granularity": "tensor", "k_scale": 0.03, "v_scale": 0.03},
    {"quantization": "fp8_e4m3"},
    {"quantization": "fp8_e5m2", "k_scale": 0.5, "v_scale": 2.0},
]


def storage_name(storage: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in storage.values()) or "bfloat16"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def stored(cache: onepass.KVCache, sequence: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence as float64 ``(num_heads_kv, length, dim)``, from the cache's tensors."""
    length = int(cache.seqlens[sequence])
    sides = []
    for values, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        dequantized = values.to(torch.float64)
        if scale is not None:
            scale = scale.to(torch.float64)
            if scale.numel() == 1:
                pass
            elif scale.dim() == 2:
                scale = scale[:, None, :, None]
            elif scale.dim() == 3:
                scale = scale[..., None]
            else:
                scale = scale.repeat_interleave(values.shape[-1] // scale.shape[-1], dim=-1)
            dequantized = dequantized * scale
        if cache.page_table is None:
            side = dequantized[sequence]
        else:
            pages = cache.page_table[sequence]
            side = torch.cat([dequantized[page] for page in pages[pages >= 0]] or [dequantized[0][:, :0]], dim=1)
        sides.append(side[:, :length])
    return sides[0], sides[1]


def expected(q: Tensor, cache: onepass.KVCache, sequence: int, *, causal: bool = True) -> tuple[Tensor, Tensor]:
    """out and lse of ``q`` (num_heads, seqlen_q, dim) over what a sequence has stored."""
    k, v = stored(cache, sequence)
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q.to(torch.float64) @ k.mT / math.sqrt(q.shape[-1])
    rows, keys = scores.shape[-2:]
    if causal:
        hidden = torch.ones(rows, keys).triu(keys - rows + 1).bool()
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights @ v, lse


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
