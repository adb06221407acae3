"""Caches on CUDA: the CPU's results, graphs that replay with new lengths, and indices out of range on the device."""

from __future__ import annotations

from collections.abc import Callable

import onepass
import pytest
import torch
from queued import assert_same_when_queued

BATCH, HEADS, HEADS_KV, DIM = 3, 8, 2, 64


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32)


@pytest.mark.parametrize("quantization", [None, "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_same_results_as_on_the_cpu(quantization: str | None, page_size: int | None, queries: int) -> None:
    torch.manual_seed(0)
    k, v = randn(BATCH, HEADS_KV, 150, DIM).half(), randn(BATCH, HEADS_KV, 150, DIM).half()
    q = randn(BATCH, HEADS, queries, DIM).half()
    results = []
    for device in ("cpu", "cuda"):
        cache = onepass.KVCache(
            BATCH,
            200,
            HEADS_KV,
            DIM,
            dtype=torch.float16,
            quantization=quantization,
            page_size=page_size,
            device=device,
        )
        cache.append(k.to(device), v.to(device), seqlens=[150, 47, 3])
        results.append(onepass.cached_attention(q.to(device), cache, return_lse=True))
    for cpu, gpu in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2, atol=1e-2)


def test_a_graph_replays_with_new_lengths() -> None:
    torch.manual_seed(1)
    cache = onepass.KVCache(BATCH, 300, HEADS_KV, DIM, device="cuda")
    k, v = (randn(BATCH, HEADS_KV, 300, DIM).cuda().bfloat16() for _ in range(2))
    cache.append(k, v)
    q = randn(BATCH, HEADS, 1, DIM).cuda().bfloat16()
    onepass.cached_attention(q, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = onepass.cached_attention(q, cache)
    for lengths in ([300, 1, 0], [7, 150, 299]):
        cache.seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, onepass.cached_attention(q, cache))


def test_pages_out_of_range_are_skipped() -> None:
    torch.manual_seed(2)
    k, v = (randn(4, HEADS_KV, 16, DIM).cuda().bfloat16() for _ in range(2))
    lengths = torch.tensor([48], dtype=torch.int32, device="cuda")
    q = randn(1, HEADS, 1, DIM).cuda().bfloat16()

    def attended(pages: list[int], count: int) -> torch.Tensor:
        table = torch.tensor([pages], dtype=torch.int32, device="cuda")
        cache = onepass.KVCache.from_tensors(k, v, lengths.clamp(max=count), page_table=table)
        return onepass.cached_attention(q, cache)

    want = attended([2, 0], 32)
    for bad in (-1, 4, 1 << 30):
        torch.testing.assert_close(attended([2, 0, bad], 48), want, rtol=1e-2, atol=1e-2)


def long_cache(seed: int, tokens: int, capacity: int = 6000) -> tuple[onepass.KVCache, torch.Tensor]:
    """One sequence whose key/value heads are shared by all multiprocessors, and a query."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    cache = onepass.KVCache(1, capacity, HEADS_KV, 128, device="cuda")
    shape = (1, HEADS_KV, tokens, 128)
    cache.append(*(torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2)))
    return cache, torch.randn(1, HEADS, 1, 128, device="cuda", generator=generator).bfloat16()


def test_graphs_replay_side_by_side() -> None:
    graphs, outs, wants = [], [], []
    for seed in range(3):
        cache, q = long_cache(seed, 6000 - 1000 * seed)
        wants.append(onepass.cached_attention(q, cache))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([onepass.cached_attention(q, cache) for _ in range(4)])
        graphs.append((graph, cache, q))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(25):
        for stream, (graph, _, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for want, results in zip(wants, outs, strict=True):
        assert all(torch.equal(out, want) for out in results)


def test_a_graph_of_append_and_attention_generates() -> None:
    torch.manual_seed(3)
    steps = 60
    new = [randn(steps, 1, HEADS_KV, 1, 128).cuda().bfloat16() for _ in range(2)]
    (cache, q), (eager, _) = long_cache(7, 3000), long_cache(7, 3000)
    k, v = (torch.zeros_like(tensor[0]) for tensor in new)
    onepass.cached_attention(q, cache, k_new=k, v_new=v)
    cache.seqlens.fill_(3000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = onepass.cached_attention(q, cache, k_new=k, v_new=v)
    for step in range(steps):
        k.copy_(new[0][step])
        v.copy_(new[1][step])
        graph.replay()
        assert torch.equal(out, onepass.cached_attention(q, eager, k_new=new[0][step], v_new=new[1][step]))
    assert cache.seqlens.tolist() == [3000 + steps]


@pytest.mark.parametrize(("batch", "queries", "dim"), [(1, 1, 128), (3, 8, 128), (3, 2, 64), (2, 1, 256), (40, 1, 64)])
def test_lengths_that_the_kernel_ahead_changes(batch: int, queries: int, dim: int) -> None:
    """A call may begin before the append ahead of it has ended: what it guesses from old lengths must not show."""
    torch.manual_seed(4)
    cache = onepass.KVCache(batch, 2000, HEADS_KV, dim, device="cuda")
    q = torch.randn(batch, HEADS, queries, dim, device="cuda").bfloat16()
    counts = [1, 900, 3, 700, 32]
    new = [torch.randn(2, batch, HEADS_KV, count, dim, device="cuda").bfloat16() for count in counts]

    def run(wait: Callable[[], None]) -> list[torch.Tensor]:
        cache.seqlens.zero_()
        outs = []
        for k, v in new:
            cache.append(k, v)
            wait()
            outs.append(onepass.cached_attention(q, cache))
        return outs

    assert_same_when_queued(run)
