"""Trains the byte-level GPT with onepass, for its first steps side by side with torch's SDPA."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor

from onepass.demo.corpus import Corpus, batch
from onepass.demo.model import ByteGPT, Size, onepass_attention, torch_attention

CPU_SIZE = Size(layers=4, width=192, heads=3, seqlen=1024, batch=2)
CUDA_SIZE = Size(layers=8, width=512, heads=4, seqlen=2048, batch=8)


@dataclass
class Run:
    """One model with its optimisers and what was measured: loss in nats per byte and seconds, one entry per step."""

    name: str
    model: ByteGPT
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Muon (Jordan et al. 2024) on the matrices of the blocks: on a few minutes of text it learns far faster.
        matrices = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
            torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def step(self, excerpts: Tensor, rate: float) -> None:
        """One optimiser step with ``rate`` times the full learning rate."""
        start = time.perf_counter()
        with precision(excerpts.device):
            loss = self.model.loss(excerpts)
        loss.backward()
        for optimizer, full_rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = full_rate * rate
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)


def precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@dataclass
class Training:
    """Both runs, with the validation losses of onepass before and after, in nats per byte."""

    onepass: Run
    torch: Run
    steps: int
    initial_loss: float
    final_loss: float

    @property
    def largest_loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.onepass.losses, self.torch.losses, strict=False))

    def step_seconds(self, run: Run) -> float:
        """Median over the steps that both runs took, the first ones (warm-up) left out."""
        count = len(self.torch.seconds)
        return statistics.median(run.seconds[min(3, count - 1) : count])


def train(corpus: Corpus, device: torch.device, size: Size, steps: int, compared: int, progress: Progress) -> Training:
    """``steps`` steps with onepass; the first ``compared`` ones also with torch's SDPA, from the same weights, on the
    same excerpts, the two alternating."""
    torch.manual_seed(0)
    ours = Run("onepass", ByteGPT(size, onepass_attention).to(device))
    theirs = Run("torch SDPA", ByteGPT(size, torch_attention).to(device))
    theirs.model.load_state_dict(ours.model.state_dict())
    generator = torch.Generator().manual_seed(1)
    initial = validation_loss(ours.model, corpus, device)
    task = progress.add_task("training", total=steps + compared)
    for step in range(steps):
        excerpts = batch(corpus.train, size.batch, size.seqlen, generator, device)
        runs = [ours, theirs] if step < compared else [ours]
        for run in runs if step % 2 == 0 else reversed(runs):
            run.step(excerpts, learning_rate(step, steps))
            progress.advance(task)
        progress.update(task, description=f"training, step {step + 1}: loss {ours.losses[-1]:.3f}")
    return Training(ours, theirs, steps, initial, validation_loss(ours.model, corpus, device))


def learning_rate(step: int, steps: int) -> float:
    """Fraction of the full rate: 10 steps of warm-up, constant, then down to 2 % over the second half."""
    return min(1.0, (step + 1) / 10, max(0.02, 2 * (steps - step) / steps))


@torch.no_grad()
def validation_loss(model: ByteGPT, corpus: Corpus, device: torch.device) -> float:
    """Mean over 8 fixed batches of files that training never sees."""
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(8):
        excerpts = batch(corpus.validation, model.size.batch, model.size.seqlen, generator, device)
        with precision(device):
            losses.append(model.loss(excerpts).item())
    return statistics.fmean(losses)


def draw(training: Training, path: Path) -> None:
    """The loss of both runs over the steps, and the time of their common steps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, time_axes = figure.subplots(1, 2, width_ratios=[3, 2])
    loss_axes.plot(smooth(training.onepass.losses), label="onepass", color="C0")
    loss_axes.plot(smooth(training.torch.losses), label="torch SDPA", color="C1", linestyle="--")
    loss_axes.axhline(training.final_loss, color="gray", linewidth=0.8, linestyle=":", label="validation, at the end")
    loss_axes.set(xlabel="step", ylabel="loss, nats per byte", title="Byte-level GPT on Python's standard library")
    loss_axes.set_ylim(0, math.log(256))
    loss_axes.legend()
    count = len(training.torch.seconds)
    for run, color in ((training.onepass, "C0"), (training.torch, "C1")):
        milliseconds = [1e3 * s for s in run.seconds[3:count]]
        label = f"{run.name}: median {1e3 * training.step_seconds(run):.0f} ms"
        time_axes.plot(range(3, 3 + len(milliseconds)), milliseconds, ".", markersize=3, color=color, label=label)
    time_axes.set(xlabel="step", ylabel="time of a step, ms", title="Forward, backward and optimiser")
    time_axes.set_ylim(bottom=0)
    time_axes.legend()
    figure.savefig(path, dpi=130)


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Mean over the last ``window`` values."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
