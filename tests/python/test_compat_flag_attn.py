"""onepass.compat.flag_attn: FlagAttention's signatures, and its documented use against formulas in float64."""

from __future__ import annotations

import inspect
from typing import Any

import oracle
import pytest
import torch
from onepass._ops import ops
from onepass.compat import flag_attn
from oracle import Options
from test_dropout import keep_factors
from test_piecewise import formula
from torch import Tensor

# FlagAttention, main branch.
SIGNATURES = {
    "flash_attention": "q, k, v, causal=False, sm_scale=None, dropout_p=0.0, return_log_normalizer=False, "
    "return_total_attention=False, return_seed_offset=False",
    "flash_attention_split_kv": "q, k, v, causal=False, sm_scale=None",
    "piecewise_attention": "q1, k1, q2, k2, v, dist_threshold, causal=False, sm_scale=None",
    "paged_attention": "query, key_cache, value_cache, context_lens, block_tables, attn_scale, max_context_len, "
    "num_splits=0",
    "total_attention": "q, k, l, causal=False, sm_scale=None",
}
TESTING = {
    "flash_attention": "q, k, v, causal, dropout_p=0.0, dropout_mask=None, sm_scale=None, "
    "return_log_normalizer=False, return_total_attention=False, upcast=False",
    "piecewise_attention": "q1, k1, q2, k2, v, dist_threshold, causal, sm_scale=None, upcast=False",
    "paged_attention": "query, key_cache, value_cache, block_tables, context_lens, scale",
    "recompute_mask": "B, H, M, N, dropout_p, seed, offset, device",
}


@pytest.mark.parametrize(("module", "signatures"), [(flag_attn, SIGNATURES), (flag_attn.testing, TESTING)])
def test_signatures(module: Any, signatures: dict[str, str]) -> None:
    for name, expected in signatures.items():
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert ", ".join(found) == expected
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert set(module.__all__) - {"testing"} == set(signatures)


def randn(*size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size).to(device, dtype).requires_grad_()


