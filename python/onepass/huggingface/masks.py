"""The mask function: what a model may attend to, described in O(seqlen) memory instead of stored in O(seqlen²).

transformers builds masks from small functions (causal, sliding window, padding, packed sequences). Those that onepass
applies inside its kernels are recognised here and travel as a :class:`Visibility`; anything else becomes the usual
boolean mask, so an unknown pattern costs memory but is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Pattern:
    """A mask function in onepass' terms: ``causal``, a window in onepass' convention (the token itself not counted),
    and for packed rows the id of the sequence that each token belongs to, (batch, seqlen). ``by_position``: the
    pattern compares positions within a sequence and not indices, which is the same only inside one sequence."""

    causal: bool = False
    window: Window = (None, None)
    sequence_ids: Tensor | None = None
    by_position: bool = False

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(
            self.causal or other.causal,
            (_tighter(self.window[0], other.window[0]), _tighter(self.window[1], other.window[1])),
            self.sequence_ids if other.sequence_ids is None else other.sequence_ids,
            self.by_position or other.by_position,
        )


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def recognise(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern that ``mask_function`` describes, or None if it is not one that onepass knows.

    transformers composes mask functions as closures; they are told apart by qualified name and read through their
    cells. A name that a future version changes is simply not recognised.
    """
    if mask_function is causal_mask_function:
        return Pattern(causal=True)
    if mask_function is bidirectional_mask_function:
        return Pattern()
    name = getattr(mask_function, "__qualname__", "").removesuffix(".<locals>.inner_mask")
    cells = _cells(mask_function)
    match name:
        case "sliding_window_overlay":  # key > query − W
            return Pattern(window=(int(cells["sliding_window"]) - 1, None))
        case "sliding_window_bidirectional_overlay":  # |query − key| ≤ W
            return Pattern(window=(int(cells["sliding_window"]), int(cells["sliding_window"])))
        case "packed_sequence_mask_function":
            return Pattern(sequence_ids=cells["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            inner = recognise(cells["mask_function"])
            return inner and replace(inner, by_position=True)
        case "and_masks.<locals>.and_mask":
            whole = Pattern()
            for part in cells["mask_functions"]:
                pattern = recognise(part)
                if pattern is None:
                    return None
                whole = whole & pattern
            return whole
    return None


def _cells(function: Callable[..., Any]) -> dict[str, Any]:
    closure = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, closure, strict=True)}


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees. Lengths are in tokens; i is a query, j a key of the same batch row.

    Of the ``seqlen_k`` keys only the first ``keys_used`` are in use (a static cache's tail is not); the diagonal runs
    from the last query to the last used key (bottom-right). ``key_begin``/``key_end``: int32 (batch), visible range of
    each row's keys. ``cu_seqlens``: int32 (sequences + 1), for packed rows, over the flattened (batch · seqlen) tokens.
    ``dense``: the whole mask when no description fits, boolean or added to the scores, broadcastable to
    (batch, num_heads, seqlen_q, seqlen_k); the rest is then unused.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    keys_used: int
    causal: bool = False
    window: Window = (None, None)
    key_begin: Tensor | None = None
    key_end: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    dense: Tensor | None = None
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_padded(self) -> bool:
        """Whether more than a pattern is described: padding, or a whole mask."""
        return self.dense is not None or self.key_begin is not None or self.key_end is not None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """``dense`` as a score bias (hidden: −inf), made once for all layers of a forward pass."""
        if dtype not in self._bias:
            assert self.dense is not None
            mask = self.dense
            if mask.dtype == torch.bool:
                mask = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
            self._bias[dtype] = mask.to(dtype)
        return self._bias[dtype]

    def to_dense(self, device: torch.device) -> Tensor:
        """The boolean mask (batch, 1, seqlen_q, seqlen_k), true where the key is visible."""
        if self.dense is not None:
            return self.dense
        query = torch.arange(self.seqlen_q, device=device)[:, None] + (self.keys_used - self.seqlen_q)
        key = torch.arange(self.seqlen_k, device=device)
        visible = (key < self.keys_used).expand(self.batch, 1, self.seqlen_q, self.seqlen_k)
        if self.causal:
            visible = visible & (key <= query)
        left, right = self.window
        if left is not None:
            visible = visible & (key >= query - left)
        if right is not None:
            visible = visible & (key <= query + right)
        if self.key_begin is not None:
            visible = visible & (key >= self.key_begin[:, None, None, None])
        if self.key_end is not None:
            visible = visible & (key < self.key_end[:, None, None, None])
        if self.cu_seqlens is not None:
            tokens = torch.arange(self.batch * self.seqlen_q, device=device, dtype=self.cu_seqlens.dtype)
            ids = torch.bucketize(tokens, self.cu_seqlens, right=True).view(self.batch, 1, self.seqlen_q)
            visible = visible & (ids[..., :, None] == ids[..., None, :])
        return visible


class VisibleKeys(torch.Tensor):
    """A :class:`Visibility` that models can carry as if it were the boolean mask (batch, 1, seqlen_q, seqlen_k).

    Model code passes masks along, and sometimes slices, moves or combines them. Such an operation turns this tensor
    into the real boolean mask. Adding it to scores is refused: only a model whose own eager code runs in spite of
    ``attn_implementation="onepass"`` does that, and it expects a float mask.
    """

    visibility: Visibility

    @staticmethod
    def __new__(cls, visibility: Visibility, device: torch.device) -> VisibleKeys:
        shape = (visibility.batch, 1, visibility.seqlen_q, visibility.seqlen_k)
        mask: VisibleKeys = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.visibility = visibility
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"VisibleKeys({self.visibility})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return VisibleKeys(args[0].visibility, args[0].device)
        if func is aten.slice.Tensor and _takes_all(*args, **(kwargs or {})):
            return args[0]
        if func in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor):
            raise NotImplementedError(
                'attn_implementation="onepass": this model adds the mask to its scores in code of its own and never '
                'calls the attention function; load it with attn_implementation="eager"'
            )
        args, kwargs = tree_map_only(VisibleKeys, lambda m: m.visibility.to_dense(m.device), (args, kwargs or {}))
        return func(*args, **kwargs)


