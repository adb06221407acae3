"""Routes ``torch.nn.functional.scaled_dot_product_attention`` here, for models that cannot be changed.

    import onepass.torch_sdpa
    onepass.torch_sdpa.enable()             # until disable()
    with onepass.torch_sdpa.enable():       # or for a block
        model(inputs)

The kernels behind torch's selector are replaced, so autograd, torch.compile, DTensor and ``context_parallel`` work as
with torch's own: on the CPU ``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward; on CUDA, in a build
with CUDA and a torch that has the registry of ``torch.nn.attention``, the flash-attention operations. Which calls
arrive is still the selector's choice: on the CPU, calls with dropout or with a mask that needs a gradient go to torch's
reference math, and so do float64 and ``enable_gqa``. Call :func:`onepass.scaled_dot_product_attention` for those.
"""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from onepass._inputs import as_score_dtype, draw_dropout_state
from onepass._library import call
from onepass._ops import ops

PROVIDER = "onepass"  # its name in torch's registry of flash-attention implementations

_Gradients = tuple[Tensor, Tensor, Tensor]
_libraries: list[Library] = []


class Routing:
    """What :func:`enable` gives: already in force; as a context manager, it ends with the block."""

    def __enter__(self) -> Routing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable()


def enable() -> Routing:
    """Route torch's attention to onepass until :func:`disable`, or until the end of the ``with`` block."""
    if not _libraries:
        _libraries.append(_register_cpu())
        if _has_cuda_provider():
            torch.nn.attention.activate_flash_attention_impl(PROVIDER)
    return Routing()


def disable() -> None:
    """Give torch its own kernels back."""
    while _libraries:
        _libraries.pop()._destroy()
    if _has_cuda_provider() and torch.nn.attention.current_flash_attention_impl() == PROVIDER:
        torch.nn.attention.restore_flash_attention_impl()


def is_enabled() -> bool:
    """Whether torch's attention is routed to onepass."""
    return bool(_libraries)


def _register_cpu() -> Library:
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch 2.11 warns of the override that is the purpose here
        warnings.simplefilter("ignore", UserWarning)
        library.impl("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, "CPU")
        library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, "CPU")
    return library


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    bias = _bias_of(attn_mask, query)
    out, lse, _ = call(ops.attention_with_lse, query, key, value, is_causal, scale, bias, top_left=True)
    return out, _heads_inner(lse)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> _Gradients:
    bias = _bias_of(attn_mask, query)
    dq, dk, dv = _gradients(grad_out, out, logsumexp, query, key, value, is_causal, scale, bias=bias, top_left=True)
    return _heads_inner(dq), _heads_inner(dk), _heads_inner(dv)


def _gradients(*tensors_and_options: Any, **options: Any) -> _Gradients:
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, _, _ = call(ops.attention_backward, *tensors_and_options, deterministic=deterministic, **options)
    return dq, dk, dv


def _bias_of(attn_mask: Tensor | None, query: Tensor) -> Tensor | None:
    if attn_mask is None:
        return None
    return as_score_dtype(PROVIDER, "attn_mask", query, attn_mask)[(None,) * (4 - attn_mask.dim())]


def _heads_inner(tensor: Tensor) -> Tensor:
    """In the memory order (batch, seqlen, heads, …), which torch's meta kernels promise for these results."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


# CUDA -------------------------------------------------------------------------------------------------------------


class _Handle:
    """What torch's registry keeps while the implementation is active."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def remove(self) -> None:
        self._library._destroy()


def _has_cuda_provider() -> bool:
    return PROVIDER in _list_implementations()


def _list_implementations() -> list[str]:
    listed = getattr(torch.nn.attention, "list_flash_attention_impls", None)
    return [] if listed is None else listed()


def _register_cuda() -> _Handle:
    library = Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", _cuda_forward, "CUDA")
    library.impl("_scaled_dot_product_flash_attention_backward", _cuda_backward, "CUDA")
    return _Handle(library)


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask:
        raise NotImplementedError(f"{PROVIDER}: return_debug_mask: got True; need False")
    # The dropout state stays on the host: kernels take seed and offset as arguments.
    state = draw_dropout_state(query.device) if dropout_p > 0.0 else torch.zeros(2, dtype=torch.int64)
    out, lse, _ = call(
        ops.attention_with_lse, query, key, value, is_causal, scale, dropout_state=state, dropout_p=dropout_p
    )
    unused = torch.empty((), dtype=torch.int64)
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, query.new_empty(0)


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> _Gradients:
    return _gradients(
        grad_out,
        out,
        logsumexp,
        query,
        key,
        value,
        is_causal,
        scale,
        dropout_state=philox_seed,
        dropout_p=dropout_p,
    )


if (
    torch.version.cuda
    and "built without CUDA" not in ops.info()
    and hasattr(torch.nn.attention, "register_flash_attention_impl")
):
    torch.nn.attention.register_flash_attention_impl(PROVIDER, register_fn=_register_cuda)
