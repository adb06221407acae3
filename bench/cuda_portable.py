"""The record of the portable CUDA kernels: forward and backward beside torch's flash and cuDNN backends, on a GPU.

``python bench/cuda_portable.py [--output FOLDER] [--quick]`` writes ``cuda-portable.json`` and
``cuda-portable.png``. The Hopper kernels are left out (``ONEPASS_BACKEND=cuda``). Contenders take turns in one process
on the same random normal tensors; a time is the median over the rounds of CUDA-event times of single calls. FLOPs:
4 batch heads queries keys head_dim for the visible pairs, backward 2.5 times as many; of piecewise attention those of
plain attention.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import onepass
import torch
import torch.nn.functional as F
from cuda_forward import TOKENS, WIDTH, Case
from gpu import Call, Calls, command_line, measure, panel, row, write
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MIXTURE = (8192, 4096, 3000, 2048, 2048, 1500, 1024, 777, 512, 512, 333, 128)


def with_backward(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> tuple[Call, Call]:
    """The forward call without a graph, and the backward call of a graph that is kept."""

    def forward_only() -> object:
        with torch.no_grad():
            return forward()

    out = forward()
    gradient = torch.randn_like(out)
    return forward_only, lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def operands(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(count)]


def grid_calls(case: Case) -> tuple[Calls, Calls]:
    """Forward and backward of every contender."""
    q, k, v = operands(3, (case.batch, case.num_heads, case.seqlen, case.head_dim))
    forward: Calls = {}
    backward: Calls = {}

    def add(name: str, call: Callable[[], torch.Tensor]) -> None:
        forward[name], backward[name] = with_backward(call, [q, k, v])

    def sdpa(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return call

    add("onepass", lambda: onepass.attention(q, k, v, causal=case.causal))
    add("flash", sdpa(SDPBackend.FLASH_ATTENTION))
    add("cudnn", sdpa(SDPBackend.CUDNN_ATTENTION))
    return forward, backward


def piecewise_calls(case: Case) -> tuple[Calls, Calls]:
    """Plain attention, and piecewise attention whose second pair begins a quarter of the sequence away."""
    tensors = operands(5, (case.batch, case.num_heads, case.seqlen, case.head_dim))
    q1, k1, q2, k2, v = tensors
    plain = with_backward(lambda: onepass.attention(q1, k1, v, causal=True), [q1, k1, v])
    pieces = with_backward(
        lambda: onepass.piecewise_attention(q1, k1, q2, k2, v, dist_threshold=case.seqlen // 4, causal=True), tensors
    )
    return (
        {"onepass": plain[0], "piecewise": pieces[0]},
        {"onepass": plain[1], "piecewise": pieces[1]},
    )


def ragged_calls(case: Case) -> tuple[Calls, Calls]:
    """The same sequences dense and packed."""
    q, k, v = operands(3, (case.batch, case.num_heads, case.seqlen, case.head_dim))
    dense = with_backward(lambda: onepass.attention(q, k, v, causal=case.causal), [q, k, v])
    packed = operands(3, (case.batch * case.seqlen, case.num_heads, case.head_dim))
    starts = (torch.arange(case.batch + 1, device="cuda") * case.seqlen).int()
    ragged = with_backward(lambda: varlen(packed, starts, case.seqlen, case.causal), packed)
    return ({"onepass": dense[0], "ragged": ragged[0]}, {"onepass": dense[1], "ragged": ragged[1]})


def mixture_calls(case: Case) -> tuple[Calls, Calls]:
    """A packed batch of unequal sequences."""
    assert case.lengths is not None
    packed = operands(3, (sum(case.lengths), case.num_heads, case.head_dim))
    starts = torch.tensor([0, *case.lengths], device="cuda").cumsum(0).int()
    ragged = with_backward(lambda: varlen(packed, starts, case.seqlen, case.causal), packed)
    return {"ragged": ragged[0]}, {"ragged": ragged[1]}


def varlen(packed: list[torch.Tensor], starts: torch.Tensor, longest: int, causal: bool) -> torch.Tensor:
    q, k, v = packed
    return onepass.varlen_attention(q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=causal)


def float32_calls(case: Case) -> tuple[Calls, Calls]:
    """float32 beside torch's memory-efficient backend, without tf32."""
    q, k, v = operands(3, (case.batch, case.num_heads, case.seqlen, case.head_dim), torch.float32)

    def efficient() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    ours = with_backward(lambda: onepass.attention(q, k, v, causal=case.causal), [q, k, v])
    theirs = with_backward(efficient, [q, k, v])
    return ({"onepass": ours[0], "efficient": theirs[0]}, {"onepass": ours[1], "efficient": theirs[1]})