def _takes_all(mask: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return (start or 0) == 0 and step == 1 and (end is None or end >= mask.shape[dim])


def onepass_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function for ``"onepass"``; arguments as ``transformers.masking_utils.sdpa_mask``.

    Args:
        attention_mask: boolean (batch, tokens), the padding mask, or None.

    Returns:
        A :class:`VisibleKeys`, except where the mask must be a plain boolean tensor (or None) because a compiler
        records this call or the one it goes to.
    """
    shape = {"q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset, "device": device}
    what = {"batch_size": batch_size, "mask_function": mask_function, "attention_mask": attention_mask}
    # The decode step of a static cache is what users compile; its mask is one row and must keep its type and shape.
    compiled_decode = q_length == 1 and not allow_is_causal_skip
    if compiled_decode or is_tracing(attention_mask):
        return sdpa_mask(**what, **shape, q_offset=q_offset, allow_is_causal_skip=allow_is_causal_skip, **kwargs)

    device = torch.device(device)
    offset = int(q_offset)
    visibility = _describe(batch_size, q_length, kv_length, offset - kv_offset, mask_function, device)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if visibility is not None and padding is not None:
        visibility = _hide_padding(visibility, padding[:, kv_offset : kv_offset + kv_length])
    if visibility is None:
        kwargs.pop("allow_is_bidirectional_skip", None)
        dense = sdpa_mask(**what, **shape, q_offset=offset, allow_is_causal_skip=False, **kwargs)
        visibility = Visibility(batch_size, q_length, kv_length, kv_length, dense=dense)
    return VisibleKeys(visibility, device)


def _describe(
    batch: int, seqlen_q: int, seqlen_k: int, shift: int, mask_function: Callable[..., Any], device: torch.device
) -> Visibility | None:
    """The visibility of a recognised pattern without padding. Query i stands at key position i + ``shift``."""
    pattern = recognise(mask_function)
    if pattern is None or (pattern.by_position and pattern.sequence_ids is None):
        return None
    keys_used = seqlen_q + shift if pattern.causal else seqlen_k
    if not 0 < keys_used <= seqlen_k:
        return None
    if pattern.window != (None, None) and keys_used != seqlen_q + shift:
        return None  # a window without a causal mask, around a diagonal that does not end at the last key
    visibility = Visibility(batch, seqlen_q, seqlen_k, keys_used, pattern.causal, pattern.window)
    if pattern.sequence_ids is None:
        return visibility
    if seqlen_q != seqlen_k or shift != 0:
        return None
    ids = pattern.sequence_ids.expand(batch, seqlen_q)
    is_first = torch.ones((batch, seqlen_q), dtype=torch.bool, device=device)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = is_first.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([begins, begins.new_tensor([batch * seqlen_q])]).to(torch.int32)
    return replace(visibility, cu_seqlens=cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))


def _hide_padding(visibility: Visibility, padding: Tensor) -> Visibility | None:
    """Adds a padding mask, boolean (batch, seqlen_k); None when a row's visible keys are not one contiguous run."""
    visible = padding[:, : visibility.keys_used].to(torch.int32)
    if visibility.cu_seqlens is not None:
        return None
    count = visible.sum(dim=1)
    begin = visible.argmax(dim=1)
    end = visibility.keys_used - visible.flip(1).argmax(dim=1)
    end = torch.where(count > 0, end, begin)
    # One read of the device for all three facts.
    contiguous, from_first, to_last = torch.stack(
        [(end - begin == count).all(), (begin == 0).all(), (end == visibility.keys_used).all()]
    ).tolist()
    if not contiguous:
        return None
    return replace(
        visibility,
        key_begin=None if from_first else begin.to(torch.int32),
        key_end=None if to_last else end.to(torch.int32),
    )
