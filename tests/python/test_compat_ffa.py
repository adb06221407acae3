"""onepass.compat.ffa as FastForwardAttention's README, example and models use the original."""

from __future__ import annotations

import inspect
import math
import typing

import pytest
import torch
from onepass.compat.ffa import FastForwardAttn
from torch import Tensor

# Positional parameters of the original's binding (torch_ffa_api.cpp), three overloads.
CONSTRUCTOR = ["K", "V", "max_timesteps", "ft_kernel_launch"]
OVERLOADS = [
    ["q", "k", "v", "softmax_scale", "timestep", "prob_thresh"],
    ["q", "k", "v", "k_cache", "v_cache", "softmax_scale", "timestep", "prob_thresh"],
    ["q", "k", "v", "k_cache", "v_cache", "softmax_scale", "timestep", "seq_lengths", "prob_thresh"],
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def test_signatures():
    assert list(inspect.signature(FastForwardAttn).parameters) == CONSTRUCTOR
    assert inspect.signature(FastForwardAttn).parameters["ft_kernel_launch"].default is False
    if hasattr(typing, "get_overloads"):  # Python 3.11
        found = [list(inspect.signature(f).parameters)[1:] for f in typing.get_overloads(FastForwardAttn.attention)]
        assert found == OVERLOADS


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v in float64, keys before ``first`` hidden: ``(batch, num_heads, 1, head_dim)``."""
    scores = q.double() @ k.double().mT * scale
    if first is not None:
        hidden = torch.arange(k.shape[2], device=k.device) < first[:, None, None, None]
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_example_of_the_original(dtype, head_dim, device):
    """example.py: a prompt whose attention is computed elsewhere, then one token at a time."""
    batch, heads, prompt, new = 3, 4, 37, 8
    scale = 1 / math.sqrt(head_dim)
    K, V = (torch.rand(batch, heads, prompt, head_dim, device=device).to(dtype) for _ in range(2))
    ffa = FastForwardAttn(K, V, prompt + new, False)
    for step in range(new):
        q, k, v = (torch.rand(batch, heads, 1, head_dim, device=device).to(dtype) for _ in range(3))
        out = ffa.attention(q, k, v, scale, prompt + step, 0)
        assert out.shape == (batch, heads, head_dim)
        assert out.dtype == dtype
        K, V = torch.cat([K, k], axis=-2), torch.cat([V, v], axis=-2)
        error = (out.view(batch, heads, 1, head_dim).double() - eager(q, K, V, scale)).abs().max().item()
        assert error < TOLERANCE[dtype]


def test_caches_travel_through_the_model(device):
    """modeling_opt.py and modeling_gptj.py: left-padded prompts, caches handed back, tokens as
    (batch·heads, 1, dim)."""
    batch, heads, prompt, new, dim = 3, 2, 21, 5, 64
    K, V = (torch.randn(batch, heads, prompt, dim, device=device) for _ in range(2))
    padding = torch.tensor([0, 8, 20], device=device)
    mask = torch.zeros(batch, 1, prompt, prompt, device=device)
    mask.masked_fill_(torch.arange(prompt, device=device) < padding[:, None, None, None], torch.finfo(torch.float).min)
    K[1, :, :8] = math.nan  # padding is never looked at
    V[1, :, :8] = math.inf
    ffa = FastForwardAttn(K, V, prompt + new, True)
    k_cache, v_cache = ffa.get_cache()
    seq_lens = torch.max(mask[:, :, -1, :], dim=-1).indices.reshape(-1).int()
    assert seq_lens.tolist() == [0, 8, 20]
    for step in range(new):
        q, k, v = (torch.randn(batch, heads, 1, dim, device=device) for _ in range(3))
        flat = (x.view(batch * heads, 1, dim) for x in (q, k, v))
        scale = torch.tensor(0.5)  # a tensor converts to the float that the call wants
        out = ffa.attention(*flat, k_cache, v_cache, scale, prompt + step, seq_lens, 0)
        K, V = torch.cat([K, k], dim=2), torch.cat([V, v], dim=2)
        for b in range(batch):
            seen = slice(int(padding[b]), None)
            want = eager(q[b : b + 1], K[b : b + 1, :, seen], V[b : b + 1, :, seen], 0.5)
            torch.testing.assert_close(out[b], want[0, :, 0].float(), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(k_cache[0], K[0], atol=0, rtol=0)
    assert ffa.get_cache()[0].data_ptr() == k_cache.data_ptr()


def test_caches_of_the_caller(device):
    """The second overload works on the caches that it is given, not on its own."""
    K, V = torch.randn(2, 1, 2, 9, 64, device=device)
    ffa = FastForwardAttn(K, V, 12)
    k_cache, v_cache = (cache.clone() for cache in ffa.get_cache())
    q, k, v = torch.randn(3, 1, 2, 1, 64, device=device)
    out = ffa.attention(q, k, v, k_cache, v_cache, 1.0, 9)
    want = eager(q, torch.cat([K, k], 2), torch.cat([V, v], 2), 1.0)
    torch.testing.assert_close(out.double(), want[:, :, 0], atol=3e-6, rtol=1e-5)
    assert torch.equal(k_cache[:, :, 9], k[:, :, 0])
    assert not ffa.get_cache()[0][:, :, 9].any()


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.5])
def test_threshold_skips_values_without_renormalising(threshold, device):
    K, V = torch.randn(2, 2, 3, 60, 64, device=device)
    ffa = FastForwardAttn(2 * K, V, 61)
    q, k, v = torch.randn(3, 2, 3, 1, 64, device=device)
    out = ffa.attention(q, k, v, 0.2, 60, threshold)
    keys, values = torch.cat([2 * K, k], 2).double(), torch.cat([V, v], 2).double()
    scores = q.double() @ keys.mT * 0.2
    kept = torch.exp(scores - scores.amax(-1, keepdim=True)) > threshold
    assert threshold == 0.0 or 0 < kept.sum() < kept.numel()
    want = (scores.softmax(-1) * kept) @ values
    torch.testing.assert_close(out.double(), want[:, :, 0], atol=3e-6, rtol=1e-5)


def test_a_timestep_again_overwrites():
    """Timesteps are the caller's: going back replaces a token and forgets what lay behind it."""
    K, V = torch.randn(2, 1, 1, 4, 64)
    ffa = FastForwardAttn(K, V, 8)
    q, k, v = torch.randn(3, 1, 1, 1, 64)
    first = ffa.attention(q, k, v, 1.0, 4)
    ffa.attention(q, v, k, 1.0, 5)
    assert torch.equal(ffa.attention(q, k, v, 1.0, 4), first)


K, TOKEN = torch.zeros(2, 3, 5, 64), torch.zeros(2, 3, 1, 64)
REFUSED_CONSTRUCTIONS = [
    ((K, K[:, :2], 8), ValueError, "K, V: got (2, 3, 5, 64) and (2, 2, 5, 64); need two tensors of one shape"),
    ((K.double(), K.double(), 8), TypeError, "K, V: got torch.float64 and torch.float64; need float32"),
    ((K, K, 4), ValueError, "max_timesteps: got 4; need at least the prompt's 5 tokens"),
]
REFUSED_CALLS = [
    ((TOKEN, TOKEN, TOKEN, 1.0, 6), ValueError, "timestep: got 6; need 0 to 5"),
    ((TOKEN, TOKEN, TOKEN, 1.0, -1), ValueError, "timestep: got -1; need 0 to 5"),
    ((TOKEN[:1], TOKEN, TOKEN, 1.0, 5), ValueError, "q: got (1, 3, 1, 64); need one token of each sequence"),
    ((TOKEN, TOKEN, TOKEN, 1.0), TypeError, "arguments: got 4; need (q, k, v"),
    ((TOKEN.int(), TOKEN, TOKEN, 1.0, 5), TypeError, "cached_attention: q: got int32"),
    ((TOKEN, TOKEN, TOKEN, 1.0, 5, torch.tensor([0, 0, 0])), ValueError, "cached_attention: cache.first_key: got"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED_CONSTRUCTIONS, ids=range(3))
def test_refused_constructions(arguments, kind, message):
    with pytest.raises(kind) as error:
        FastForwardAttn(*arguments)
    assert str(error.value).startswith(f"FastForwardAttn: {message}")


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED_CALLS, ids=range(6))
def test_refused_calls_write_nothing(arguments, kind, message):
    ffa = FastForwardAttn(K, K, 6)
    with pytest.raises(kind) as error:
        ffa.attention(*(TOKEN + 1 if a is TOKEN else a for a in arguments))
    assert message in str(error.value)
    assert not ffa.get_cache()[0].any()
