"""Dropout: the mask is the documented Philox one, drawn from torch's generator, the same in both directions."""

from __future__ import annotations

import numpy as np
import onepass
import oracle
import pytest
import torch
from onepass._inputs import draw_dropout_state
from onepass._ops import Score, ScoreTensors
from onepass.functional import attention_with_state
from oracle import Options
from torch import Tensor


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Salmon et al. 2011, on uint64 arrays of 32-bit words; counter (..., 4)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            product1 & mask,
            (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            product0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


def keep_factors(p: float, state: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """0 for a dropped weight, 1/(1 − p) for a survivor: the rule of src/core/philox.h, written again."""
    seed, offset = (int(value) & (2**64 - 1) for value in state)
    quads = (seqlen_k + 3) // 4
    grid = np.meshgrid(np.arange(batch * heads), np.arange(seqlen_q), np.arange(quads), indexing="ij")
    plane, query, quad = grid
    counter = np.stack((quad, query, plane, np.full_like(quad, offset & 0xFFFFFFFF)), axis=-1)
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32)))
    words = words.reshape(batch, heads, seqlen_q, quads * 4)[..., :seqlen_k]
    kept = words >= round(p * 2**32)
    return torch.from_numpy(np.where(kept, 1.0 / (1.0 - p), 0.0))


def test_philox_known_answer() -> None:
    """The first vector of the authors' known-answer tests, and their vector of digits of π."""
    zero = philox4x32_10(np.zeros((1, 4), dtype=np.uint64), (0, 0))[0]
    assert [f"{int(word):08x}" for word in zero] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    counter = np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], dtype=np.uint64)
    pi = philox4x32_10(counter, (0xA4093822, 0x299F31D0))[0]
    assert [f"{int(word):08x}" for word in pi] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_forward_and_backward_use_the_documented_mask(p: float, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is served on the CPU only")
    batch, heads, seqlen_q, seqlen_k, dim = 2, 4, 33, 70, 16
    q, k, v, dout = (
        torch.randn(batch, heads, n, dim).to(device, dtype) for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q)
    )
    state = torch.tensor([-(2**63) + 12345, (7 << 32) + 9])
    options = Options(causal=True)
    keep = keep_factors(p, state, batch, heads, seqlen_q, seqlen_k).to(device)
    exact = oracle.with_gradients(q, k, v, options, dout, keep=keep)
    naive = oracle.with_gradients(q, k, v, options, dout, dtype, keep=keep)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    result = attention_with_state(
        q, k, v, ScoreTensors(dropout_state=state), Score(causal=True, dropout_p=p),
        return_lse=True, return_total_attention=True,
    )  # fmt: skip
    assert result.lse is not None
    assert result.total_attention is not None
    oracle.assert_as_good_as_naive(result.out, exact.out, naive.out, "out")
    oracle.assert_as_good_as_naive(result.lse, exact.lse, naive.lse, "lse: before dropout")
    oracle.assert_as_good_as_naive(
        result.total_attention, exact.total_attention, naive.total_attention, "total attention: before dropout"
    )
    for name, gradient in zip("qkv", torch.autograd.grad(result.out, (q, k, v), dout), strict=True):
        oracle.assert_as_good_as_naive(
            gradient, exact.gradients[name], naive.gradients[name], name, exact.addends[name] / (1 - p)
        )


def test_follows_torchs_generator(device: torch.device) -> None:
    q = torch.randn(1, 2, 64, 16).to(device)

    def draw() -> Tensor:
        out: Tensor = onepass.attention(q, q, q, dropout_p=0.5)
        return out

    torch.manual_seed(11)
    first, second = draw(), draw()
    torch.manual_seed(11)
    assert torch.equal(draw(), first)
    assert torch.equal(draw(), second)
    assert not torch.equal(first, second)


def test_state_is_two_integers_and_advances(device: torch.device) -> None:
    first, second = draw_dropout_state(device), draw_dropout_state(device)
    assert first.shape == (2,)
    assert first.dtype == torch.int64
    assert first.device.type == "cpu"
    assert not torch.equal(first, second)


def test_a_call_without_dropout_leaves_the_generator_alone() -> None:
    q = torch.randn(1, 2, 8, 16)
    before = torch.get_rng_state()
    onepass.attention(q, q, q)
    assert torch.equal(torch.get_rng_state(), before)


def test_share_of_dropped_weights() -> None:
    """V = identity shows the weights: their zeros are the dropped ones. ±5 standard deviations of a binomial."""
    n, p = 256, 0.3
    q = torch.zeros(2, 3, n, 8)
    v = torch.eye(n).expand(2, 3, n, n)
    weights = onepass.attention(q, q, v, dropout_p=p)
    dropped = (weights == 0).double()
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / weights.numel()) ** 0.5
    # No two heads, rows or columns share a mask.
    rows = dropped.reshape(-1, n)
    assert rows.unique(dim=0).shape[0] == rows.shape[0]
    torch.testing.assert_close(weights[weights > 0], torch.full(((weights > 0).sum(),), 1 / n / (1 - p)))


def test_wrong_state_is_refused() -> None:
    q = torch.randn(1, 2, 8, 16)
    for state in (torch.zeros(2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"attention: dropout_state: got .* need int64 \(seed, offset\) on the CPU"
        ):
            attention_with_state(q, q, q, ScoreTensors(dropout_state=state), Score(dropout_p=0.5))
