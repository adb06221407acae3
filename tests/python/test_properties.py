"""Relations between calls that need no oracle, and random calls against it."""

from __future__ import annotations

from typing import Any

import onepass
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Options
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 4, 67, 32), torch.randn(2, 2, 93, 32), torch.randn(2, 2, 93, 48)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


# Equal bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_times_a_power_of_two(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = operands(dtype, device)
    plain, scaled = onepass.attention(q, k, v), onepass.attention(q, k, v * 4)
    normal = plain.abs() > torch.finfo(dtype).smallest_normal  # subnormal results have fewer bits to keep
    assert normal.float().mean() > 0.99
    assert torch.equal(scaled[normal], plain[normal] * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_capacity_changes_no_bits(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = operands(dtype, device)
    end = torch.full((2,), 93, dtype=torch.int32, device=device)
    shorter = onepass.attention(q, k, v, key_end=end)
    k_room, v_room = (torch.cat((t, torch.full_like(t[:, :, :30], torch.nan)), 2) for t in (k, v))
    assert torch.equal(onepass.attention(q, k_room, v_room, key_end=end), shorter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_order_changes_no_bits(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = operands(dtype, device)
    both = onepass.attention(q, k, v, causal=True)
    assert torch.equal(onepass.attention(q.flip(0), k.flip(0), v.flip(0), causal=True), both.flip(0))
    assert torch.equal(onepass.attention(q[1:], k[1:], v[1:], causal=True), both[1:])


# Within tolerance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_are_repeated_heads(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = operands(dtype, device)
    repeated = onepass.attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=True)
    torch.testing.assert_close(onepass.attention(q, k, v, causal=True), repeated)


def test_order_of_keys_does_not_matter(device: torch.device) -> None:
    q, k, v = operands(device=device)
    order = torch.randperm(93).to(device)
    torch.testing.assert_close(onepass.attention(q, k[:, :, order], v[:, :, order]), onepass.attention(q, k, v))


def test_values_of_one_give_one(device: torch.device) -> None:
    q, k, v = operands(device=device)
    out = onepass.attention(q, k, torch.ones_like(v), softcap=3.0, window=(50, 50))
    torch.testing.assert_close(out, torch.ones_like(out))


def test_a_shift_of_all_keys_shifts_the_lse(device: torch.device) -> None:
    q, k, v = operands(device=device)
    shift = torch.randn(32).to(device)
    plain, shifted = (onepass.attention(q, keys, v, return_lse=True) for keys in (k, k + shift))
    torch.testing.assert_close(shifted.out, plain.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted.lse, plain.lse + (q @ shift) * 32**-0.5, rtol=1e-4, atol=1e-4)


def test_ragged_is_padded(device: torch.device) -> None:
    lengths = [5, 0, 67, 31]
    q, k, v = (torch.randn(4, 3, 67, 16).to(device) for _ in range(3))
    bounds = torch.tensor([0, 5, 5, 72, 103], dtype=torch.int32, device=device)
    packed = [torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]) for t in (q, k, v)]
    out = onepass.varlen_attention(*packed, bounds, bounds)
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    padded = onepass.attention(q, k, v, key_end=ends)
    for b, n in enumerate(lengths):
        torch.testing.assert_close(out[bounds[b] : bounds[b + 1]].transpose(0, 1), padded[b, :, :n])


def test_chunks_of_queries_are_the_whole(device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 130, 16).to(device) for _ in range(3))
    whole = onepass.attention(q, k, v, causal=True, window=(40, None))
    for begin in range(0, 130, 37):
        end = min(begin + 37, 130)
        chunk = onepass.attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], causal=True, window=(40, None))
        torch.testing.assert_close(chunk, whole[:, :, begin:end])


