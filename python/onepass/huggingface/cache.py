"""``OnepassCache``: a transformers cache whose keys and values live in one :class:`onepass.KVCache` per layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin

from onepass import _cache_storage
from onepass.cache import KVCache, Quantization

_FIRST_CAPACITY = 256  # tokens, of a cache that grows
_KEPT_FOR_ROLLBACK = 64  # tokens in front of a window, so that speculative decoding can take its own back


class OnepassCache(Cache):
    """A cache for ``model.generate(…, past_key_values=OnepassCache(…))``, with ``attn_implementation="onepass"``.

    Attention reads the stored keys and values themselves, in pages or quantized as they are. Any other attention
    implementation works, too, on dequantized copies.

    Args:
        max_seqlen: tokens that a sequence may have, padding included; ``None``: the cache grows by doubling.
        dtype: of the storage; default that of the model's keys.
        quantization, scale_granularity, page_size, k_scale, v_scale: as for :class:`onepass.KVCache`.

    Layers with a sliding window read the tokens in it. In a cache that grows they forget what the window has passed, so
    that their storage stays within about four windows; with ``max_seqlen`` they keep everything.
    """

    def __init__(
        self,
        max_seqlen: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
        scale_granularity: str = "head",
        page_size: int | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> None:
        storage = {
            "quantization": quantization,
            "scale_granularity": scale_granularity,
            "page_size": page_size,
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        super().__init__(layer_class_to_replicate=partial(OnepassLayer, max_seqlen, dtype, storage))

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of all layers, scales and unused room included."""
        return sum(layer.cache.nbytes for layer in self.layers if layer.is_initialized)


class OnepassLayer(CacheLayerMixin):
    """One layer of an :class:`OnepassCache`: all sequences have the same length (transformers pads them)."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    cache: KVCache

    def __init__(self, max_seqlen: int | None, dtype: torch.dtype | None, storage: dict[str, Any]) -> None:
        super().__init__()
        self.max_seqlen = max_seqlen
        self.length = self.forgotten = 0
        self.window: int | None = None  # tokens that a query sees; told by the attention function
        self._dtype, self._storage = dtype, storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the storage for states (batch, num_heads_kv, tokens, dim) like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, tokens, dim = key_states.shape
        self.batch_size = batch
        self.cache = KVCache(
            batch,
            max(_FIRST_CAPACITY, tokens) if self.max_seqlen is None else self.max_seqlen,
            heads,
            dim,
            head_dim_v=value_states.shape[3],
            dtype=self._dtype or key_states.dtype,
            device=key_states.device,
            **self._storage,
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new states (batch, num_heads_kv, tokens, dim); returns all of them as :class:`CachedStates`."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise NotImplementedError(
                "OnepassCache: key_states: got ones that require a gradient; need torch.no_grad() (a cache is for "
                "inference)"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.max_seqlen is None:
            self._make_room(key_states.shape[2])
        self.cache.append(key_states, value_states)
        self.length += key_states.shape[2]
        return CachedStates(self, "k"), CachedStates(self, "v")

    def sees(self, window: int | None) -> None:
        """A query of this layer sees ``window`` tokens, itself counted, or all."""
        if self.forgotten and window != self.window:
            raise ValueError(
                f"OnepassCache: sliding_window: got {window}; need the {self.window} of earlier calls, whose older "
                "tokens are forgotten"
            )
        self.window = window

    def _make_room(self, tokens: int) -> None:
        """Forgets what the window has passed when that is much, else grows."""
        held = self.length - self.forgotten
        if held + tokens <= self.cache.max_seqlen:
            return
        if self.window is not None:
            kept = self.window - 1 + _KEPT_FOR_ROLLBACK
            if 4 * (held - kept) >= held:
                capacity = max(_FIRST_CAPACITY, 2 * (kept + tokens))
                forgotten = _cache_storage.forget(self.cache, held - kept, capacity)
                self.forgotten += forgotten
                held -= forgotten
        if held + tokens > self.cache.max_seqlen:
            self.cache.grow(max(held + tokens, 2 * self.cache.max_seqlen))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.max_seqlen is None else self.max_seqlen

    def reset(self) -> None:
        if self.is_initialized:
            self.cache.reset()
        self.length = self.forgotten = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``−tokens_to_remove`` tokens; a positive number is the length to keep, as it once was."""
        kept = tokens_to_remove if tokens_to_remove > 0 else self.length + tokens_to_remove
        if not self.is_initialized or kept >= self.length:
            return
        kept = max(kept, 0)
        if self.window is not None and self.forgotten > max(0, kept - self.window + 1):
            raise ValueError(
                f"OnepassCache: crop: got a length of {kept}; need at least {self.forgotten + self.window - 1}: a "
                f"layer has forgotten what its window of {self.window} had passed"
            )
        self.length = kept
        for sequence in range(self.cache.batch):
            self.cache.truncate(sequence, kept - self.forgotten)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self.cache.select(indices)
            self.batch_size = self.cache.batch

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.cache.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("OnepassCache: offload: got a request to; need a cache without offloading")

    prefetch = offload


class CachedStates(torch.Tensor):
    """Keys or values of a layer, (batch, num_heads_kv, length, dim), carried by model code as if they were a tensor.

    ``onepass_attention`` reads the layer's cache instead. Any operation on this tensor sees dequantized copies.
    """

    layer: OnepassLayer
    side: str

    @staticmethod
    def __new__(cls, layer: OnepassLayer, side: str) -> CachedStates:
        stored = layer.cache.k if side == "k" else layer.cache.v
        shape = (layer.cache.batch, stored.shape[1], layer.length, stored.shape[3])
        states: CachedStates = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.device)
        states.layer, states.side = layer, side
        return states

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CachedStates({self.side!r}, {tuple(self.shape)}, {self.layer.cache})"

    def dequantized(self) -> Tensor:
        """A dequantized copy; forgotten tokens are zeros."""
        k, v = self.layer.cache.dense(self.dtype, self.shape[2] - self.layer.forgotten)
        return F.pad(k if self.side == "k" else v, (0, 0, self.layer.forgotten, 0))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(CachedStates, lambda states: states.dequantized(), (args, kwargs or {}))
        return func(*args, **kwargs)
