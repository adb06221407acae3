"""Derivatives: gradcheck of every option on float64 tensors, refusals, and torch.func transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onepass
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """gradcheck makes thousands of tiny calls, for which waking threads costs more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaf(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, top left": {"causal": True, "alignment": "top_left"},
    "scale": {"softmax_scale": 0.7},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.2},
    "alibi": {"alibi_slopes": onepass.alibi_slopes(4)},
    "alibi, future at 0": {"alibi_slopes": onepass.alibi_slopes(4), "alibi_zero_for_future": True},
    "padding": {
        "key_begin": torch.tensor([1, 0], dtype=torch.int32),
        "key_end": torch.tensor([6, 3], dtype=torch.int32),
    },
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_gradcheck(options: dict[str, Any]) -> None:
    q, k, v = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(2, 2, 6, 2)

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout mask every time
        out: Tensor = onepass.attention(*tensors, **options)
        return out

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize(
    "size", [(2, 4, 5, 6), (4, 5, 6), (1, 4, 1, 6), (5, 1), (2, 1, 1, 6), (6,), (1, 1, 1, 1), ()], ids=str
)
def test_gradcheck_of_broadcast_bias_and_sinks(size: tuple[int, ...]) -> None:
    q, k, v, bias, sinks = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(2, 2, 6, 2), leaf(*size), leaf(4)
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias, sinks: onepass.attention(q, k, v, bias=bias, sinks=sinks, causal=True),
        (q, k, v, bias, sinks),
    )


def test_gradcheck_of_an_expanded_bias() -> None:
    q, k, v, bias = leaf(2, 2, 4, 3), leaf(2, 2, 5, 3), leaf(2, 2, 5, 3), leaf(4, 5)
    assert torch.autograd.gradcheck(
        lambda bias: onepass.attention(q, k, v, bias=bias.expand(2, 2, 4, 5).transpose(0, 1)), (bias,)
    )


@pytest.mark.parametrize("options", [{}, {"causal": True, "sinks": True}, {"softcap": 1.1, "bias": True}], ids=str)
def test_gradcheck_of_the_lse(options: dict[str, Any]) -> None:
    q, k, v, extra = leaf(2, 4, 5, 3), leaf(2, 2, 3, 3), leaf(2, 2, 3, 2), leaf(4)

    def call(q: Tensor, k: Tensor, v: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(options)
        if "sinks" in values:
            values["sinks"] = extra
        if "bias" in values:
            values["bias"] = extra[:, None, None]
        result = onepass.attention(q, k, v, **values, return_lse=True)
        # Empty rows have lse −inf, whose difference quotient is no number.
        return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, extra))
    assert torch.autograd.gradcheck(lambda *tensors: call(*tensors)[1], (q, k, v, extra))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (1, None), "softcap": 2.0}], ids=str)
