"""Operations on a whole :class:`onepass.KVCache`: another batch, more room, dense copies. Its methods call these."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onepass._cache_scales import Granularity, scaled

if TYPE_CHECKING:
    from onepass.cache import KVCache

_HUGE_PAGE = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros; large ones of the CPU in huge pages, where the system has them.

    A decode step reads the cache once: with pages of 4 KB it waits for their addresses, too.
    """
    place = torch.empty(0, device=device).device
    size = torch.Size(shape).numel() * dtype.itemsize
    if place.type != "cpu" or size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: these are zeros all the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))


def select(cache: KVCache, index: Tensor) -> None:
    """Sequence b becomes what sequence ``index[b]`` holds."""
    chosen = torch.as_tensor(index, dtype=torch.int64, device=cache.k.device)
    if cache._references is not None:
        assert cache._host_table is not None
        on_host = chosen.cpu()
        table = cache._host_table[on_host]
        if cache.k.shape[0] == cache._host_table.numel():  # pages for every sequence at its longest: keep it so
            _enlarge_pool(cache, table.numel())
        cache._references = torch.bincount(table[table >= 0], minlength=cache.k.shape[0]).to(torch.int32)
        _replace_tables(cache, table, cache._host_seqlens[on_host])
    elif cache.page_table is not None or cache.batch_index is not None:
        raise ValueError("KVCache.select: cache: got tables of someone else; need a cache that owns its storage")
    else:
        used = int(cache.seqlens.max())
        for name, tensor, dim in _per_token(cache):
            stored = _bytes(tensor)
            picked = stored.narrow(dim, 0, used).index_select(0, chosen)
            if chosen.numel() != cache.batch:
                stored = zeros((chosen.numel(), *stored.shape[1:]), stored.dtype, stored.device)
                setattr(cache, name, stored.view(tensor.dtype))
            stored.narrow(dim, 0, used).copy_(picked)
        cache.seqlens = cache._host_seqlens = cache.seqlens[chosen]
    if cache.first_key is not None:
        cache.first_key = cache.first_key[chosen]


def grow(cache: KVCache, max_seqlen: int) -> None:
    """Room for ``max_seqlen`` tokens of every sequence."""
    if max_seqlen <= cache.max_seqlen:
        return
    if cache.batch_index is not None or (cache.page_table is not None and cache._references is None):
        raise ValueError("KVCache.grow: cache: got tables of someone else; need a cache that owns its storage")
    if cache._references is None:
        for name, tensor, dim in _per_token(cache):
            setattr(cache, name, _enlarged(tensor, dim, max_seqlen))
        return
    assert cache._host_table is not None
    added = -(-max_seqlen // cache.k.shape[2]) - cache._host_table.shape[1]
    _enlarge_pool(cache, cache.k.shape[0] + cache.batch * added)
    columns = cache._host_table.new_full((cache.batch, added), -1)
    _replace_tables(cache, torch.cat([cache._host_table, columns], dim=1), cache._host_seqlens)


def forget(cache: KVCache, tokens: int, capacity: int) -> int:
    """Forgets the first tokens of all sequences, which have the same length; the others move to the front.

    A contiguous cache moves to storage of ``capacity`` tokens; a paged one frees whole pages. Returns how many tokens
    were forgotten.
    """
    if cache._references is None:
        kept = int(cache.seqlens.max()) - tokens
        for name, tensor, dim in _per_token(cache):
            moved = _resized(tensor, dim, capacity)
            moved.narrow(dim, 0, kept).copy_(_bytes(tensor).narrow(dim, tokens, kept))
            setattr(cache, name, moved.view(tensor.dtype))
        cache.seqlens -= tokens
        return tokens
    assert cache._host_table is not None
    pages = tokens // cache.k.shape[2]
    table = cache._host_table.roll(-pages, dims=1)
    freed = table[:, table.shape[1] - pages :]
    cache._references -= torch.bincount(freed.flatten(), minlength=cache.k.shape[0]).to(torch.int32)
    freed.fill_(-1)
    _replace_tables(cache, table, cache._host_seqlens - pages * cache.k.shape[2])
    return pages * cache.k.shape[2]


def dense(cache: KVCache, dtype: torch.dtype, length: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values ``(batch, num_heads_kv, length, dim)`` in ``dtype``."""
    if length is None:
        length = int(cache.seqlens.max())
    sides = []
    for stored, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        rows = cache.batch_index if cache.page_table is None else cache.page_table.clamp(min=0).flatten()
        if rows is not None:
            stored = _bytes(stored)[rows.long()].view(stored.dtype)
            if scale is not None and scale.dim() > 1:
                scale = scale[rows.long()]
        values = scaled(stored, scale, cache._granularity, dtype)
        if cache.page_table is not None:
            values = values.unflatten(0, (cache.batch, -1)).transpose(1, 2).flatten(2, 3)
        sides.append(values[:, :, :length])
    return sides[0], sides[1]


def _per_token(cache: KVCache) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and dimension of tokens of whatever has an entry for each token."""
    yield "k", cache.k, 2
    yield "v", cache.v, 2
    if cache._granularity > Granularity.TENSOR:
        assert cache.k_scale is not None
        assert cache.v_scale is not None
        dim = 1 if cache._granularity == Granularity.TOKEN else 2
        yield "k_scale", cache.k_scale, dim
        yield "v_scale", cache.v_scale, dim


def _enlarge_pool(cache: KVCache, num_pages: int) -> None:
    assert cache._references is not None
    if num_pages <= cache.k.shape[0]:
        return
    for name, tensor, _ in _per_token(cache):
        setattr(cache, name, _enlarged(tensor, 0, num_pages))
    cache._references = _enlarged(cache._references, 0, num_pages)


def _bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as integers: torch does not index them everywhere."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros like the tensor, its bytes if it has 8-bit elements, with another size in one dimension."""
    shape = list(tensor.shape)
    shape[dim] = size
    return zeros(shape, _bytes(tensor).dtype, tensor.device)


def _enlarged(tensor: Tensor, dim: int, size: int) -> Tensor:
    larger = _resized(tensor, dim, size)
    larger.narrow(dim, 0, tensor.shape[dim]).copy_(_bytes(tensor))
    return larger.view(tensor.dtype)


def _replace_tables(cache: KVCache, table: Tensor, seqlens: Tensor) -> None:
    """Host tables, and their copies on the device of the storage (the same tensors on the CPU)."""
    cache._host_table, cache._host_seqlens = table, seqlens
    cache.page_table, cache.seqlens = table.to(cache.k.device), seqlens.to(cache.k.device)
