"""Piecewise attention on many random shapes on CUDA, with tiles that take two attempts, and repeated."""

from __future__ import annotations

import random

import onepass
import oracle
import pytest
import torch
from test_piecewise import formula
from torch import Tensor

HALVES = [torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def check(operands: tuple[Tensor, ...], threshold: int, causal: bool, what: str) -> None:
    got = onepass.piecewise_attention(*operands, threshold, causal=causal, return_lse=True)
    (want, want_lse), (naive, _) = (
        formula(operands, threshold, causal, None, t) for t in (torch.float64, got.out.dtype)
    )
    oracle.assert_as_good_as_naive(got.out, want, naive, f"{what}: out")
    oracle.assert_lse_close(got.lse, want_lse, what)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_shapes(seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(40):
        dtype = generator.choice(HALVES)
        batch, heads_kv = generator.randint(1, 3), generator.randint(1, 3)
        heads = heads_kv * generator.choice([1, 1, 2, 4, 30])
        seqlen_q, seqlen_k = (generator.choice([1, 64, 128, 192, generator.randint(1, 700)]) for _ in range(2))
        if generator.random() < 0.5:
            seqlen_k = seqlen_q
        dim = generator.choice([64, 128, 256, 8 * generator.randint(1, 32)])
        dim_v = generator.choice([dim, dim, 8 * generator.randint(1, 32)])
        threshold = generator.choice([0, 1, 64, 100, 128, seqlen_k // 4, seqlen_k + 1, generator.randint(-300, 700)])
        size = generator.choice([1.0, 1.0, 4.0, 30.0])
        q1, q2 = (randn(batch, heads, seqlen_q, dim, dtype=dtype) * size for _ in range(2))
        k1, k2 = (randn(batch, heads_kv, seqlen_k, dim, dtype=dtype) for _ in range(2))
        v = randn(batch, heads_kv, seqlen_k, dim_v, dtype=dtype)
        causal = generator.random() < 0.5
        what = f"seed {seed} case {number}: {tuple(q1.shape)} {tuple(k1.shape)} {dim_v} {dtype} {threshold=} {causal=}"
        check((q1, k1, q2, k2, v), threshold, causal, what)


# Scores of either pair far above the other one's, and scores that ask for a second attempt.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sizes", [(1.0, 40.0), (40.0, 1.0), (3e3, 1.0), (1.0, 3e3)])
def test_pairs_of_different_size(dtype: torch.dtype, head_dim: int, sizes: tuple[float, float]) -> None:
    torch.manual_seed(1)
    q1, q2 = (size * randn(1, 4, 900, head_dim, dtype=dtype) for size in sizes)
    k1, k2, v = (randn(1, 4, 900, head_dim, dtype=dtype) for _ in range(3))
    for causal in (False, True):
        check((q1, k1, q2, k2, v), 200, causal, f"{sizes=} {causal=}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_repeated_runs_have_the_same_bits(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    torch.manual_seed(2)
    q1, k1, q2, k2, v = (randn(2, 40, 777, head_dim, dtype=dtype) for _ in range(5))
    v[0, 3, 11, 5], v[1, 7, 400, 9] = float("nan"), float("inf")  # where causal, some tiles take two attempts
    want = onepass.piecewise_attention(q1, k1, q2, k2, v, 100, causal=causal)
    assert want.isnan().any()
    assert want.isfinite().any()
    for _ in range(50):
        got = onepass.piecewise_attention(q1, k1, q2, k2, v, 100, causal=causal)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_reach_only_the_rows_that_see_them(dtype: torch.dtype, head_dim: int, poison: float) -> None:
    torch.manual_seed(3)
    q1, k1, q2, k2, v = (randn(1, 8, 1000, head_dim, dtype=dtype) for _ in range(5))
    want = onepass.piecewise_attention(q1, k1, q2, k2, v, 150, causal=True)
    v[:, 2:, 600, 3] = poison
    got = onepass.piecewise_attention(q1, k1, q2, k2, v, 150, causal=True)
    clean = torch.ones_like(got, dtype=torch.bool)
    clean[:, 2:, 600:, 3] = False
    assert torch.equal(got[clean], want[clean])
    assert not got[~clean].isfinite().any()
