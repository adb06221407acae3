"""How CUDA calls run: streams, graph capture, determinism, devices, and the same results as on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import onepass
import pytest
import torch
from queued import assert_same_when_queued

SHAPE = (2, 4, 70, 64)  # batch, num_heads, seqlen, head_dim
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    """q, k, v and the output's gradient; the same numbers on every device."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=generator).to(dtype).to(device) for _ in range(4)]


def forward_and_gradients(tensors: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = onepass.attention(q, k, v, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 3), "softcap": 5.0}], ids=str)
def test_same_results_as_on_the_cpu(dtype: torch.dtype, options: dict[str, object]) -> None:
    on_cpu = forward_and_gradients(
        inputs(torch.float32, "cpu") if dtype is torch.float32 else inputs(dtype, "cpu"), **options
    )
    on_gpu = forward_and_gradients(inputs(dtype), **options)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_current_stream_is_used(dtype: torch.dtype) -> None:
    want = forward_and_gradients(inputs(dtype), deterministic=True)
    stream = torch.cuda.Stream()
    tensors = inputs(dtype)
    for x in tensors:
        x.record_stream(stream)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a call on any other stream would overtake this
        for x in tensors:
            x.mul_(2)
        q, k, v, gradient = tensors
        got = forward_and_gradients([q / 2, k / 2, v / 2, gradient / 2], deterministic=True)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_capture_and_replay(dtype: torch.dtype) -> None:
    static = inputs(dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_and_gradients(static, causal=True, deterministic=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_gradients(static, causal=True, deterministic=True)
    fresh = [torch.randn_like(x) for x in static]
    for x, y in zip(static, fresh, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(results, forward_and_gradients(fresh, causal=True, deterministic=True), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_runs_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = [x.repeat(1, 1, 5, 1) for x in inputs(dtype)]
    want = forward_and_gradients(tensors, causal=True, deterministic=True)
    for _ in range(20):
        for a, b in zip(forward_and_gradients(tensors, causal=True, deterministic=True), want, strict=True):
            assert torch.equal(a, b)


def test_memory_stays_flat() -> None:
    tensors = inputs(torch.bfloat16)
    forward_and_gradients(tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2000):
        forward_and_gradients(tensors)
    torch.cuda.synchronize()
    for _ in range(100):  # the autograd engine's thread lets go of the last graph a little later
        if torch.cuda.memory_allocated() == before:
            break
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before


def test_tensors_of_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = [x.to("cuda:1") for x in inputs(torch.bfloat16)]
    with torch.cuda.device(0):
        got = forward_and_gradients(tensors, deterministic=True)
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, forward_and_gradients(inputs(torch.bfloat16), deterministic=True), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("total_attention", [False, True])
def test_calls_that_wait_for_one_another(total_attention: bool) -> None:
    """A kernel may be set up before the one ahead of it, which writes its queries, has ended."""
    torch.manual_seed(8)
    q, k, v = (torch.randn(1, 40, 600, 64, device="cuda").bfloat16() for _ in range(3))

    def run(wait: Callable[[], None]) -> list[torch.Tensor]:
        x, results = q, []
        for _ in range(20):
            result = onepass.attention(x, k, v, causal=True, return_lse=True, return_total_attention=total_attention)
            wait()
            x = result.out
            results += [tensor for tensor in result if tensor is not None]
        return results

    assert_same_when_queued(run)


@pytest.mark.parametrize("total_attention", [False, True])
def test_more_tiles_than_a_ticket_counts(total_attention: bool) -> None:
    torch.manual_seed(9)
    q, k, v = (torch.randn(2, 40_000, 3, 64, device="cuda").bfloat16() for _ in range(3))

    def results(part: slice) -> list[torch.Tensor]:
        found = onepass.attention(q[part], k[part], v[part], return_lse=True, return_total_attention=total_attention)
        return [tensor for tensor in found if tensor is not None]

    for whole, *halves in zip(results(slice(2)), results(slice(1)), results(slice(1, 2)), strict=True):
        assert torch.equal(whole, torch.cat(halves))
