"""Continuous batching (``model.generate_batch``): attention over transformers' paged cache.

transformers packs the queries of all running requests into one row and manages pages itself. Its ``generate_batch``
knows the implementations that it works with by name, so a small wrapper around that choice lets onepass in. The cache
takes new keys and values and hands back all of a layer, gathered: in the model's code (transformers ≥ 5.24) or in the
attention function, to which it travels. Another wrapper leaves them in their pages for onepass to read there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

from onepass.cache import KVCache
from onepass.decode import cached_attention
from onepass.functional import varlen_attention

_PAGES = "onepass_pages"  # among the attention function's arguments: the layer's pages, the new tokens in them
_names: dict[str, str] = {}  # implementation as the user names it → the one for paged caches


def register_paged(name: str) -> None:
    """Makes ``generate_batch`` take ``attn_implementation=name`` and ``"paged|" + name``."""
    # Names with a bar are rewritten by transformers ≥ 5.20, so the one that it gets to see has none.
    _names[name] = f"{name}_paged"
    for implementation in (f"{name}_paged", f"paged|{name}"):
        AttentionInterface.register(implementation, paged_attention)
        AttentionMaskInterface.register(implementation, _no_mask)
    current = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if not hasattr(current, "before_onepass"):
        ContinuousBatchingManager.switch_to_cb_friendly_attn = _accepting(current)
        PagedAttentionCache.update = _in_place(PagedAttentionCache.update)


def _accepting(original: Any) -> Any:
    @functools.wraps(original)
    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        requested = model.config._attn_implementation
        if requested in _names.values():
            return
        if requested.removeprefix("paged|") not in _names:
            original(self, model, *args, **kwargs)
            return
        paged = _names[requested.removeprefix("paged|")]
        model.set_attn_implementation(paged)
        if model.config._attn_implementation != paged:
            raise NotImplementedError(
                f"onepass.huggingface: generate_batch: got a {type(model).__name__}, whose attention code is its own; "
                "need a model that goes through transformers' attention interface"
            )
        self._original_attn_impl = requested

    switch_to_cb_friendly_attn.before_onepass = original  # type: ignore[attr-defined]
    return switch_to_cb_friendly_attn


def _in_place(original: Any) -> Any:
    @functools.wraps(original)
    def update(self: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("kwargs", args[0] if args else None)
        if isinstance(given, dict) and self.config._attn_implementation in _names.values():
            stored = _stored(layer_idx, self, key_states, value_states, given)
            if stored is not None:
                given[_PAGES] = stored
                return key_states, value_states
        return original(self, key_states, value_states, layer_idx, *args, **kwargs)

    return update


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Sequence bounds say everything."""


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed queries over a ``PagedAttentionCache``, into which it puts the new keys and values.

    Args:
        query: (1, num_heads, total_q, head_dim).
        key, value: (1, num_heads_kv, total_q, head_dim), the new tokens; without ``cache`` all that the layer has.
        sliding_window: tokens that a query sees, itself counted.
        cache: the ``PagedAttentionCache``, before transformers 5.24. cu_seq_lens_q: int32 (requests + 1).
        kwargs: ``cu_seq_lens_k``, ``max_length_k``, ``read_index`` and ``write_index`` for each type of layer.

    Returns:
        (1, total_q, num_heads, head_dim) and None.
    """
    if cu_seq_lens_q is None or (cache is None and "read_index" not in kwargs):
        raise ValueError(
            'onepass.huggingface: cache: got none; need generate_batch (use attn_implementation="onepass" otherwise)'
        )
    window = None if not sliding_window else (sliding_window - 1, 0)
    options: dict[str, Any] = {
        "causal": True,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "window": window,
        "max_seqlen_q": max_length_q,
    }
    q = query[0].transpose(0, 1)  # (total_q, num_heads, head_dim)
    cu_seqlens_q = cu_seq_lens_q.to(torch.int32)
    new = {"key_states": key, "value_states": value, "layer_idx": getattr(module, "layer_idx", 0)}
    k = v = None
    if hasattr(cache, "layer_to_allocator"):  # transformers ≥ 5.20
        key, value = cache.update(**new, kwargs=kwargs)
    elif cache is not None:
        k, v = cache.update(**new, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    if _PAGES in kwargs:
        return cached_attention(q, kwargs[_PAGES], cu_seqlens_q=cu_seqlens_q, **options)[None], None
    if k is None or v is None:
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    is_windowed = window is not None
    cu_seqlens_k, max_seqlen_k = (_of_layer(kwargs.get(x), is_windowed) for x in ("cu_seq_lens_k", "max_length_k"))
    out = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k.to(torch.int32), max_seqlen_k=max_seqlen_k, **options)
    return out[None], None


def _of_layer(value: Any, is_windowed: bool) -> Any:
    """The entry for a layer of what may be given for each type of layer."""
    return value["sliding_attention" if is_windowed else "full_attention"] if isinstance(value, dict) else value


def _stored(layer_idx: int, cache: Any, key: Tensor, value: Tensor, given: dict[str, Any]) -> KVCache | None:
    """The layer's pages with the new tokens written to them; None where they cannot be read in place.

    That is in windowed layers, whose pages are ring buffers, in older versions of transformers, and when no request has
    tokens in the cache, so that the new ones are all there is.
    """
    allocator = getattr(cache, "layer_to_allocator", {}).get(layer_idx)
    if allocator is None or not allocator.supports_block_table:
        return None
    read_index, write_index = (given[name][allocator.index] for name in ("read_index", "write_index"))
    if read_index.numel() == 0:
        return None
    k_pages, v_pages = allocator.get_cache_for_block_table(layer_idx)  # (pages, page_size, heads, dim)
    for pages, new in ((k_pages, key), (v_pages, value)):
        pages.flatten(0, 1).index_copy_(0, write_index, new[0].transpose(0, 1))
    # read_index lists every request's tokens by their place in the storage, so each page's first token names the page.
    page_size = k_pages.shape[1]
    cu_seqlens_k = given["cu_seq_lens_k"][allocator.layer_type].to(torch.int32)
    offsets = torch.arange(0, given["max_length_k"][allocator.layer_type], page_size, device=read_index.device)
    first_tokens = (cu_seqlens_k[:-1, None] + offsets).clamp(max=read_index.numel() - 1)
    page_table = (read_index[first_tokens] // page_size).to(torch.int32)
    return KVCache.from_tensors(
        k_pages.transpose(1, 2), v_pages.transpose(1, 2), cu_seqlens_k.diff(), page_table=page_table
    )
