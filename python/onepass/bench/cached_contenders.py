"""What is measured side by side over a KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import onepass
from onepass.bench.cached import CacheCase, CacheInputs, Step

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_call(case: CacheCase, inputs: CacheInputs) -> Step:
    """``cached_attention`` of the whole batch: packed queries where their lengths differ."""
    lengths = case.query_lengths()
    if len(set(lengths)) == 1:
        q = _dense(inputs.q, case.batch, lengths[0])
        return lambda copy: onepass.cached_attention(q, inputs.caches[copy], num_splits=case.num_splits)
    bounds = torch.tensor([0, *lengths], device=inputs.q.device).cumsum(0).int()
    return lambda copy: onepass.cached_attention(
        inputs.q, inputs.caches[copy], cu_seqlens_q=bounds, max_seqlen_q=case.seqlen_q, num_splits=case.num_splits
    )


def apart(case: CacheCase, inputs: CacheInputs) -> Step:
    """One ``cached_attention`` of the sequences that prefill, then one of those that decode."""
    parts = _parts(case, inputs)
    caches = [[_rows(cache, rows) for rows, _ in parts] for cache in inputs.caches]

    def step(copy: int) -> object:
        views = zip(parts, caches[copy], strict=True)
        return [onepass.cached_attention(q, cache, num_splits=case.num_splits) for (_, q), cache in views]

    return step


def torch_sdpa(case: CacheCase, inputs: CacheInputs, backend: SDPBackend | None = None) -> Step:
    """PyTorch's fused attention as its users call it, with ``enable_gqa``; hybrid batches in two calls."""
    return _per_part(case, inputs, lambda queries: _grouped(case, queries), backend)


def torch_folded(case: CacheCase, inputs: CacheInputs) -> Step:
    """PyTorch's fused attention with the query heads of a group as rows of one head, so that keys are read once.

    Only for parts of one query: there no mask is needed.
    """
    return _per_part(case, inputs, lambda queries: _folded if queries == 1 else _grouped(case, queries), None)


CONTENDERS: dict[str, Callable[[CacheCase, CacheInputs], Step]] = {
    "onepass": one_call,
    "apart": apart,
    "torch": torch_sdpa,
    "torch folded": torch_folded,
    "torch flash": lambda case, inputs: torch_sdpa(case, inputs, SDPBackend.FLASH_ATTENTION),
    "torch cuDNN": lambda case, inputs: torch_sdpa(case, inputs, SDPBackend.CUDNN_ATTENTION),
}


def contenders(case: CacheCase, device: torch.device) -> list[str]:
    """Those that differ for this case."""
    names = ["onepass", "torch"]
    if case.prefills and case.decodes:
        names.insert(1, "apart")
    if case.num_heads != case.num_heads_kv and (case.decodes or case.seqlen_q == 1):
        names.append("torch folded")
    if device.type == "cuda":
        names += ["torch flash", "torch cuDNN"]
    return names


def _per_part(
    case: CacheCase, inputs: CacheInputs, attention: Callable[[int], Attention], backend: SDPBackend | None
) -> Step:
    parts = [(rows, q, attention(q.shape[2])) for rows, q in _parts(case, inputs, inputs.keys[0].dtype)]

    def step(copy: int) -> object:
        with torch.no_grad():
            k, v = inputs.keys[copy], inputs.values[copy]
            return [call(q, k[rows], v[rows]) for rows, q, call in parts]

    if backend is None:
        return step

    def with_backend(copy: int) -> object:
        with sdpa_kernel(backend):
            return step(copy)

    return with_backend


def _parts(case: CacheCase, inputs: CacheInputs, dtype: torch.dtype | None = None) -> list[tuple[slice, Tensor]]:
    """Rows of the batch with the same number of queries, and these queries ``(rows, num_heads, tokens, head_dim)``."""
    split = case.prefills * case.seqlen_q
    q = inputs.q if dtype is None else inputs.q.to(dtype)
    parts = [
        (slice(0, case.prefills), _dense(q[:split], case.prefills, case.seqlen_q)),
        (slice(case.prefills, case.batch), _dense(q[split:], case.decodes, 1)),
    ]
    return [part for part, rows in zip(parts, (case.prefills, case.decodes), strict=True) if rows]


def _dense(q: Tensor, batch: int, tokens: int) -> Tensor:
    return q.view(batch, tokens, *q.shape[1:]).transpose(1, 2)


def _rows(cache: onepass.KVCache, rows: slice) -> onepass.KVCache:
    """The same storage, seen by some of its sequences."""
    if cache.page_table is not None:
        return onepass.KVCache.from_tensors(
            cache.k,
            cache.v,
            cache.seqlens[rows],
            page_table=cache.page_table[rows],
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            scale_granularity=None if cache.k_scale is None else "head",
        )
    return onepass.KVCache.from_tensors(
        cache.k[rows],
        cache.v[rows],
        cache.seqlens[rows],
        k_scale=None if cache.k_scale is None else cache.k_scale[rows],
        v_scale=None if cache.v_scale is None else cache.v_scale[rows],
        scale_granularity=None if cache.k_scale is None else "head",
    )


def _grouped(case: CacheCase, queries: int) -> Attention:
    grouped = case.num_heads != case.num_heads_kv
    if queries == 1:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if queries == case.seqlen_k:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = causal_lower_right(queries, case.seqlen_k)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(rows, k, v).view(batch, heads, 1, head_dim)
