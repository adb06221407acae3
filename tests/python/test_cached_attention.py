"""onepass.cached_attention against attention over the dequantized cache in float64."""

from __future__ import annotations

import math

import onepass
import pytest
import torch
from cache_oracle import BATCH, DIM, HEADS, HEADS_KV, STORAGES, expected, randn, storage_name, tolerance
from torch import Tensor


@pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
@pytest.mark.parametrize("page_size", [None, 16])
def test_decode_after_prompts_of_different_lengths(storage, page_size):
    torch.manual_seed(0)
    cache = onepass.KVCache(BATCH, 100, HEADS_KV, DIM, page_size=page_size, **storage)
    lengths = [40, 7, 1]
    cache.append(randn(BATCH, HEADS_KV, 40, DIM), randn(BATCH, HEADS_KV, 40, DIM), seqlens=lengths)
    assert cache.seqlens.tolist() == lengths
    for step in range(1, 20):
        q, k, v = randn(BATCH, HEADS, 1, DIM), randn(BATCH, HEADS_KV, 1, DIM), randn(BATCH, HEADS_KV, 1, DIM)
        result = onepass.cached_attention(q, cache, k_new=k, v_new=v, return_lse=True)
        assert cache.seqlens.tolist() == [length + step for length in lengths]
        for b in range(BATCH):
            out, lse = expected(q[b], cache, b)
            torch.testing.assert_close(result.out[b], out.float(), atol=3e-6, rtol=1e-5)
            torch.testing.assert_close(result.lse[b], lse.float(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hybrid_batch_appends_and_attends(dtype):
    torch.manual_seed(1)
    cache = onepass.KVCache(4, 200, HEADS_KV, DIM, dtype=dtype, page_size=8)
    prompts = [60, 0, 33, 5]
    k = randn(4, HEADS_KV, 60, DIM, dtype=dtype)
    cache.append(k, k.flip(-1), seqlens=prompts)
    counts = [1, 70, 4, 0]
    bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    q = randn(75, HEADS, DIM, dtype=dtype)
    k_new, v_new = randn(75, HEADS_KV, DIM, dtype=dtype), randn(75, HEADS_KV, DIM, dtype=dtype)
    out = onepass.cached_attention(q, cache, cu_seqlens_q=bounds, k_new=k_new, v_new=v_new)
    assert cache.seqlens.tolist() == [a + b for a, b in zip(prompts, counts, strict=True)]
    assert out.dtype == dtype
    for b in range(4):
        rows = slice(int(bounds[b]), int(bounds[b + 1]))
        want, _ = expected(q[rows].transpose(0, 1), cache, b)
        torch.testing.assert_close(
            out[rows].transpose(0, 1).double(), want, atol=tolerance(dtype), rtol=tolerance(dtype)
        )


def test_scores_as_in_attention():
    """Window, softcap, ALiBi, sinks and scale mean what they mean for onepass.attention."""
    torch.manual_seed(2)
    q, k, v = randn(2, HEADS, 5, DIM), randn(2, HEADS_KV, 50, DIM), randn(2, HEADS_KV, 50, DIM)
    cache = onepass.KVCache(2, 64, HEADS_KV, DIM, dtype=torch.float32)
    cache.append(k, v)
    options = {
        "softmax_scale": 0.3,
        "window": (20, 0),
        "softcap": 5.0,
        "alibi_slopes": onepass.alibi_slopes(HEADS),
        "sinks": randn(HEADS),
    }
    got = onepass.cached_attention(q, cache, return_lse=True, **options)
    want = onepass.attention(q, k, v, causal=True, return_lse=True, **options)
    torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [DIM // 2, 12])
def test_rotary_embedding(interleaved, pairs):
    torch.manual_seed(3)
    angles = torch.arange(128.0)[:, None] * 10000 ** (-torch.arange(pairs) / pairs)

    def rotated(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        even = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
        odd = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
        cos, sin = angles.cos()[first : first + x.shape[-2]], angles.sin()[first : first + x.shape[-2]]
        a, b = x[..., even].clone(), x[..., odd].clone()
        x[..., even], x[..., odd] = a * cos - b * sin, a * sin + b * cos
        return x

    q, k, v = randn(1, HEADS, 9, DIM), randn(1, HEADS_KV, 9, DIM), randn(1, HEADS_KV, 9, DIM)
    cache = onepass.KVCache(1, 32, HEADS_KV, DIM, dtype=torch.float32)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    cache.append(k[..., :4, :], v[..., :4, :], **tables)
    out = onepass.cached_attention(q[..., 4:, :], cache, k_new=k[..., 4:, :], v_new=v[..., 4:, :], **tables)
    want = onepass.attention(rotated(q[..., 4:, :], 4), rotated(k, 0), v, causal=True)
    torch.testing.assert_close(out, want, atol=3e-6, rtol=1e-5)


def test_left_padding_shifts_nothing():
    torch.manual_seed(4)
    q, k, v = randn(2, HEADS, 1, DIM), randn(2, HEADS_KV, 30, DIM), randn(2, HEADS_KV, 30, DIM)
    padded = onepass.KVCache(2, 64, HEADS_KV, DIM, dtype=torch.float32)
    padded.append(k, v)
    padded.first_key = torch.tensor([0, 11], dtype=torch.int32)
    out = onepass.cached_attention(q, padded)
    plain = onepass.KVCache(2, 64, HEADS_KV, DIM, dtype=torch.float32)
    shifted = [torch.stack([x[0], torch.cat([x[1, :, 11:], x[1, :, :11]], 1)]) for x in (k, v)]
    plain.append(*shifted, seqlens=[30, 19])
    torch.testing.assert_close(out, onepass.cached_attention(q, plain), atol=2e-6, rtol=1e-5)


def test_shuffled_pages_give_the_same_bits():
    torch.manual_seed(6)
    contiguous = onepass.KVCache(2, 128, HEADS_KV, DIM)
    k, v = randn(2, HEADS_KV, 100, DIM), randn(2, HEADS_KV, 100, DIM)
    contiguous.append(k, v)
    q = randn(2, HEADS, 3, DIM)
    want = onepass.cached_attention(q, contiguous)
    pages = torch.randperm(40)[:16].view(2, 8)
    storage = [torch.full((40, 16, HEADS_KV, DIM), math.nan, dtype=torch.bfloat16) for _ in range(2)]
    for side, whole in zip(storage, (contiguous.k, contiguous.v), strict=True):
        side[pages] = whole.view(2, HEADS_KV, 8, 16, DIM).permute(0, 2, 3, 1, 4)
    paged = onepass.KVCache.from_tensors(
        storage[0].transpose(1, 2), storage[1].transpose(1, 2), contiguous.seqlens, page_table=pages.int()
    )
    assert torch.equal(onepass.cached_attention(q, paged), want)


def test_fixed_splits_are_batch_invariant():
    torch.manual_seed(7)
    cache = onepass.KVCache(4, 700, HEADS_KV, DIM)
    k, v = randn(4, HEADS_KV, 700, DIM), randn(4, HEADS_KV, 700, DIM)
    cache.append(k, v, seqlens=[700, 3, 450, 64])
    q = randn(4, HEADS, 1, DIM)
    together = onepass.cached_attention(q, cache, num_splits=3)
    for b in range(4):
        alone = onepass.KVCache.from_tensors(cache.k[b : b + 1], cache.v[b : b + 1], cache.seqlens[b : b + 1])
        assert torch.equal(onepass.cached_attention(q[b : b + 1], alone, num_splits=3), together[b : b + 1])


def test_threshold_skips_small_weights_without_renormalising():
    torch.manual_seed(8)
    cache = onepass.KVCache(1, 300, 1, DIM, dtype=torch.float32)
    k, v = 2 * randn(1, 1, 300, DIM), randn(1, 1, 300, DIM)
    cache.append(k, v)
    q = 2 * randn(1, 4, 1, DIM)
    result = onepass.cached_attention(q, cache, prob_threshold=0.01, return_lse=True)
    scores = q.double() @ k.double().mT / math.sqrt(DIM)
    weights = scores.softmax(-1)
    weights[torch.exp(scores - scores.amax(-1, keepdim=True)) <= 0.01] = 0.0
    torch.testing.assert_close(result.out.double(), weights @ v.double(), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(result.lse.double(), scores.logsumexp(-1), atol=3e-6, rtol=1e-5)


def test_refused_calls_write_nothing():
    cache = onepass.KVCache(2, 8, 2, DIM)
    q, one = randn(2, 4, 1, DIM), randn(2, 2, 9, DIM)
    with pytest.raises(ValueError, match="append_kv: cache: got 9 new tokens behind 0 for sequence 0"):
        cache.append(one, one)
    with pytest.raises(ValueError, match="cached_attention: cache: got 9 new tokens"):
        onepass.cached_attention(q, cache, k_new=one, v_new=one)
    with pytest.raises(ValueError, match="num_heads divisible by num_heads_kv"):
        onepass.cached_attention(randn(2, 3, 1, DIM), cache)
    with pytest.raises(TypeError, match="cached_attention: q: got int32"):
        onepass.cached_attention(q.int(), cache)
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        onepass.cached_attention(q.requires_grad_(), cache)
    assert cache.seqlens.tolist() == [0, 0]
    assert not cache.k.any()


def test_compiles_into_one_graph():
    torch.manual_seed(9)

    def step(q: Tensor, k: Tensor, v: Tensor, cache: onepass.KVCache) -> Tensor:
        return onepass.cached_attention(q * 2, cache, k_new=k, v_new=v) + 1

    eager, compiled = (onepass.KVCache(1, 8, 1, DIM, dtype=torch.float32) for _ in range(2))
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        q, k, v = randn(1, 2, 1, DIM), randn(1, 1, 1, DIM), randn(1, 1, 1, DIM)
        torch.testing.assert_close(fast(q, k, v, compiled), step(q, k, v, eager), atol=0, rtol=0)
    assert compiled.seqlens.tolist() == [3]
