"""onepass.scaled_dot_product_attention against torch's, and torch's own routed here."""

from __future__ import annotations

import inspect
from typing import Any

import onepass
import onepass.torch_sdpa
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Options
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def by_torch(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def test_signature_is_torchs() -> None:
    documented = F.scaled_dot_product_attention.__doc__ or ""
    header = documented.split("->")[0].replace("\n", " ")
    ours = inspect.signature(onepass.scaled_dot_product_attention)
    expected = [
        ("query", inspect.Parameter.empty),
        ("key", inspect.Parameter.empty),
        ("value", inspect.Parameter.empty),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]
    assert [(p.name, p.default) for p in ours.parameters.values()] == expected
    for name, _ in expected:
        assert name in header


def mask(kind: str, *size: int) -> Tensor:
    if kind == "float":
        return randn(*size)
    chosen = torch.rand(size) > 0.4
    if kind == "padding":
        lengths = torch.randint(0, size[-1] + 1, size[:-1])
        chosen = torch.arange(size[-1]) >= lengths[..., None]  # left padding, some rows wholly masked
    return chosen


@pytest.mark.parametrize(
    ("q", "k", "v", "options"),
    [
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), {}),
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8), {"is_causal": True}),
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6), {"is_causal": True, "scale": 0.2}),
        ((2, 4, 7, 8), (2, 4, 5, 8), (2, 4, 5, 6), {"is_causal": True}),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), {"enable_gqa": True}),
        ((4, 5, 8), (2, 7, 8), (2, 7, 6), {"enable_gqa": True}),
        ((2, 4, 5, 8), (2, 2, 7, 8), (2, 1, 7, 6), {"enable_gqa": True}),
        ((5, 8), (7, 8), (7, 6), {"is_causal": True}),
        ((3, 5, 8), (3, 7, 8), (3, 7, 6), {}),
        ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6), {}),
        ((2, 4, 5, 8), (1, 4, 7, 8), (4, 7, 6), {}),
        ((2, 1, 4, 5, 8), (3, 1, 7, 8), (3, 4, 7, 6), {}),
    ],
    ids=str,
)
def test_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], options: dict[str, Any]) -> None:
    operands = [randn(*size).requires_grad_() for size in (q, k, v)]
    ours, theirs = onepass.scaled_dot_product_attention(*operands, **options), by_torch(*operands, **options)
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, operands, dout), torch.autograd.grad(theirs, operands, dout), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["float", "bool", "padding"])
@pytest.mark.parametrize(
    ("leading", "size"),
    [
        ((2, 4), (2, 4, 5, 7)),
        ((2, 4), (2, 1, 1, 7)),
        ((2, 4), (1, 1, 1, 7)),
        ((2, 4), (4, 5, 7)),
        ((2, 4), (5, 7)),
        ((2, 4), (7,)),
        ((2, 4), (2, 1, 5, 1)),
        ((3,), (3, 5, 7)),
        ((), (5, 7)),
        ((2, 3, 4), (3, 1, 1, 7)),
        ((2, 3, 4), (2, 3, 4, 5, 7)),
        ((2, 3, 4), (2, 1, 1, 1, 7)),
    ],
    ids=str,
)
def test_masks(kind: str, leading: tuple[int, ...], size: tuple[int, ...]) -> None:
    q, k, v = randn(*leading, 5, 8), randn(*leading, 7, 8), randn(*leading, 7, 6)
    chosen = mask(kind, *size)
    theirs = by_torch(q, k, v, chosen)
    assert theirs.isfinite().all(), "wholly masked rows are 0 in torch"
    torch.testing.assert_close(onepass.scaled_dot_product_attention(q, k, v, chosen), theirs)


def test_padding_masks_become_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys beyond the bounds are not even read: NaN there does not reach the output, as a bias would let it."""
    q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
    k[0, :, :2] = v[0, :, :2] = v[1, :, 4:] = torch.nan
    chosen = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)[:, None, None]
    assert onepass.scaled_dot_product_attention(q, k, v, chosen).isfinite().all()


def test_float_masks_are_differentiable() -> None:
    q, k, v = (randn(2, 4, 5, 8) for _ in range(3))
    for size in ((5, 5), (2, 1, 1, 5), (4, 1, 5)):
        bias = randn(*size).requires_grad_()
        ours = torch.autograd.grad(onepass.scaled_dot_product_attention(q, k, v, bias).square().sum(), bias)
        theirs = torch.autograd.grad(by_torch(q, k, v, bias).square().sum(), bias)
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_applied_and_follows_the_generator() -> None:
    q = torch.randn(1, 2, 64, 8)
    torch.manual_seed(1)
    first = onepass.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(onepass.scaled_dot_product_attention(q, q, q, dropout_p=0.5), first)
    assert not torch.equal(onepass.scaled_dot_product_attention(q, q, q, dropout_p=0.5), first)


# torch's own, routed here -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}], ids=str)
def test_routing(options: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 33, 4, 16).transpose(1, 2).to(dtype).requires_grad_() for _ in range(3))
    options = dict(options)
    bias = None
    if "attn_mask" in options:
        options["attn_mask"] = mask(options["attn_mask"], 2, 1, 33, 33)
        if options["attn_mask"].dtype == torch.bool:
            bias = torch.zeros(2, 1, 33, 33).masked_fill(~options["attn_mask"], -torch.inf)
        else:
            options["attn_mask"] = bias = options["attn_mask"].to(dtype)
    dout = torch.randn(2, 4, 33, 16).to(dtype)
    with onepass.torch_sdpa.enable():
        out = F.scaled_dot_product_attention(q, k, v, **options)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    reference = Options(causal=options.get("is_causal", False), bias=bias)
    exact = oracle.with_gradients(q, k, v, reference, dout)
    naive = oracle.with_gradients(q, k, v, reference, dout, dtype)
    oracle.assert_as_good_as_naive(out, exact.out, naive.out, "out")
    for name, gradient in zip("qkv", gradients, strict=True):
        oracle.assert_as_good_as_naive(
            gradient, exact.gradients[name], naive.gradients[name], name, exact.addends[name]
        )


def test_routing_begins_and_ends() -> None:
    q = torch.randn(1, 2, 5, 8)

    def names() -> set[str]:
        from torch.profiler import profile

        with profile() as record:
            F.scaled_dot_product_attention(q, q, q)
        return {event.key for event in record.key_averages()}

    assert not onepass.torch_sdpa.is_enabled()
    assert "onepass::attention_with_lse" not in names()
    onepass.torch_sdpa.enable()
    onepass.torch_sdpa.enable()
    assert onepass.torch_sdpa.is_enabled()
    assert "onepass::attention_with_lse" in names()
    onepass.torch_sdpa.disable()
    assert "onepass::attention_with_lse" not in names()
    with onepass.torch_sdpa.enable():
        assert "onepass::attention_with_lse" in names()
    assert not onepass.torch_sdpa.is_enabled()


def test_routing_compiles() -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True)

    expected = step(q, k, v)
    expected_gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with onepass.torch_sdpa.enable():
        out = torch.compile(step, fullgraph=True)(q, k, v)
        gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(out, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
