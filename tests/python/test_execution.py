"""How calls run: threads, fork, repeatability, memory, values that must not leak, large tensors."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable

import onepass
import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype: torch.dtype = torch.float32, seqlen: int = 200, device: str | torch.device = "cpu") -> list[Tensor]:
    return [torch.randn(2, 4, seqlen, 32).to(device, dtype) for _ in range(3)]


def bits(call: Callable[[], Tensor]) -> bytes:
    return call().detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def step(tensors: list[Tensor]) -> Tensor:
    """Output and gradients of one deterministic step, in one tensor."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors)
    out = onepass.attention(q, k, v, causal=True, deterministic=True)
    return torch.cat([t.flatten() for t in (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))])


# Determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_run(dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(dtype, device=device)
    first = bits(lambda: step(tensors))
    assert all(bits(lambda: step(tensors)) == first for _ in range(10))


def test_the_same_bits_with_any_number_of_threads() -> None:
    tensors = inputs(seqlen=500)
    threads = torch.get_num_threads()
    try:
        results = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.add(bits(lambda: onepass.attention(*tensors, causal=True)))
        assert len(results) == 1
    finally:
        torch.set_num_threads(threads)


# Threads and processes --------------------------------------------------------------------------------------------


def test_many_python_threads_share_nothing() -> None:
    work = [(inputs(seqlen=n), n) for n in (3, 64, 130, 300)]
    expected = {n: bits(lambda t=tensors: onepass.attention(*t, causal=True)) for tensors, n in work}
    wrong: list[int] = []

    def loop(tensors: list[Tensor], n: int) -> None:
        for _ in range(15):
            if bits(lambda: onepass.attention(*tensors, causal=True)) != expected[n]:
                wrong.append(n)

    threads = [threading.Thread(target=loop, args=pair) for pair in work * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_in_one_thread_leaves_the_others_alone() -> None:
    q, k, v = inputs()
    expected = bits(lambda: onepass.attention(q, k, v))
    messages: list[str] = []

    def failing() -> None:
        for _ in range(20):
            with pytest.raises(ValueError, match="softcap") as raised:
                onepass.attention(q, k, v, softcap=-1.0)
            messages.append(str(raised.value))

    thread = threading.Thread(target=failing)
    thread.start()
    for _ in range(20):
        assert bits(lambda: onepass.attention(q, k, v)) == expected
    thread.join()
    assert len(set(messages)) == 1


def in_child(work: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Runs ``work`` in a forked child; False also when it hangs or dies."""
    child = os.fork()
    if child == 0:
        succeeded = False
        try:
            succeeded = work()
        finally:
            os._exit(0 if succeeded else 1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_a_parallel_call() -> None:
    """OpenMP's threads do not survive fork; a child that waited for them would hang (as torch's own operations do)."""
    q, k, v = inputs(seqlen=700)

    def result() -> bytes:
        return bits(lambda: onepass.attention(q, k, v, causal=True))

    expected = result()

    def child() -> bool:
        many = result() == expected
        torch.set_num_threads(1)
        return many and result() == expected

    assert in_child(child)
    assert result() == expected


# Memory -----------------------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_memory_stays_flat() -> None:
    """20000 small calls of every path, in rounds: the last rounds hold no more than the first ones did."""
    q, k, v = (torch.randn(1, 2, 16, 32) for _ in range(3))
    learned = q.clone().requires_grad_()
    bias = torch.zeros(2, 1, 16)

    def calls(count: int) -> int:
        for _ in range(count):
            onepass.attention(q, k, v)
            onepass.attention(q, k, v, bias=bias, dropout_p=0.1, return_lse=True)
            onepass.attention(learned, k, v, causal=True).sum().backward()
            with contextlib.suppress(ValueError):
                onepass.attention(q, k, v, softcap=-1.0)
        return resident()

    calls(2000)
    before = calls(500)
    assert calls(2500) - before < 2**20


def test_memory_is_linear_in_the_length() -> None:
    """A score matrix of this call would take 1.9 GiB; the process grows by outputs and small workspaces only."""
    q, k, v = (torch.randn(1, 2, 16000, 16, dtype=torch.bfloat16) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    onepass.attention(q, k, v, window=(64, 0))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB"


# Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_hidden_keys_do_not_leak(poison: float, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(dtype, device=device)
    begin, end = torch.tensor([0, 70], dtype=torch.int32), torch.tensor([131, 200], dtype=torch.int32)
    options = {"key_begin": begin.to(device), "key_end": end.to(device), "causal": True}
    clean = [t.clone() for t in (k, v)]
    for tensor in (k, v):
        tensor[0, :, 131:] = poison
        tensor[1, :, :70] = poison
    for zeroed in clean:
        zeroed[0, :, 131:] = 0
        zeroed[1, :, :70] = 0
    assert torch.equal(onepass.attention(q, k, v, **options), onepass.attention(q, *clean, **options))
    learned = [tensor.requires_grad_() for tensor in (q, k, v)]
    gradients = torch.autograd.grad(onepass.attention(*learned, **options).float().sum(), learned)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][0, :, 131:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_visible_nan_reaches_exactly_the_rows_that_see_it(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(dtype, 150, device)
    k[1, 2, 90, 3] = torch.nan
    out = onepass.attention(q, k, v, causal=True)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 2, 90:] = True
    assert torch.equal(out.isnan(), expected)
    q, k, v = inputs(dtype, 150, device)
    q[0, 1, 7, 0] = torch.nan
    expected = torch.zeros_like(expected)
    expected[0, 1, 7] = True
    assert torch.equal(onepass.attention(q, k, v, causal=True).isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_stay_finite(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = inputs(dtype, 64, device)
    large = 240.0 if dtype == torch.float16 else 133120.0
    huge = onepass.attention(q * large, k * large, v, softmax_scale=1.0)
    assert huge.isfinite().all()
    # Every logit near −6e4: the weights are what they are near 0.
    ones = torch.ones_like(q)
    low = onepass.attention(ones * -60, ones * 60, v, softmax_scale=0.5)
    torch.testing.assert_close(low, v.float().mean(2, keepdim=True).expand_as(v).to(dtype), rtol=1e-2, atol=1e-2)
    # |logit / softcap| > 88 saturates.
    q.requires_grad_()
    capped = onepass.attention(q, k * 200, v, softcap=0.5, softmax_scale=10.0)
    (gradient,) = torch.autograd.grad(capped.float().sum(), q)
    assert capped.isfinite().all()
    assert gradient.isfinite().all()


def test_the_callers_denormal_mode_is_kept() -> None:
    q, k, v = inputs(seqlen=32)
    tiny = torch.tensor([1e-40])
    for mode in (True, False):
        if not torch.set_flush_denormal(mode):
            pytest.skip("no control over denormals")
        try:
            onepass.attention(q, k, v)
            assert bool((tiny * 1.0) == 0.0) == mode
        finally:
            torch.set_flush_denormal(False)


# Size -------------------------------------------------------------------------------------------------------------


def test_strides_beyond_32_bits(device: torch.device) -> None:
    """Keys of two heads 2³¹ elements apart (a sparse mapping on the CPU: no memory is touched between)."""
    if device.type == "cuda":
        pytest.skip("needs lazily mapped memory")
    stride = 2**31 + 64
    storage = torch.empty(stride + 8 * 16, dtype=torch.bfloat16)
    far = storage.as_strided((1, 2, 8, 16), (0, stride, 16, 1))
    near = torch.randn(1, 2, 8, 16).bfloat16()
    far.copy_(near)
    assert torch.equal(onepass.attention(far, far, far), onepass.attention(near, near, near))


def test_many_heads(device: torch.device) -> None:
    q = torch.randn(70000, 1, 2, 4).to(device)
    torch.testing.assert_close(onepass.attention(q, q, q)[-1:], onepass.attention(q[-1:], q[-1:], q[-1:]))
    flipped = q.transpose(0, 1)
    torch.testing.assert_close(onepass.attention(flipped, flipped, flipped)[0], onepass.attention(q, q, q)[:, 0])
