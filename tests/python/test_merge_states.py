"""merge_states: exact over any split of the keys, empty parts included, and differentiable."""

from __future__ import annotations

import onepass
import oracle
import pytest
import torch
from oracle import Options
from torch import Tensor


def part(q: Tensor, k: Tensor, v: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
    result = onepass.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
    return result.out, result.lse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [0, 1, 20, 49, 50])
def test_split_anywhere(split: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    q, k, v = (torch.randn(2, 3, n, 16).to(device, dtype) for n in (7, 50, 50))
    merged, lse = onepass.merge_states(*part(q, k, v, slice(split)), *part(q, k, v, slice(split, None)))
    exact, naive = oracle.attention(q, k, v, Options()), oracle.attention(q, k, v, Options(), dtype)
    oracle.assert_as_good_as_naive(merged, exact.out, naive.out, "out")
    oracle.assert_as_good_as_naive(lse, exact.lse, naive.lse, "lse")


def test_empty_parts(device: torch.device) -> None:
    out, lse = torch.randn(2, 3, 4, 8).to(device), torch.randn(2, 3, 4).to(device)
    nothing, minus = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for merged in (onepass.merge_states(out, lse, nothing, minus), onepass.merge_states(nothing, minus, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    both = onepass.merge_states(nothing, minus, nothing, minus)
    assert not both[0].any()
    assert (both[1] == -torch.inf).all()


def test_far_apart_and_huge(device: torch.device) -> None:
    a, b = torch.full((1, 1, 2, 4), 3.0).to(device), torch.full((1, 1, 2, 4), 5.0).to(device)
    low, high = torch.tensor([[[-1e4, 3e38]]]).to(device), torch.tensor([[[1e4, 3e38]]]).to(device)
    out, lse = onepass.merge_states(a, low, b, high)
    torch.testing.assert_close(out[0, 0, :, 0].cpu(), torch.tensor([5.0, 4.0]))
    torch.testing.assert_close(lse.cpu(), torch.tensor([[[1e4, 3e38]]]))


def test_gradcheck() -> None:
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 3, 4), (1, 2, 3)) * 2]
    assert torch.autograd.gradcheck(onepass.merge_states, tensors)
    assert torch.autograd.gradcheck(lambda *t: onepass.merge_states(*t)[1], tensors)
    assert torch.autograd.gradcheck(lambda *t: onepass.merge_states(*t)[0], tensors)


def test_gradients_with_an_empty_part() -> None:
    out_a, lse_a, out_b, lse_b = (torch.randn(size, dtype=torch.float64) for size in ((1, 2, 3, 4), (1, 2, 3)) * 2)
    lse_a[0, 0, 0] = lse_a[0, 0, 1] = lse_b[0, 0, 1] = -torch.inf
    tensors = [tensor.requires_grad_() for tensor in (out_a, lse_a, out_b, lse_b)]
    merged, lse = onepass.merge_states(*tensors)
    gradients = torch.autograd.grad(merged.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0, 0, :2].any()
    assert (gradients[2][0, 0, 0] == 1.0).all()
    assert not gradients[1][0, 0, :2].any()


def test_second_order_is_refused() -> None:
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 3, 4), (1, 2, 3)) * 2]
    merged, _ = onepass.merge_states(*tensors)
    (first,) = torch.autograd.grad(merged.sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second-order"):
        first.sum().backward()


def test_attention_in_parts_has_the_gradients_of_the_whole() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 12, 12))
    whole = onepass.attention(q, k, v)
    split, _ = onepass.merge_states(*part(q, k, v, slice(7)), *part(q, k, v, slice(7, None)))
    dout = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad(split, (q, k, v), dout), torch.autograd.grad(whole, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(a, b)
