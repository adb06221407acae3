"""The CUDA forward on many random shapes, on scores that leave float's comfortable range, and repeated."""

from __future__ import annotations

import random

import onepass
import oracle
import pytest
import torch
from torch import Tensor

HALVES = [torch.float16, torch.bfloat16]


def draw(generator: random.Random) -> tuple[tuple[Tensor, Tensor, Tensor], oracle.Options]:
    """A random call within what the Hopper kernels take: 16 bits, head dims of multiples of 8."""
    dtype = generator.choice(HALVES)
    batch, num_heads_kv = generator.randint(1, 3), generator.randint(1, 3)
    num_heads = num_heads_kv * generator.choice([1, 1, 2, 4])
    seqlen_q, seqlen_k = (generator.choice([1, 64, 128, generator.randint(1, 700)]) for _ in range(2))
    if generator.random() < 0.4:
        seqlen_k = seqlen_q
    if generator.random() < 0.3:  # more tiles than multiprocessors, which other kernels may take
        batch, seqlen_q, seqlen_k = -(-400 // num_heads), -(-seqlen_q // 4), -(-seqlen_k // 4)
    head_dim = generator.choice([64, 128, 256, 8 * generator.randint(1, 32)])
    head_dim_v = generator.choice([head_dim, head_dim, 8 * generator.randint(1, 32)])
    seed = torch.Generator("cuda").manual_seed(generator.randrange(1 << 30))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed, device="cuda").to(dtype)

    def bounds(low: int, high: int) -> Tensor:
        return torch.tensor([generator.randint(low, high) for _ in range(batch)], dtype=torch.int32, device="cuda")

    q = randn(batch, num_heads, seqlen_q, head_dim) * generator.choice([1.0, 1.0, 4.0, 30.0])
    k, v = randn(batch, num_heads_kv, seqlen_k, head_dim), randn(batch, num_heads_kv, seqlen_k, head_dim_v)
    sides = [None, generator.randint(0, 300)]
    causal = generator.random() < 0.4
    window = (generator.choice(sides), None if causal else generator.choice(sides))
    options = oracle.Options(
        causal=causal,
        window=window if generator.random() < 0.3 else None,
        key_begin=bounds(0, seqlen_k) if generator.random() < 0.15 else None,
        key_end=bounds(0, seqlen_k) if generator.random() < 0.15 else None,
        alignment=generator.choice(["bottom_right", "top_left"]),
        softcap=generator.choice([0.0] * 9 + [5.0]),
        sinks=randn(num_heads) if generator.random() < 0.1 else None,
    )
    return (q, k, v), options


def check(q: Tensor, k: Tensor, v: Tensor, options: oracle.Options, what: str) -> None:
    got = onepass.attention(q, k, v, return_lse=True, **options.arguments())
    want, naive = oracle.attention(q, k, v, options), oracle.attention(q, k, v, options, q.dtype)
    oracle.assert_as_good_as_naive(got.out, want.out, naive.out, f"{what}: out")
    oracle.assert_lse_close(got.lse, want.lse, what)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    generator = random.Random(seed)
    for number in range(50):
        (q, k, v), options = draw(generator)
        check(q, k, v, options, f"seed {seed} case {number}: {tuple(q.shape)} {tuple(k.shape)} {v.shape[-1]} {options}")


# A block with far larger scores than the blocks worked through before it, that is, at lower keys.
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("jump", [5.0, 12.0, 40.0, 150.0, 3e3])
@pytest.mark.parametrize("batch", [1, 40])
def test_scores_that_jump(dtype: torch.dtype, head_dim: int, jump: float, batch: int) -> None:
    torch.manual_seed(1)
    q = torch.randn(batch, 4, 300, head_dim, device="cuda")
    k, v = (torch.randn(batch, 4, 900, head_dim, device="cuda").to(dtype) for _ in range(2))
    q[..., 0] = head_dim**0.5
    k[:, :2, 37, 0] = jump
    k[:, 2:, 500:, 0] = -jump
    for causal in (False, True):
        check(q.to(dtype), k, v, oracle.Options(causal=causal), f"jump {jump}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_a_hundred_runs_have_the_same_bits(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 40, 777, head_dim, device="cuda").to(dtype) for _ in range(3))
    k[0, 3, 11, 5], v[1, 7, 400, 9] = float("nan"), float("inf")  # some tiles take two attempts
    want = onepass.attention(q, k, v, causal=causal, return_lse=True)
    assert want.out.isnan().any()
    assert want.out.isfinite().any()
    for _ in range(100):
        got = onepass.attention(q, k, v, causal=causal, return_lse=True)
        assert torch.equal(got.out.view(torch.int16), want.out.view(torch.int16))
        assert torch.equal(got.lse.view(torch.int32), want.lse.view(torch.int32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [1, 20])
def test_values_reach_only_the_rows_that_see_them(dtype: torch.dtype, head_dim: int, poison: float, batch: int) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(batch, 8, 1000, head_dim, device="cuda").to(dtype) for _ in range(3))
    want = onepass.attention(q, k, v, causal=True)
    v[:, 2:, 600, 3] = poison
    got = onepass.attention(q, k, v, causal=True)
    clean = torch.ones_like(got, dtype=torch.bool)
    clean[:, 2:, 600:, 3] = False
    assert torch.equal(got[clean], want[clean])
    assert not got[~clean].isfinite().any()
