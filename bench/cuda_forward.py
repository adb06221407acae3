"""The record of the CUDA forward: onepass beside torch's cuDNN and flash backends, on a GPU.

``python bench/cuda_forward.py [--output FOLDER] [--quick]`` writes ``cuda-forward.json`` and ``cuda-forward.png``.
Contenders take turns in one process on the same random normal tensors; a time is the median over the rounds of
CUDA-event times of single calls. FLOPs: 4 batch heads queries keys head_dim for the visible pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onepass
import torch
import torch.nn.functional as F
from gpu import command_line, measure, panel, row, write
from torch.nn.attention import SDPBackend, sdpa_kernel

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS = 32768
WIDTH = 2048  # heads times head_dim


@dataclass(frozen=True)
class Case:
    """One shape. ``lengths``: of a ragged batch, packed; else ``batch`` sequences of ``seqlen``."""

    group: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen: int
    head_dim: int
    causal: bool
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    seqlen_q: int | None = None  # of a chunk of queries, the last of the sequence; else seqlen
    total_attention: bool = False  # as one more contender

    def flops(self) -> float:
        """Multiplications and additions of the visible (query, key) pairs."""
        pairs = 0.0
        if self.seqlen_q is not None:
            return 4.0 * self.batch * self.num_heads * self.head_dim * self.seqlen_q * self.seqlen
        for length in self.lengths or (self.seqlen,) * self.batch:
            if self.window is not None and self.window < length:
                pairs += self.window * length - self.window * (self.window - 1) / 2
            else:
                pairs += length * length / (2 if self.causal else 1)
        return 4 * self.num_heads * self.head_dim * pairs


def cases(quick: bool) -> list[Case]:
    lengths = LENGTHS[::3] if quick else LENGTHS
    found = [
        Case(f"head_dim {dim}", TOKENS // length, WIDTH // dim, WIDTH // dim, length, dim, causal)
        for dim in (64, 128)
        for length in lengths
        for causal in (False, True)
    ]
    found += [
        Case("head_dim 256", TOKENS // length, 8, 8, length, 256, causal)
        for length in (512, 2048, 8192)
        for causal in (False, True)
    ]
    found += [Case("GQA 32/8", TOKENS // length, 32, 8, length, 128, True) for length in (2048, 8192)]
    found += [Case("window 1024", 2, 16, 16, 16384, 128, True, window=1024)]
    mixture = (8192, 4096, 3000, 2048, 2048, 1500, 1024, 777, 512, 512, 333, 128)
    found += [Case("ragged", len(mixture), 16, 16, max(mixture), 128, True, lengths=mixture)]
    found += [Case("ragged, even", 16, 16, 16, 2048, 128, True, lengths=(2048,) * 16)]
    found += [Case("dense of it", 16, 16, 16, 2048, 128, True)]
    found += [Case("chunk of 256", 1, 8, 1, length, 128, False, seqlen_q=256) for length in (8192, 16384, 32768, 65536)]
    found += [Case("total attention", 4, 16, 16, 8192, 128, causal, total_attention=True) for causal in (False, True)]
    return found


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """What is timed, by contender."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    if case.lengths is not None:
        total = sum(case.lengths)
        q = torch.randn(total, case.num_heads, case.head_dim, **options)
        k, v = (torch.randn(total, case.num_heads_kv, case.head_dim, **options) for _ in range(2))
        starts = torch.tensor([0, *case.lengths], device="cuda").cumsum(0).int()
        longest = max(case.lengths)
        return {
            "onepass": lambda: onepass.varlen_attention(
                q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=case.causal
            )
        }
    q = torch.randn(case.batch, case.num_heads, case.seqlen_q or case.seqlen, case.head_dim, **options)
    k, v = (torch.randn(case.batch, case.num_heads_kv, case.seqlen, case.head_dim, **options) for _ in range(2))
    window = None if case.window is None else (case.window - 1, 0)
    found: dict[str, Callable[[], object]] = {
        "onepass": lambda: onepass.attention(q, k, v, causal=case.causal, window=window)
    }
    if window is not None:
        return found
    if case.total_attention:
        found["total attention"] = lambda: onepass.attention(q, k, v, causal=case.causal, return_total_attention=True)
        return found
    grouped = case.num_heads != case.num_heads_kv

    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

        return call

    found["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    if not grouped:
        found["flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
    return found


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for line, dim in enumerate((64, 128)):
        for column, causal in enumerate((False, True)):
            title = f"head_dim {dim}, {'causal' if causal else 'full'}"
            panel(
                axes[line][column], rows, ("onepass", "cudnn", "flash"), title, group=f"head_dim {dim}", causal=causal
            )
    axes[0][0].legend()
    figure.suptitle("Forward, bfloat16, " + torch.cuda.get_device_name())
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = command_line(__doc__).parse_args()
    rows: list[dict[str, object]] = []
    ratios: dict[str, list[float]] = {}
    with torch.no_grad():
        for case in cases(arguments.quick):
            times = measure(calls(case), rounds=2 if arguments.quick else 4, most=30, budget=6)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                rows.append(row(case, name, values, case.flops()))
            text = "  ".join(f"{name} {case.flops() / time * 1e-9:.0f}" for name, time in medians.items())
            if "cudnn" in medians:
                ratio = medians["cudnn"] / medians["onepass"]
                ratios.setdefault(case.group, []).append(ratio)
                text += f"  {ratio:.3f} x cudnn"
            print(f"{case.group:12s} {case.seqlen:6d} {'causal' if case.causal else 'full  '} {text}", flush=True)
    summary = {group: round(statistics.geometric_mean(values), 4) for group, values in ratios.items()}
    print("geometric mean over cudnn:", summary)
    write(arguments, "cuda-forward", rows, geometric_mean_over_cudnn=summary)
    if not arguments.quick:
        draw(rows, arguments.output / "cuda-forward.png")


if __name__ == "__main__":
    main()
