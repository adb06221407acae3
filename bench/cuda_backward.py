"""The record of the CUDA backward: beside torch's flash and cuDNN backends, on a GPU.

``python bench/cuda_backward.py [--output FOLDER] [--quick]`` writes ``cuda-backward.json`` and ``cuda-backward.png``.
Contenders take turns in one process on the same random normal bfloat16 tensors; a time is the median over the rounds
of CUDA-event times of single calls, everything that a backward call launches included. FLOPs: 2.5 times the
forward pass's, 4 batch heads queries keys head_dim for the visible pairs.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from cuda_forward import TOKENS, WIDTH, Case
from cuda_portable import grid_calls
from gpu import command_line, measure, panel, row, write

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CONTENDERS = ("onepass", "cudnn", "flash")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    for line, head_dim in zip(axes, (64, 128), strict=True):
        for axis, causal in zip(line, (False, True), strict=True):
            title = f"backward, head_dim {head_dim}, {'causal' if causal else 'full'}"
            panel(axis, rows, CONTENDERS, title, head_dim=head_dim, causal=causal)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = command_line(__doc__).parse_args()
    rows: list[dict[str, object]] = []
    ratios: dict[str, list[float]] = {}
    for head_dim in (64, 128):
        for seqlen in LENGTHS[::3] if arguments.quick else LENGTHS:
            for causal in (False, True):
                heads = WIDTH // head_dim
                case = Case(f"head_dim {head_dim}", TOKENS // seqlen, heads, heads, seqlen, head_dim, causal)
                _, calls = grid_calls(case)
                times = measure(calls, rounds=4, most=20, budget=15.0)
                for contender, milliseconds in times.items():
                    rows.append(row(case, contender, milliseconds, 2.5 * case.flops()))
                speed = {name: 2.5e-9 * case.flops() / statistics.median(found) for name, found in times.items()}
                ratios.setdefault(case.group, []).append(speed["onepass"] / speed["cudnn"])
                text = "  ".join(f"{name} {tflops:.0f}" for name, tflops in speed.items())
                print(f"{case.group:12s} {seqlen:6d} {'causal' if causal else 'full  '} {text}", flush=True)
    summary = {group: round(statistics.geometric_mean(values), 4) for group, values in ratios.items()}
    print("geometric mean over cudnn:", summary)
    write(arguments, "cuda-backward", rows, geometric_mean_over_cudnn=summary)
    if not arguments.quick:
        draw(rows, arguments.output / "cuda-backward.png")


if __name__ == "__main__":
    main()