def assert_close(got: Tensor, want: Tensor, tolerance: float = 5e-6) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2, 1])
def test_flash_attention(heads_k: int, causal: bool, device: torch.device) -> None:
    """The call of the README, and auxiliary outputs as in the examples."""
    q = randn(2, 4, 50, 32, device=device)
    k, v = (randn(2, heads_k, 70, 32, device=device) for _ in range(2))
    want = oracle.attention(q, k, v, Options(causal=causal))
    out = flag_attn.flash_attention(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    assert_close(out, want.out)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(want.out, (q, k, v), dout.double())
    for got, exact in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
        assert_close(got, exact, 2e-5)

    results = flag_attn.flash_attention(q, k, v, causal, None, 0.0, True, True, True)
    assert len(results) == 5
    assert results[3:] == (None, None)
    assert torch.equal(results[0], out)
    assert_close(results[1], want.lse)
    assert_close(results[2], want.total_attention, 2e-5)
    reference = flag_attn.testing.flash_attention(
        q, k, v, causal, return_log_normalizer=True, return_total_attention=True, upcast=True
    )
    for got, exact in zip(results[:3], reference, strict=True):
        assert_close(got, exact, 2e-5)


@pytest.mark.parametrize("flags", [(True, False, False), (False, True, False), (False, False, True)])
def test_any_flag_gives_the_five(flags: tuple[bool, bool, bool]) -> None:
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    log_normalizer, total_attention, seed_offset = flags
    results = flag_attn.flash_attention(
        q, k, v, dropout_p=0.5,
        return_log_normalizer=log_normalizer, return_total_attention=total_attention, return_seed_offset=seed_offset,
    )  # fmt: skip
    assert [result is not None for result in results] == [
        True, log_normalizer, total_attention, seed_offset, seed_offset,
    ]  # fmt: skip


def test_scale_and_more_queries_than_keys(device: torch.device) -> None:
    q, k, v = (randn(1, 3, size, 16, device=device) for size in (30, 20, 20))
    out, log_normalizer, *_ = flag_attn.flash_attention(q, k, v, True, 0.5, return_log_normalizer=True)
    want = oracle.attention(q, k, v, Options(causal=True, softmax_scale=0.5))
    assert_close(out, want.out)
    assert_close(log_normalizer, want.lse)
    reference = flag_attn.testing.flash_attention(q, k, v, True, sm_scale=0.5, upcast=True)
    assert_close(out, reference)


def test_dropout_is_repeatable_from_seed_and_offset(device: torch.device) -> None:
    q, k, v = (randn(2, 4, size, 16, device=device) for size in (33, 45, 45))
    out, log_normalizer, total, seed, offset = flag_attn.flash_attention(
        q, k, v, True, dropout_p=0.3, return_log_normalizer=True, return_total_attention=True, return_seed_offset=True
    )
    assert isinstance(seed, int)
    assert isinstance(offset, int)
    mask = flag_attn.testing.recompute_mask(2, 4, 33, 45, 0.3, seed, offset, device)
    assert mask.shape == (2, 4, 33, 45)
    state = torch.tensor([seed, offset])
    assert torch.equal(mask.cpu(), keep_factors(0.3, state, 2, 4, 33, 45) > 0)
    want = oracle.attention(q, k, v, Options(causal=True), keep=mask.double() / 0.7)
    assert_close(out, want.out)
    assert_close(log_normalizer, want.lse)
    assert_close(total, want.total_attention, 2e-5)
    reference = flag_attn.testing.flash_attention(q, k, v, True, 0.3, mask, upcast=True)
    assert_close(out, reference)
    again = flag_attn.flash_attention(q, k, v, True, dropout_p=0.3)
    assert isinstance(again, Tensor)
    assert not torch.equal(again, out)
    assert flag_attn.testing.recompute_mask(1, 1, 2, 3, 0.0, 1, 2, device).all()


@pytest.mark.parametrize("queries", [1, 4])
def test_split_kv_of_decode_shapes(queries: int, device: torch.device) -> None:
    q = randn(2, 8, queries, 64, device=device, dtype=torch.bfloat16)
    k, v = (randn(2, 2, 700, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    for causal in (False, True):
        exact, naive = (oracle.attention(q, k, v, Options(causal=causal), kind) for kind in (torch.float64, q.dtype))
        out = flag_attn.flash_attention_split_kv(q, k, v, causal, 0.125)
        oracle.assert_as_good_as_naive(out, exact.out, naive.out)


def test_piecewise_attention(device: torch.device) -> None:
    """The README's call: half of the sequence as threshold, five gradients."""
    operands = tuple(randn(2, 4, 96, 32, device=device) for _ in range(5))
    out = flag_attn.piecewise_attention(*operands, 48, causal=True)
    exact, _ = formula(operands, 48, causal=True)
    assert_close(out, exact)
    assert_close(out, flag_attn.testing.piecewise_attention(*operands, 48, True, upcast=True))
    dout = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, operands, dout), torch.autograd.grad(exact, operands, dout.double()), strict=True
    ):
        assert_close(got, want, 2e-5)
    scaled = flag_attn.piecewise_attention(*operands, 10, False, 0.3)
    assert_close(scaled, formula(operands, 10, softmax_scale=0.3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize(("heads", "heads_k", "block_size"), [(8, 8, 16), (8, 2, 32), (6, 1, 1)])
def test_paged_attention(
    heads: int, heads_k: int, block_size: int, num_splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    """As in the example: int32 lengths, int64 block tables drawn at random, scale 1/√headdim."""
    context_lens = torch.tensor([300, 1, 77, 160], dtype=torch.int32).to(device)
    query = torch.randn(4, heads, 64).to(device, dtype)
    key_cache, value_cache = (torch.randn(400, heads_k, block_size, 64).to(device, dtype) for _ in range(2))
    block_tables = torch.randint(0, 400, (4, -(-300 // block_size))).to(device)
    out = flag_attn.paged_attention(
        query, key_cache, value_cache, context_lens, block_tables, 0.125, 300, num_splits=num_splits
    )
    assert out.shape == query.shape
    exact, naive = (
        flag_attn.testing.paged_attention(query.to(kind), key_cache.to(kind), value_cache.to(kind), block_tables,
                                          context_lens, 0.125)
        for kind in (torch.float32, dtype)
    )  # fmt: skip
    oracle.assert_as_good_as_naive(out, exact, naive)


def test_paged_attention_refusals() -> None:
    query, cache = torch.randn(1, 2, 16), torch.randn(4, 2, 8, 16)
    lengths, table = torch.tensor([20]), torch.tensor([[0, 1, 9]])
    with pytest.raises(ValueError, match="page"):
        flag_attn.paged_attention(query, cache, cache, lengths, table, 1.0, 20)
    with pytest.raises(ValueError, match="seqlens"):
        flag_attn.paged_attention(query, cache, cache, lengths, table, 1.0, 16)


@pytest.mark.parametrize("causal", [False, True])
def test_total_attention(causal: bool, device: torch.device) -> None:
    q, k = randn(2, 4, 50, 32, device=device), randn(2, 2, 70, 32, device=device)
    want = oracle.attention(q, k, k, Options(causal=causal, softmax_scale=0.2))
    total = flag_attn.total_attention(q, k, want.lse.float(), causal, 0.2)
    assert total.dtype == torch.float32
    assert_close(total, want.total_attention, 2e-5)
    _, log_normalizer, beside, *_ = flag_attn.flash_attention(q, k, k, causal, 0.2, 0.0, True, True)
    assert_close(flag_attn.total_attention(q, k, log_normalizer, causal=causal, sm_scale=0.2), beside, 2e-5)
    half = flag_attn.total_attention(q, k, want.lse.float() + 1.0, causal, 0.2)
    assert_close(half, want.total_attention / torch.e, 2e-5)


def test_total_attention_is_an_operation() -> None:
    q, k = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)
    want = oracle.attention(q, k, k, Options(causal=True))
    torch.library.opcheck(ops.total_attention.default, (q, k, want.lse), {"causal": True})
    assert_close(flag_attn.total_attention(q, k, want.lse, True), want.total_attention, 1e-12)
    with pytest.raises(ValueError, match=r"total_attention: lse: got .*\(2, 4, 4\).*; need shape \(2, 4, 5\)"):
        flag_attn.total_attention(q, k, want.lse[..., :4])


def test_reference_implementations_are_formulas() -> None:
    q, k, v = (torch.randn(1, 4, 6, 8), *(torch.randn(1, 2, 9, 8) for _ in range(2)))
    for causal in (False, True):
        want = oracle.attention(q, k, v, Options(causal=causal))
        assert_close(flag_attn.testing.flash_attention(q, k, v, causal), want.out)
    halves = flag_attn.testing.flash_attention(q.half(), k.half(), v.half(), True, upcast=True)
    assert halves.dtype == torch.float16
