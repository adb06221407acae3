"""onepass.KVCache and onepass.cached_attention against attention over the dequantized cache in float64."""

from __future__ import annotations

import copy
import math

import onepass
import pytest
import torch
from torch import Tensor

BATCH, HEADS, HEADS_KV, DIM = 3, 8, 2, 64
STORAGES = [
    {},
    {"dtype": torch.float32},
    {"quantization": "int8"},
    {"quantization": "int8", "scale_granularity": "token"},
    {"quantization": "int8", "scale_granularity": "group:16"},
    {"quantization": "int8", "scale_granularity": "tensor", "k_scale": 0.03, "v_scale": 0.03},
    {"quantization": "fp8_e4m3"},
    {"quantization": "fp8_e5m2", "k_scale": 0.5, "v_scale": 2.0},
]


def storage_name(storage: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in storage.values()) or "bfloat16"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def stored(cache: onepass.KVCache, sequence: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence as float64 ``(num_heads_kv, length, dim)``, from the cache's tensors."""
    length = int(cache.seqlens[sequence])
    sides = []
    for values, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        dequantized = values.to(torch.float64)
        if scale is not None:
            scale = scale.to(torch.float64)
            if scale.numel() == 1:
                pass
            elif scale.dim() == 2:
                scale = scale[:, None, :, None]
            elif scale.dim() == 3:
                scale = scale[..., None]
            else:
                scale = scale.repeat_interleave(values.shape[-1] // scale.shape[-1], dim=-1)
            dequantized = dequantized * scale
        if cache.page_table is None:
            side = dequantized[sequence]
        else:
            pages = cache.page_table[sequence]
            side = torch.cat([dequantized[page] for page in pages[pages >= 0]] or [dequantized[0][:, :0]], dim=1)
        sides.append(side[:, :length])
    return sides[0], sides[1]


def expected(q: Tensor, cache: onepass.KVCache, sequence: int, *, causal: bool = True) -> tuple[Tensor, Tensor]:
    """out and lse of ``q`` (num_heads, seqlen_q, dim) over what a sequence has stored."""
    k, v = stored(cache, sequence)
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q.to(torch.float64) @ k.mT / math.sqrt(q.shape[-1])
    rows, keys = scores.shape[-2:]
    if causal:
        hidden = torch.ones(rows, keys).triu(keys - rows + 1).bool()
        scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights @ v, lse


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


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


def test_fork_shares_pages_and_copies_on_write():
    torch.manual_seed(5)
    cache = onepass.KVCache(3, 64, HEADS_KV, DIM, page_size=4, num_pages=12, quantization="int8")
    k = randn(3, HEADS_KV, 10, DIM)
    cache.append(k, k, seqlens=[10, 0, 0])
    assert cache.free_pages == 12 - 3
    cache.fork(0, 1)
    cache.fork(0, 2, 8)
    assert cache.free_pages == 12 - 3
    q = randn(3, HEADS, 1, DIM)
    before = onepass.cached_attention(q, cache)
    one = randn(3, HEADS_KV, 3, DIM)
    cache.append(one, one, seqlens=[0, 3, 0])
    assert cache.free_pages == 12 - 5  # a copy of the third page, and a fourth
    after = onepass.cached_attention(q, cache)
    torch.testing.assert_close(after[0], before[0], atol=0, rtol=0)
    torch.testing.assert_close(after[2], before[2], atol=0, rtol=0)
    for b in range(3):
        torch.testing.assert_close(after[b], expected(q[b], cache, b)[0].float(), atol=3e-6, rtol=1e-5)
    cache.free(0)
    cache.truncate(1, 9)
    torch.testing.assert_close(onepass.cached_attention(q, cache)[1], expected(q[1], cache, 1)[0].float())
    cache.reset()
    assert cache.free_pages == 12
    assert cache.seqlens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
@pytest.mark.parametrize("page_size", [None, 4])
def test_select_and_grow(storage, page_size):
    """Sequences are reordered, dropped and multiplied as beams are; then every one goes on by itself."""
    torch.manual_seed(10)
    cache = onepass.KVCache(3, 12, HEADS_KV, DIM, page_size=page_size, **storage)
    lengths = [10, 3, 7]
    cache.append(randn(3, HEADS_KV, 10, DIM), randn(3, HEADS_KV, 10, DIM), seqlens=lengths)
    before = [stored(cache, b) for b in range(3)]
    for index in ([2, 0, 2], [0, 0, 1, 1, 2], [4, 1]):
        cache.select(torch.tensor(index))
        before = [before[b] for b in index]
        lengths = [lengths[b] for b in index]
        assert cache.seqlens.tolist() == lengths
        for b in range(len(index)):
            for got, want in zip(stored(cache, b), before[b], strict=True):
                assert torch.equal(got, want)
    cache.grow(40)
    assert cache.max_seqlen == 40
    new = randn(2, HEADS_KV, 9, DIM)
    cache.append(new, new)
    for b in range(2):
        for got, want in zip(stored(cache, b), before[b], strict=True):
            assert torch.equal(got[:, : lengths[b]], want)
            tolerance = 0.5 if "quantization" in storage else 0.02
            torch.testing.assert_close(got[:, lengths[b] :].float(), new[b], atol=tolerance, rtol=0.1)
    if page_size is not None:
        cache.reset()
        assert cache.free_pages == cache.k.shape[0]


@pytest.mark.parametrize("storage", STORAGES, ids=storage_name)
@pytest.mark.parametrize("page_size", [None, 4])
def test_dense_copies(storage, page_size):
    cache = onepass.KVCache(2, 20, HEADS_KV, DIM, page_size=page_size, **storage)
    cache.append(randn(2, HEADS_KV, 13, DIM), randn(2, HEADS_KV, 13, DIM), seqlens=[13, 6])
    for sides, length in ((cache.dense(), 13), (cache.dense(torch.float16, 5), 5)):
        for side, dense in enumerate(sides):
            assert dense.shape == (2, HEADS_KV, length, DIM)
            for b in range(2):
                own = min(length, int(cache.seqlens[b]))
                want = stored(cache, b)[side][:, :own].to(dense.dtype)
                torch.testing.assert_close(dense[b, :, :own], want, atol=0, rtol=2e-3 if length == 5 else 1e-6)


def test_large_storage() -> None:
    """From 4 MiB on it is memory of its own kind (huge pages): zeros, copied and grown like any tensor."""
    for page_size in (None, 16):
        cache = onepass.KVCache(2, 9000, 2, 64, page_size=page_size)
        assert not cache.k.any()
        k, v = (randn(2, 2, 100, 64, dtype=torch.bfloat16) for _ in range(2))
        cache.append(k, v)
        other = copy.deepcopy(cache)
        cache.grow(12000)
        cache.append(k, v)
        assert torch.equal(cache.dense(torch.bfloat16)[0], torch.cat([k, k], dim=2))
        assert torch.equal(other.dense(torch.bfloat16)[1], v)


def test_tables_of_someone_else_are_not_reshaped():
    k = torch.zeros(4, HEADS_KV, 8, DIM)
    table = torch.zeros(2, 1, dtype=torch.int32)
    cache = onepass.KVCache.from_tensors(k, k.clone(), torch.zeros(2, dtype=torch.int32), page_table=table)
    for call in (lambda: cache.select(torch.tensor([1, 0])), lambda: cache.grow(64)):
        with pytest.raises(ValueError, match="got tables of someone else; need a cache that owns its storage"):
            call()


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


def test_bytes():
    plain = onepass.KVCache(2, 256, 4, 128, dtype=torch.float16)
    assert plain.nbytes == 2 * 2 * 256 * 4 * 128 * 2
    assert onepass.KVCache(2, 256, 4, 128, quantization="int8").nbytes <= 0.52 * plain.nbytes
    assert onepass.KVCache(2, 256, 4, 128, quantization="fp8_e4m3").nbytes <= 0.5 * plain.nbytes


REFUSALS = [
    ({"quantization": "int4"}, "KVCache: quantization: got 'int4'"),
    ({"quantization": "int8", "scale_granularity": "row"}, "KVCache: scale_granularity: got 'row'"),
    ({"quantization": "int8", "scale_granularity": "group:7"}, "KVCache: scale_granularity: got group:7"),
    ({"quantization": "int8", "scale_granularity": "tensor"}, "KVCache: k_scale and v_scale: got none"),
    ({"dtype": torch.int8}, "KVCache: dtype: got torch.int8"),
    ({"num_pages": 3}, "KVCache: num_pages: got 3"),
    ({"page_size": 0}, "KVCache: page_size: got 0"),
    ({"k_scale": 1.0}, "KVCache: k_scale: got 1.0"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refused_caches(arguments, message):
    with pytest.raises(ValueError, match="need") as error:
        onepass.KVCache(2, 16, 1, 64, **arguments)
    assert str(error.value).startswith(message)


def test_a_full_cache_is_refused_and_stays_usable():
    cache = onepass.KVCache(2, 8, 1, DIM, page_size=4, num_pages=3)
    one = randn(2, 1, 6, DIM)
    with pytest.raises(torch.OutOfMemoryError, match="a need for 4 pages; need at most the 3 free ones"):
        cache.append(one, one)
    assert cache.seqlens.tolist() == [0, 0]
    assert cache.free_pages == 3
    cache.append(one, one, seqlens=[6, 2])
    with pytest.raises(ValueError, match=r"3 new tokens behind 6 for sequence 0; need room"):
        cache.append(one[..., :3, :], one[..., :3, :])
    q = randn(2, 2, 1, DIM)
    out = onepass.cached_attention(q, cache)
    for b in range(2):
        torch.testing.assert_close(out[b], expected(q[b], cache, b)[0].float(), atol=3e-6, rtol=1e-5)


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
