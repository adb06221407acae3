"""The CUDA backward on many random shapes, ragged batches, values that are not finite, and calls that are queued."""

from __future__ import annotations

import random

import onepass
import oracle
import pytest
import torch
from queued import assert_same_when_queued
from test_cuda_forward import HALVES, draw
from torch import Tensor


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, options: oracle.Options) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    return torch.autograd.grad(onepass.attention(*leaves, **options.arguments()), leaves, dout)


def check(q: Tensor, k: Tensor, v: Tensor, options: oracle.Options, what: str) -> None:
    dout = torch.randn(*q.shape[:-1], v.shape[-1], device="cuda").to(q.dtype)
    exact, naive = (oracle.with_gradients(q, k, v, options, dout, dtype) for dtype in (torch.float64, q.dtype))
    for name, got in zip("qkv", gradients(q, k, v, dout, options), strict=True):
        oracle.assert_as_good_as_naive(
            got, exact.gradients[name], naive.gradients[name], f"{what}: d{name}", exact.addends[name]
        )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    number = 0
    while number < 25:
        (q, k, v), options = draw(generator)
        if max(q.shape[-1], v.shape[-1]) > 128 or options.softcap != 0.0:
            continue
        number += 1
        check(q, k, v, options, f"seed {seed} case {number}: {tuple(q.shape)} {tuple(k.shape)} {v.shape[-1]} {options}")


# Log-sum-exps too large for exponents in base 2, in some rows.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, 400, head_dim, device="cuda").to(dtype) for _ in range(3))
    q[:, 1, 100:200] *= 3e3
    k[:, 1] *= 3e3
    check(q, k, v, oracle.Options(causal=causal), "huge scores")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_what_sees_it(dtype: torch.dtype, head_dim: int, poison: float) -> None:
    torch.manual_seed(2)
    q, k, v, dout = (torch.randn(4, 8, 1000, head_dim, device="cuda").to(dtype) for _ in range(4))
    options = oracle.Options(causal=True)
    clean = gradients(q, k, v, dout, options)
    # Key 600 is seen by queries from 600 on; what they send reaches every key before them.
    poisoned = k.clone()
    poisoned[:, 2, 600, 3] = poison
    dq, dk, dv = gradients(q, poisoned, v, dout, options)
    torch.testing.assert_close(dq[:, 2, :600], clean[0][:, 2, :600])
    assert dq[:, 2, 600:].isnan().any(-1).all()
    for other in (0, 7):
        for got, want in zip((dq, dk, dv), clean, strict=True):
            torch.testing.assert_close(got[:, other], want[:, other])
    # Query 300 sees the keys up to 300.
    for name in ("q", "dout"):
        operands = {"q": q, "dout": dout}
        operands[name] = operands[name].clone()
        operands[name][:, 3, 300, 5] = poison
        dq, dk, dv = gradients(operands["q"], k, v, operands["dout"], options)
        assert torch.equal(dk[:, 3, 301:], clean[1][:, 3, 301:])
        assert torch.equal(dv[:, 3, 301:], clean[2][:, 3, 301:])
        assert not dk[:, 3, :301].isfinite().all(-1).any()
        rows = torch.arange(1000, device="cuda") != 300
        torch.testing.assert_close(dq[:, 3, rows], clean[0][:, 3, rows])


# Sequences that end within tiles, beside one another, one of them empty, and not finite beside others.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    torch.manual_seed(3)
    lengths = [100, 0, 700, 64, 1, 333]
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, dout = (torch.randn(sum(lengths), 4, head_dim, device="cuda").to(dtype) for _ in range(2))
    k, v = (torch.randn(sum(lengths), 2, head_dim, device="cuda").to(dtype) for _ in range(2))
    for tensor in (q, k, v, dout):
        tensor[864, 1] = float("nan")  # the sequence of one token
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = onepass.varlen_attention(
        *leaves, starts, starts, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), causal=causal
    )
    got = torch.autograd.grad(out, leaves, dout)
    for begin, length in zip(starts.tolist(), lengths, strict=False):
        if length <= 1:
            continue
        rows = [tensor.detach()[begin : begin + length].transpose(0, 1)[None] for tensor in (q, k, v, dout)]
        options = oracle.Options(causal=causal)
        exact, naive = (oracle.with_gradients(*rows[:3], options, rows[3], t) for t in (torch.float64, dtype))
        for name, of_all in zip("qkv", got, strict=True):
            mine = of_all[begin : begin + length].transpose(0, 1)[None]
            what = f"length {length}: d{name}"
            oracle.assert_as_good_as_naive(
                mine, exact.gradients[name], naive.gradients[name], what, exact.addends[name]
            )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_queued_calls_wait_for_one_another(head_dim: int) -> None:
    torch.manual_seed(4)
    q, k, v, dout = (torch.randn(2, 40, 777, head_dim, device="cuda").bfloat16() for _ in range(4))

    def run(wait: object) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        out = onepass.attention(*leaves, causal=True)
        wait()  # type: ignore[operator]
        _, dk, dv = torch.autograd.grad(out, leaves, dout)  # dQ is summed in any order
        wait()  # type: ignore[operator]
        return [dk, dv]

    assert_same_when_queued(run)
