"""onepass.KVCache as storage: pages, forks, beams, growth, copies, bytes, and what it refuses."""

from __future__ import annotations

import copy

import onepass
import pytest
import torch
from cache_oracle import DIM, HEADS, HEADS_KV, STORAGES, expected, randn, storage_name, stored


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