def workload(quick: bool) -> list[tuple[Case, Callable[[Case], tuple[Calls, Calls]]]]:
    found: list[tuple[Case, Callable[[Case], tuple[Calls, Calls]]]] = [
        (Case(f"head_dim {dim}", TOKENS // length, WIDTH // dim, WIDTH // dim, length, dim, causal), grid_calls)
        for dim in (64, 128)
        for length in (LENGTHS[::3] if quick else LENGTHS)
        for causal in (False, True)
    ]
    found += [(Case("piecewise", TOKENS // s, 16, 16, s, 128, True), piecewise_calls) for s in (2048, 8192)]
    found += [(Case("ragged", TOKENS // s, 16, 16, s, 128, True), ragged_calls) for s in (1024, 4096)]
    found += [(Case("mixture", len(MIXTURE), 16, 16, max(MIXTURE), 128, True, lengths=MIXTURE), mixture_calls)]
    found += [(Case("float32", 4, 32, 32, 2048, 64, causal), float32_calls) for causal in (False, True)]
    return found


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), sharex=True)
    for line, direction in enumerate(("forward", "backward")):
        for column, (dim, causal) in enumerate((dim, causal) for dim in (64, 128) for causal in (False, True)):
            title = f"{direction}, head_dim {dim}, {'causal' if causal else 'full'}"
            fields = {"group": f"head_dim {dim}", "causal": causal, "direction": direction}
            panel(axes[line][column], rows, ("onepass", "flash", "cudnn"), title, **fields)
    axes[0][0].legend()
    figure.suptitle("Portable kernels, bfloat16, " + torch.cuda.get_device_name())
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    arguments = command_line(__doc__).parse_args()
    os.environ["ONEPASS_BACKEND"] = "cuda"
    rows: list[dict[str, object]] = []
    ratios: dict[str, list[float]] = {}
    for case, make in workload(arguments.quick):
        line = f"{case.group:12s} {case.seqlen:6d} {'causal' if case.causal else 'full  '}"
        for direction, factor, contenders in zip(("forward", "backward"), (1.0, 2.5), make(case), strict=True):
            times = measure(contenders, rounds=2 if arguments.quick else 3, most=20, budget=5)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                dtype = "float32" if case.group == "float32" else "bfloat16"
                rows.append(row(case, name, values, factor * case.flops(), dtype=dtype, direction=direction))
                if name != "onepass" and "onepass" in medians:
                    ratio = medians[name] / medians["onepass"]
                    ratios.setdefault(f"{case.group} {direction}: time of {name} over onepass", []).append(ratio)
            line += f"  {direction}: " + " ".join(f"{name} {time:.3f}" for name, time in medians.items())
        print(line + " ms", flush=True)
    summary = {name: round(statistics.geometric_mean(values), 4) for name, values in ratios.items()}
    print(json.dumps(summary, indent=1))
    write(arguments, "cuda-portable", rows, geometric_means=summary)
    if not arguments.quick:
        draw(rows, arguments.output / "cuda-portable.png")


if __name__ == "__main__":
    main()
