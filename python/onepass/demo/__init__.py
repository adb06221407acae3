"""``onepass demo``: a real model and a training run on real text, with onepass attention, in a few minutes."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported by run(), so that --help is quick
    import torch

# Long enough to have a function header and a docstring to continue.
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """'


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="embed sentences with a real model, then train a small byte-level GPT",
        description="(a) Embeds sentences with all-MiniLM-L6-v2 through transformers and onepass. (b) Trains a small "
        "byte-level GPT on the source of Python's standard library with onepass' forward and backward, its first steps "
        "side by side with torch's SDPA, and writes samples over key/value caches, unquantized, int8 and fp8. About 4 "
        "minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("sentences", nargs="*", help="sentences to compare (a default set when none is given)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU when there is one"
    )
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--compare", type=int, default=150, help="first steps that torch's SDPA takes as well")
    parser.add_argument("--sample", type=int, default=400, help="bytes of text to generate")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the results")
    parser.add_argument("--skip-training", action="store_true", help="only part (a)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns the process' exit status."""
    import torch
    from rich.console import Console
    from rich.panel import Panel
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    import onepass
    from onepass.demo import embeddings, generation, training
    from onepass.demo.corpus import Corpus

    console = Console()
    device = _device(arguments.device)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    console.print(Panel(onepass.info().strip(), title=f"onepass demo on {device.type}", expand=False))

    def progress() -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

    with progress() as bar:
        result = embeddings.embed(arguments.sentences or list(embeddings.SENTENCES), device, bar)
    console.print(embeddings.table(result))
    summary: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "embeddings": {
            "sentences": result.sentences,
            "similarities": result.similarities.tolist(),
            "largest_difference_to_eager": result.largest_difference,
            "milliseconds": result.milliseconds,
        },
    }
    lines = [f"largest difference of any vector component to eager attention: {result.largest_difference:.1e}"]
    for title, times in result.milliseconds.items():
        lines.append(f"{title}: onepass {times['onepass']:.1f} ms, eager {times['eager']:.1f} ms")
    console.print(Panel("\n".join(lines), title="sentence embeddings", expand=False))

    if not arguments.skip_training:
        corpus = Corpus.load()
        size = training.CUDA_SIZE if device.type == "cuda" else training.CPU_SIZE
        with progress() as bar:
            trained = training.train(
                corpus, device, size, arguments.steps, min(arguments.compare, arguments.steps), bar
            )
            samples, recomputed = generation.compare(
                trained.onepass.model, PROMPT, arguments.sample, corpus.validation, bar
            )
        training.draw(trained, output / "loss_curve.png")
        sample = samples["unquantized"].text
        (output / "sample.txt").write_text(sample)
        console.print(Panel(sample, title="what the trained model writes (its prompt is the first line)", expand=False))
        ours, theirs = (1e3 * trained.step_seconds(run) for run in (trained.onepass, trained.torch))
        summary["training"] = {
            "corpus_bytes": corpus.train.numel(),
            "parameters": sum(p.numel() for p in trained.onepass.model.parameters()),
            "steps": trained.steps,
            "compared_steps": len(trained.torch.losses),
            "validation_loss_before": trained.initial_loss,
            "validation_loss_after": trained.final_loss,
            "largest_loss_difference_to_torch": trained.largest_loss_difference,
            "step_ms": {"onepass": ours, "torch SDPA": theirs},
            "losses": {"onepass": trained.onepass.losses, "torch SDPA": trained.torch.losses},
        }
        lines = [
            f"{corpus.train.numel() / 1e6:.1f} MB of Python, {corpus.files} files; {trained.steps} steps",
            f"validation loss {trained.initial_loss:.2f} → {trained.final_loss:.2f} nats per byte",
            f"loss against torch SDPA over {len(trained.torch.losses)} common steps: "
            f"differs by at most {trained.largest_loss_difference:.1e}",
            f"time of a step: onepass {ours:.0f} ms, torch SDPA {theirs:.0f} ms ({theirs / ours:.2f} ×)",
        ]
        console.print(Panel("\n".join(lines), title="training", expand=False))
        console.print(generation.table(samples, recomputed))
        summary["generation"] = {
            "bytes_per_second_without_a_cache": recomputed,
            "caches": {name: vars(sample) for name, sample in samples.items()},
        }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print("results: " + ", ".join(str(path) for path in sorted(output.iterdir())))
    return 0


def _device(choice: str) -> torch.device:
    import torch

    import onepass

    lines = onepass.info().splitlines()
    built = any(line.startswith(("cuda:", "hopper:")) and "absent" not in line for line in lines)
    usable = torch.cuda.is_available() and built
    if choice == "cuda" and not usable:
        raise SystemExit(f"onepass demo: --device: got cuda; need a GPU and a build for it\n{onepass.info()}")
    return torch.device("cuda" if usable and choice != "cpu" else "cpu")
