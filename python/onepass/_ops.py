"""The operations ``torch.ops.onepass``, their options, and their fake kernels (shapes, strides and dtypes for
torch.compile and export).

The kernels and their schemas are in ``csrc/``; option names and their order below are those of the schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepass import _library  # noqa: F401  (defines torch.ops.onepass)

ops = torch.ops.onepass


class Score(NamedTuple):
    """The options of a call that are not tensors."""

    causal: bool = False
    softmax_scale: float | None = None
    dropout_p: float = 0.0
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    top_left: bool = False
    alibi_zero_for_future: bool = False


class ScoreTensors(NamedTuple):
    """The options of a call that are tensors."""

    bias: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_begin: Tensor | None = None
    key_end: Tensor | None = None
    dropout_state: Tensor | None = None


def option_arguments(score: Score, tensors: ScoreTensors) -> tuple[Any, ...]:
    """Both kinds of options in the order of the schemas."""
    return (score.causal, score.softmax_scale, *tensors, *score[2:])


def bound_arguments(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> SimpleNamespace:
    """The arguments of operation ``name`` by their names in its schema, defaults filled in (torch leaves them out)."""
    schema = getattr(ops, name).default._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values.update(zip(values, args, strict=False))
    return SimpleNamespace(**(values | kwargs))


# Fake kernels -----------------------------------------------------------------------------------------------------


def _empty_in_order_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Dense, dimensions before the last in the memory order of ``like`` (``empty_in_order_of`` in csrc/tensor.h)."""
    order = list(range(len(shape)))
    for i in range(1, len(shape) - 1):
        j = i
        while j > 0 and like.stride(order[j - 1]) < like.stride(order[j]):
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    strides: list[Any] = [1] * len(shape)
    stride: Any = 1
    for dim in reversed(order):
        strides[dim] = stride
        stride = stride * torch.sym_max(shape[dim], 1)
    return like.new_empty_strided(shape, strides)


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _empty_results(q: Tensor, k: Tensor, v: Tensor, total_attention: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(q.dim() in (3, 4), lambda: "q: need 4 dimensions, or 3 when ragged")
    ragged = q.dim() == 3
    rows, keys = ([q.shape[1]], [q.shape[1]]) if ragged else (list(q.shape[:2]), list(q.shape[:2]))
    dtype = _statistics_dtype(q)
    out = _empty_in_order_of(q, [*q.shape[:-1], v.shape[-1]])
    lse = q.new_empty([*rows, q.shape[0] if ragged else q.shape[2]], dtype=dtype)
    total_shape = [*keys, k.shape[0] if ragged else k.shape[2]] if total_attention else [0]
    return out, lse, q.new_empty(total_shape, dtype=dtype)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_gradient: bool, sinks_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _statistics_dtype(q)
    dbias = q.new_empty(bias.shape if bias is not None and bias_gradient else [0], dtype=dtype)
    dsinks = q.new_empty([q.shape[1] if sinks_gradient else 0], dtype=dtype)
    dq, dk, dv = (_empty_in_order_of(operand, operand.shape) for operand in (q, k, v))
    return dq, dk, dv, dbias, dsinks


def _fake(name: str, results: Callable[[SimpleNamespace], Any]) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return results(bound_arguments(name, args, kwargs))

    torch.library.register_fake(f"onepass::{name}", kernel)


for _prefix in ("", "varlen_"):
    _fake(f"{_prefix}attention", lambda a: _empty_results(a.q, a.k, a.v, False)[0])
    _fake(f"{_prefix}attention_with_lse", lambda a: _empty_results(a.q, a.k, a.v, a.return_total_attention))
    _fake(
        f"{_prefix}attention_backward",
        lambda a: _empty_gradients(a.q, a.k, a.v, a.bias, a.bias_gradient, a.sinks_gradient),
    )
_fake("plain_attention", lambda a: _empty_results(a.q, a.k, a.v, False)[0])
_fake(
    "total_attention",
    lambda a: a.q.new_empty([a.q.shape[0], a.q.shape[1], a.k.shape[2]], dtype=_statistics_dtype(a.q)),
)
_fake("piecewise_attention", lambda a: _empty_results(a.q1, a.k1, a.v, False)[:2])
_fake(
    "piecewise_attention_backward",
    lambda a: tuple(_empty_in_order_of(operand, operand.shape) for operand in (a.q1, a.k1, a.q2, a.k2, a.v)),
)
_fake("merge_states", lambda a: (_empty_in_order_of(a.out_a, a.out_a.shape), a.lse_a.new_empty(a.lse_a.shape)))
