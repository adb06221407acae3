"""Batching rules for ``torch.func.vmap``: the mapped dimension is folded into the batch, so that one call does the work
of the loop. What cannot be folded is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from onepass._ops import bound_arguments, ops

_OPERANDS = ("q", "k", "q1", "k1", "q2", "k2", "v", "dout", "out", "lse")
_SCALARS_OF_SEQUENCES = ("key_begin", "key_end")


def _refuse(operation: str, argument: str, received: str, required: str) -> None:
    raise NotImplementedError(f"{operation}: {argument}: got {received}; need {required}")


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``(batch, …)``, mapped over ``dim`` or shared by all, as ``(size·batch, …)``."""
    mapped = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.reshape(-1, *mapped.shape[2:])


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, -1, *tensor.shape[1:])


def _fold_bias(bias: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """A bias that all share and that broadcasts over the batch stays as it is; any other gets the folded batch."""
    if dim is None and bias.shape[0] == 1:
        return bias
    mapped = bias.unsqueeze(0).expand(size, *bias.shape) if dim is None else bias.movedim(dim, 0)
    return mapped.expand(size, batch, *mapped.shape[2:]).reshape(size * batch, *mapped.shape[2:])


def _fold_slopes(slopes: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    if dim is None and slopes.dim() == 1:
        return slopes
    mapped = slopes.unsqueeze(0).expand(size, *slopes.shape) if dim is None else slopes.movedim(dim, 0)
    if mapped.dim() == 2:  # (size, num_heads)
        mapped = mapped.unsqueeze(1).expand(size, batch, mapped.shape[1])
    return mapped.reshape(size * batch, mapped.shape[-1])


def _folded(name: str, size: int, args: SimpleNamespace, dims: SimpleNamespace) -> dict[str, Any]:
    """The arguments of one call over the folded batch."""
    for argument in ("sinks", "dropout_state"):
        if getattr(dims, argument, None) is not None:
            _refuse(name, argument, "a tensor mapped by vmap", "one that all mapped calls share")
    values = dict(vars(args))
    for argument in (*_OPERANDS, *_SCALARS_OF_SEQUENCES):
        if values.get(argument) is not None:
            values[argument] = _fold(values[argument], getattr(dims, argument), size)
    batch = values["v"].shape[0] // size
    if values.get("bias") is not None:
        shared = dims.bias is None and not values.get("bias_gradient")
        if shared:
            values["bias"] = _fold_bias(args.bias, None, size, batch)
        else:  # a gradient for each mapped call needs a bias for each
            bias = args.bias.unsqueeze(0).expand(size, *args.bias.shape) if dims.bias is None else args.bias
            values["bias"] = _fold_bias(bias, dims.bias or 0, size, batch)
    if values.get("alibi_slopes") is not None:
        values["alibi_slopes"] = _fold_slopes(args.alibi_slopes, dims.alibi_slopes, size, batch)
    return values


def _dense_rule(name: str) -> Any:
    operation = getattr(ops, name).default

    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        arguments = bound_arguments(name, args, kwargs)
        dims = SimpleNamespace(**dict.fromkeys(vars(arguments)))
        vars(dims).update(zip(vars(arguments), in_dims, strict=False))
        if getattr(arguments, "sinks_gradient", False):
            _refuse(name, "sinks", "a gradient under vmap", "a call without vmap, or sinks without a gradient")
        values = _folded(name, size, arguments, dims)
        results = operation(*values.values())
        if isinstance(results, Tensor):
            return _unfold(results, size), 0
        unfolded: list[Tensor] = []
        for result, field in zip(results, operation._schema.returns, strict=True):
            if field.name == "dbias" and arguments.bias_gradient:
                result = _sum_over_broadcast_batch(_unfold(result, size), arguments.bias, dims.bias)
            elif result.dim() > 1:
                result = _unfold(result, size)
            else:  # an output that was not asked for
                result = result.unsqueeze(0).expand(size, *result.shape)
            unfolded.append(result)
        return tuple(unfolded), tuple(0 for _ in unfolded)

    return rule


def _sum_over_broadcast_batch(dbias: Tensor, bias: Tensor, dim: int | None) -> Tensor:
    """``(size, batch, …)`` in the shape of the mapped bias, whose own batch may be 1."""
    shape = bias.shape if dim is None else bias.movedim(dim, 0).shape[1:]
    return dbias.sum(1, keepdim=True) if shape[0] == 1 else dbias


def _merge_rule(info: Any, in_dims: Sequence[Any], *tensors: Tensor) -> tuple[Any, Any]:
    folded = [_fold(tensor, dim, info.batch_size) for tensor, dim in zip(tensors, in_dims, strict=True)]
    out, lse = ops.merge_states(*folded)
    return (_unfold(out, info.batch_size), _unfold(lse, info.batch_size)), (0, 0)


def _varlen_rule(name: str) -> Any:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        _refuse(name, "q", "a ragged batch under vmap", "one call over all sequences, packed one after the other")

    return rule


for _name in (
    "plain_attention",
    "attention",
    "attention_with_lse",
    "attention_backward",
    "piecewise_attention",
    "piecewise_attention_backward",
):
    torch.library.register_vmap(f"onepass::{_name}", _dense_rule(_name))
for _name in ("varlen_attention", "varlen_attention_with_lse", "varlen_attention_backward"):
    torch.library.register_vmap(f"onepass::{_name}", _varlen_rule(_name))
torch.library.register_vmap("onepass::merge_states", _merge_rule)
