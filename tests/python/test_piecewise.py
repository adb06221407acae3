"""piecewise_attention: two query/key pairs, one softmax."""

from __future__ import annotations

import onepass
import oracle
import pytest
import torch
from onepass._ops import ops
from test_library import compiled_matches_eager
from torch import Tensor
from torch.func import grad, vmap

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def formula(
    operands: tuple[Tensor, ...],
    threshold: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out and LSE, every intermediate in ``dtype``. Every query must see a key, or give an empty row."""
    q1, k1, q2, k2, v = (tensor.to(dtype) for tensor in operands)
    group = q1.shape[1] // k1.shape[1]
    k1, k2, v = (tensor.repeat_interleave(group, 1) for tensor in (k1, k2, v))
    scale = q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    i = torch.arange(q1.shape[2], device=v.device)[:, None] + v.shape[2] - q1.shape[2]
    distance = i - torch.arange(v.shape[2], device=v.device)
    scores = torch.where(distance >= threshold, q2 @ k2.mT, q1 @ k1.mT) * scale
    if causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights @ v, torch.logsumexp(scores, -1)


def random_operands(
    seqlen_q: int, seqlen_k: int, heads: int = 4, heads_kv: int = 2, dim: int = 32, dim_v: int = 24
) -> tuple[Tensor, ...]:
    q1, q2 = (torch.randn(2, heads, seqlen_q, dim) for _ in range(2))
    k1, k2 = (torch.randn(2, heads_kv, seqlen_k, dim) for _ in range(2))
    return q1, k1, q2, k2, torch.randn(2, heads_kv, seqlen_k, dim_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "threshold", "causal"),
    [
        (70, 90, 30, True),
        (70, 90, 30, False),
        (90, 70, 10, True),
        (50, 50, 0, True),
        (50, 50, 51, True),
        (33, 80, -9, False),
    ],
)
def test_against_the_formula(
    seqlen_q: int, seqlen_k: int, threshold: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    operands = tuple(tensor.to(device, dtype).requires_grad_() for tensor in random_operands(seqlen_q, seqlen_k))
    result = onepass.piecewise_attention(*operands, threshold, causal=causal, softmax_scale=0.3, return_lse=True)
    exact, naive = (formula(operands, threshold, causal, 0.3, kind) for kind in (torch.float64, dtype))
    oracle.assert_as_good_as_naive(result.out, exact[0], naive[0], "out")
    assert result.lse is not None
    oracle.assert_as_good_as_naive(result.lse, exact[1], naive[1], "lse")
    dout = torch.randn_like(result.out)
    gradients = torch.autograd.grad(result.out, operands, dout)
    q1, k1, q2, k2, v = operands
    options = oracle.Options(softmax_scale=0.3)
    near, far = (oracle.gradient_addends(q, k, v, options, dout) for q, k in ((q1, k1), (q2, k2)))
    for name, addends, got, want, rough in zip(
        ("dq1", "dk1", "dq2", "dk2", "dv"),
        (near["q"], near["k"], far["q"], far["k"], 0.0),
        gradients,
        torch.autograd.grad(exact[0], operands, dout.double()),
        torch.autograd.grad(naive[0], operands, dout),
        strict=True,
    ):
        oracle.assert_as_good_as_naive(got, want, rough, name, addends)


def test_equality_goes_to_the_second_pair() -> None:
    q1, k1, q2, k2, v = random_operands(6, 6)
    for threshold in (2, 3):
        out = onepass.piecewise_attention(q1, k1, q2, k2, v, threshold, causal=True)
        moved = onepass.piecewise_attention(q1, k1, q2, k2 + 1.0, v, threshold, causal=True)
        differs = (out != moved).any(-1)[0, 0]
        assert differs.tolist() == [i >= threshold for i in range(6)]


def test_gradcheck() -> None:
    operands = tuple(t.double().requires_grad_() for t in random_operands(5, 6, heads=2, heads_kv=1, dim=3, dim_v=2))
    for causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, causal=causal: onepass.piecewise_attention(*t, 2, causal=causal), operands
        )
    assert torch.autograd.gradcheck(lambda *t: onepass.piecewise_attention(*t, 2, return_lse=True)[:2], operands)


def test_gradient_of_the_lse_in_float32(device: torch.device) -> None:
    operands = tuple(tensor.to(device).requires_grad_() for tensor in random_operands(40, 50))
    result = onepass.piecewise_attention(*operands, 13, return_lse=True)
    exact = formula(operands, 13)
    assert result.lse is not None
    got = torch.autograd.grad(result.out.sum() + result.lse.square().sum(), operands)
    want = torch.autograd.grad(exact[0].sum() + exact[1].square().sum(), operands)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=2e-4, rtol=2e-4)


def test_second_order_is_refused() -> None:
    operands = tuple(tensor.double().requires_grad_() for tensor in random_operands(4, 4))
    (first,) = torch.autograd.grad(onepass.piecewise_attention(*operands, 2).sum(), operands[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        first.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    operands = tuple(tensor.double() for tensor in random_operands(5, 6))
    if transposed:
        operands = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in operands)
    torch.library.opcheck(ops.piecewise_attention.default, (*operands, 3), {"causal": True, "softmax_scale": 0.5})
    out, lse = ops.piecewise_attention(*operands, 3)
    torch.library.opcheck(ops.piecewise_attention_backward.default, (torch.randn_like(out), out, lse, *operands, 3), {})
    assert out.stride() == torch.empty_like(out).stride() if not transposed else out.transpose(1, 2).is_contiguous()


def test_compile() -> None:
    compiled_matches_eager(
        lambda *t: onepass.piecewise_attention(*t, 3, causal=True) * 2.0, *random_operands(5, 6, dim_v=32)
    )
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    compiled_matches_eager(lambda q, k, v: onepass.piecewise_attention(q, k, q, k, v, 3), q, k, v)


def test_vmap() -> None:
    operands = tuple(torch.randn(3, *tensor.shape) for tensor in random_operands(5, 6))

    def attend(*tensors: Tensor) -> Tensor:
        return onepass.piecewise_attention(*tensors, 2, causal=True)

    together = vmap(attend)(*operands)
    one_by_one = torch.stack([attend(*(tensor[i] for tensor in operands)) for i in range(3)])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=0)
    shared = vmap(attend, in_dims=(0, None, None, None, None))(operands[0], *(tensor[0] for tensor in operands[1:]))
    torch.testing.assert_close(shared[2], attend(operands[0][2], *(tensor[0] for tensor in operands[1:])))
    per_example = vmap(grad(lambda *t: attend(*t).square().sum(), argnums=(0, 1, 2, 3, 4)))(*operands)
    leaves = [tensor[1].detach().requires_grad_() for tensor in operands]
    alone = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
    for a, b in zip(per_example, alone, strict=True):
        torch.testing.assert_close(a[1], b)


def test_autocast() -> None:
    operands = random_operands(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = onepass.piecewise_attention(*operands, 2)
    expected = onepass.piecewise_attention(*(tensor.bfloat16() for tensor in operands), 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_meta_tensors_give_shapes() -> None:
    result = onepass.piecewise_attention(*(t.to("meta") for t in random_operands(5, 6)), 2, return_lse=True)
    assert result.lse is not None
    assert result.out.shape == (2, 4, 5, 24)
    assert result.lse.shape == (2, 4, 5)


def test_refusals() -> None:
    q1, k1, q2, k2, v = random_operands(5, 6)
    with pytest.raises(
        ValueError, match=r"piecewise_attention: q2: got .*\(2, 4, 4, 32\).*; need shape \(2, 4, 5, 32\)"
    ):
        onepass.piecewise_attention(q1, k1, q2[:, :, :4], k2, v, 2)
    with pytest.raises(TypeError, match=r"piecewise_attention: k2: got float16 .*; need the dtype"):
        onepass.piecewise_attention(q1, k1, q2, k2.half(), v, 2)
    with pytest.raises(TypeError, match=r"piecewise_attention: dist_threshold: got float; need an int"):
        onepass.piecewise_attention(q1, k1, q2, k2, v, 2.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"piecewise_attention: k1: got NoneType; need torch.Tensor"):
        onepass.piecewise_attention(q1, None, q2, k2, v, 2)  # type: ignore[call-overload]