def test_gradcheck_ragged(options: dict[str, Any]) -> None:
    q, k, v, sinks = leaf(7, 4, 3), leaf(9, 2, 3), leaf(9, 2, 2), leaf(4)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([0, 4, 5, 9], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        result = onepass.varlen_attention(q, k, v, cu_q, cu_k, sinks=sinks, **options, return_lse=True)
        return result.out, result.lse.masked_fill(result.lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    bias, sinks = leaf(2, 1, 4), leaf(2)
    onepass.attention(q, k, v, bias=bias).sum().backward()
    assert bias.grad is not None
    onepass.attention(q, k, v, sinks=sinks).sum().backward()
    assert sinks.grad is not None
    assert q.grad is None
    with torch.no_grad():
        assert not onepass.attention(q, k, v, bias=bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_of_any_float_dtype(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    bias = torch.randn(5, 5).to(dtype).requires_grad_()
    onepass.attention(q, k, v, bias=bias).square().sum().backward()
    reference = bias.detach().float().requires_grad_()
    onepass.attention(q, k, v, bias=reference).square().sum().backward()
    assert bias.grad is not None
    assert reference.grad is not None
    assert bias.grad.dtype == dtype
    torch.testing.assert_close(bias.grad, reference.grad.to(dtype))


def test_expanded_and_strided_gradients() -> None:
    q = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    k, v = leaf(1, 2, 6, 8), leaf(1, 2, 6, 8)
    expanded = onepass.attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
    repeated = onepass.attention(q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))
    # sum() gives an expanded gradient; a transposed one has strided rows.
    for loss in (lambda out: out.sum(), lambda out: (out.transpose(-1, -2) * torch.arange(5.0)).sum()):
        for a, b in zip(
            torch.autograd.grad(loss(expanded), (k, v), retain_graph=True),
            torch.autograd.grad(loss(repeated), (k, v), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


# Refusals ---------------------------------------------------------------------------------------------------------


def test_second_order_is_refused() -> None:
    q, k, v = leaf(1, 2, 4, 3), leaf(1, 2, 4, 3), leaf(1, 2, 4, 3)
    (dq,) = torch.autograd.grad(onepass.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention_backward: second-order gradients: got .* need first"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="second-order"):
        grad(lambda q: grad(lambda q: onepass.attention(q, k, v).sum())(q).sum())(q)


def test_slopes_are_not_differentiable() -> None:
    q = torch.randn(1, 2, 4, 3)
    slopes = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="attention: alibi_slopes: got a tensor that requires grad"):
        onepass.attention(q, q, q, alibi_slopes=slopes)


def test_total_attention_has_no_gradient() -> None:
    q = leaf(1, 2, 4, 3)
    result = onepass.attention(q, q, q, return_total_attention=True)
    assert result.out.requires_grad
    assert not result.total_attention.requires_grad


def test_lse_gradient_with_dropout_is_refused() -> None:
    q = leaf(1, 2, 4, 3)
    result = onepass.attention(q, q, q, dropout_p=0.5, return_lse=True)
    result.out.sum().backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match=r"attention_backward: lse: got a gradient with dropout_p 0.5"):
        result.lse.sum().backward()


# torch.func -------------------------------------------------------------------------------------------------------


def mapped_and_looped(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    in_dims = tuple(None if tensor is None else 0 for tensor in tensors)
    size = next(tensor.shape[0] for tensor in tensors if tensor is not None)
    together = vmap(function, in_dims=in_dims)(*tensors)
    apart = [function(*(None if t is None else t[i] for t in tensors)) for i in range(size)]
    together = together if isinstance(together, tuple) else (together,)
    for position, result in enumerate(together):
        parts = [part[position] if isinstance(part, tuple) else part for part in apart]
        torch.testing.assert_close(result, torch.stack(parts))


def test_vmap() -> None:
    q, k, v = (torch.randn(3, 2, 4, 5, 8, dtype=torch.float64) for _ in range(3))
    shared = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    bias = torch.randn(3, 1, 4, 1, 5, dtype=torch.float64)
    ends = torch.tensor([[5, 2], [1, 4], [0, 5]], dtype=torch.int32)
    slopes = torch.rand(3, 4)
    mapped_and_looped(lambda q, k, v: onepass.attention(q, k, v, causal=True), q, k, v)
    mapped_and_looped(lambda q: onepass.attention(q, shared, shared, softcap=2.0, key_end=ends[0]), q)
    mapped_and_looped(lambda q, k, bias: onepass.attention(q, k, k, bias=bias, return_lse=True)[:2], q, k, bias)
    mapped_and_looped(lambda q, ends: onepass.attention(q, q, q, key_end=ends), q, ends)
    mapped_and_looped(lambda q, slopes: onepass.attention(q, q, q, alibi_slopes=slopes), q, slopes)
    mapped_and_looped(
        lambda q, k: onepass.merge_states(*onepass.attention(q, k, k, return_lse=True)[:2], q, q.sum(-1)), q, k
    )
    moved = vmap(lambda q: onepass.attention(q, shared, shared), in_dims=2, out_dims=1)(q.movedim(0, 2))
    torch.testing.assert_close(moved[:, 1], onepass.attention(q[1], shared, shared))


def test_gradients_per_example() -> None:
    q = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    k, bias = torch.randn(2, 2, 6, 8, dtype=torch.float64), torch.randn(4, 1, 6, dtype=torch.float64)

    def loss(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return onepass.attention(q, k, k, bias=bias, causal=True).square().sum()

    per_example = grad(loss, argnums=(0, 1, 2))
    together = vmap(per_example, in_dims=(0, None, None))(q, k, bias)
    for position in range(3):
        torch.testing.assert_close(
            together[position], torch.stack([per_example(q[i], k, bias)[position] for i in range(3)])
        )


def test_vmap_refusals() -> None:
    q, sinks = torch.randn(3, 5, 4, 8), torch.randn(3, 4)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="varlen_attention: q: got a ragged batch under vmap"):
        vmap(lambda q: onepass.varlen_attention(q, q, q, bounds, bounds))(q)
    with pytest.raises(NotImplementedError, match="attention: sinks: got a tensor mapped by vmap"):
        vmap(lambda q, sinks: onepass.attention(q[None], q[None], q[None], sinks=sinks[:5]))(q, torch.randn(3, 5))
    assert sinks.shape == (3, 4)