def test_total_attention_sums_to_the_rows(device: torch.device) -> None:
    q, k, v = operands(device=device)
    total = onepass.attention(q, k, v, causal=True, return_total_attention=True).total_attention
    torch.testing.assert_close(total.sum(-1), torch.full((2, 4), 67.0).to(device))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"softcap": 2.0, "causal": True}, {"alibi_slopes": onepass.alibi_slopes(4), "causal": True}],
    ids=["plain", "causal", "softcap", "alibi"],
)
def test_sums_of_gradients(options: dict[str, Any], device: torch.device) -> None:
    """Attention is linear in V, and its logits depend on q and k through their product only."""
    q, k, v = (tensor.requires_grad_() for tensor in operands(device=device))
    options = {n: value.to(device) if isinstance(value, Tensor) else value for n, value in options.items()}
    out = onepass.attention(q, k, v, **options)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close((dq * q).sum(), (dk * k).sum(), rtol=1e-4, atol=1e-3)


# Random calls -----------------------------------------------------------------------------------------------------

EDGES = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129]
DIMS = [1, 2, 3, 8, 15, 16, 17, 24, 40, 64, 65, 80]


@st.composite
def layouts(draw: st.DrawFn, batch: int, heads: int, seqlen: int, dim: int) -> Tensor:
    """A tensor of this shape: any order of dimensions, sliced out of a larger one, or expanded over batch or heads."""
    order = draw(st.permutations([0, 1, 2]))
    sizes = [batch, heads, seqlen]
    expanded = draw(st.sampled_from([None, 0, 1]))
    if expanded is not None:
        sizes[expanded] = 1
    step, offset = draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
    stored = torch.randn(*(sizes[d] * step for d in order), dim + offset)
    tensor = stored.permute(*(order.index(d) for d in range(3)), 3)[::step, ::step, ::step, offset:]
    return tensor.expand(batch, heads, seqlen, dim)


@given(data=st.data())
def test_random_calls(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = groups * group
    seqlen_q, seqlen_k = draw(st.sampled_from(EDGES)), draw(st.sampled_from(EDGES))
    dim, dim_v = draw(st.sampled_from(DIMS)), draw(st.sampled_from(DIMS))
    q = draw(layouts(batch, heads, seqlen_q, dim)).to(dtype)
    k, v = (draw(layouts(batch, groups, seqlen_k, size)).to(dtype) for size in (dim, dim_v))
    side = st.one_of(st.none(), st.integers(0, 70))

    def maybe(tensor: Any) -> Any:
        return tensor if draw(st.booleans()) else None

    options = Options(
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, 0.0, 0.4])),
        window=draw(st.one_of(st.none(), st.tuples(side, side))),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        alibi_slopes=maybe(torch.rand(heads)),
        bias=maybe(torch.randn(*(size if draw(st.booleans()) else 1 for size in (batch, heads, seqlen_q, seqlen_k)))),
        sinks=maybe(torch.randn(heads)),
        key_begin=maybe(torch.randint(0, seqlen_k + 1, (batch,), dtype=torch.int32)),
        key_end=maybe(torch.randint(0, seqlen_k + 1, (batch,), dtype=torch.int32)),
        alignment=draw(st.sampled_from(["bottom_right", "top_left"])),
        alibi_zero_for_future=draw(st.booleans()),
    )
    dout = torch.randn(batch, heads, seqlen_q, dim_v).to(dtype)
    exact = oracle.with_gradients(q, k, v, options, dout)
    naive = oracle.with_gradients(q, k, v, options, dout, dtype)
    variables = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    result = onepass.attention(*variables, **options.arguments(), return_lse=True)
    oracle.assert_as_good_as_naive(result.out, exact.out, naive.out, "out")
    oracle.assert_as_good_as_naive(result.lse, exact.lse, naive.lse, "lse", addends=1.0)
    for name, gradient in zip("qkv", torch.autograd.grad(result.out, variables, dout), strict=True):
        oracle.assert_as_good_as_naive(
            gradient, exact.gradients[name], naive.gradients[name], f"gradient of {name}", exact.addends[name]
        )
