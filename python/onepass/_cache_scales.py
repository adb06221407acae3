"""Scales of quantized caches: what shares one, their shapes, and values from stored elements."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor


class Granularity(enum.IntEnum):
    """What shares a scale; the numbers are those of ScaleGranularity in include/onepass/kv_cache.h."""

    NONE = 0
    TENSOR = 1
    TOKEN = 2
    HEAD = 3
    GROUP = 4


def invalid(argument: str, received: Any, required: str) -> ValueError:
    return ValueError(f"KVCache: {argument}: got {received}; need {required}")


def parse_granularity(text: str) -> tuple[Granularity, int]:
    """``(granularity, channels of a group)`` of ``"tensor" | "token" | "head" | "group:N"``."""
    name, _, group = text.partition(":")
    if name == "group" and group.isdigit() and int(group) > 0:
        return Granularity.GROUP, int(group)
    names = {"tensor": Granularity.TENSOR, "token": Granularity.TOKEN, "head": Granularity.HEAD}
    if text not in names:
        raise invalid("scale_granularity", repr(text), '"tensor", "token", "head" or "group:N"')
    return names[text], 0


def new_scale(storage: Tensor, granularity: Granularity, group: int, value: float) -> Tensor:
    """float32 scales, all ``value``, for ``storage`` (blocks, num_heads_kv, block tokens, dim)."""
    blocks, heads, tokens, dim = storage.shape
    if granularity == Granularity.GROUP and dim % group:
        raise invalid("scale_granularity", f"group:{group}", f"a divisor of head_dim {dim}")
    shape = {
        Granularity.TENSOR: (1,),
        Granularity.TOKEN: (blocks, tokens),
        Granularity.HEAD: (blocks, heads, tokens),
        Granularity.GROUP: (blocks, heads, tokens, dim // max(group, 1)),
    }[granularity]
    return torch.full(shape, value, dtype=torch.float32, device=storage.device)


def scaled(stored: Tensor, scale: Tensor | None, granularity: Granularity, dtype: torch.dtype) -> Tensor:
    """The values that ``stored`` (blocks, num_heads_kv, block tokens, dim) stands for, in ``dtype``."""
    if scale is None:
        return stored.to(dtype)
    match granularity:
        case Granularity.TOKEN:
            scale = scale[:, None, :, None]
        case Granularity.HEAD:
            scale = scale[..., None]
        case Granularity.GROUP:
            scale = scale.repeat_interleave(stored.shape[-1] // scale.shape[-1], dim=-1)
    return (stored.float() * scale).to(dtype)
