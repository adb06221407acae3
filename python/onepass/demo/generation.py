"""Text from the trained byte-level GPT, one byte at a time over key/value caches: unquantized, int8 and fp8."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import onepass
from onepass.demo.model import ByteGPT
from onepass.demo.training import precision

STORAGES: dict[str, dict[str, Any]] = {
    "unquantized": {},
    "int8": {"quantization": "int8"},
    "fp8_e4m3": {"quantization": "fp8_e4m3"},
}
RECOMPUTED = 48  # bytes that are also generated without a cache, for its speed


class Decoder:
    """The model with one :class:`onepass.KVCache` per layer, for a batch of sequences of up to ``max_seqlen`` bytes."""

    def __init__(self, model: ByteGPT, batch: int, max_seqlen: int, **storage: Any) -> None:
        self.model = model
        device = model.head.weight.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        heads, dim = model.size.heads, model.size.width // model.size.heads
        self.caches = [
            onepass.KVCache(batch, max_seqlen, heads, dim, dtype=self.dtype, device=device, **storage)
            for _ in model.blocks
        ]
        self.rotation = model.rotation(max_seqlen)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Logits float32 (batch, tokens, 256) of the next ``ids`` (batch, tokens) of the sequences."""
        caches = iter(self.caches)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return onepass.cached_attention(
                q.to(self.dtype),
                next(caches),
                k_new=k.to(self.dtype),
                v_new=v.to(self.dtype),
                rotary_cos=self.rotation[0],
                rotary_sin=self.rotation[1],
                window=(self.model.size.seqlen - 1, 0),  # no longer context than in training
            )

        with precision(ids.device):
            return self.model(ids, attend).float()


@dataclass(frozen=True)
class Sample:
    """One continuation, its speed, and how far the storage moves the logits of a text of the same length."""

    text: str
    tokens_per_second: float
    cache_bytes: int
    largest_logit_difference: float
    same_choices: float  # share of positions where the most probable byte is the same


def generate(
    step: Callable[[Tensor], Tensor],
    prompt: Tensor,
    length: int,
    progress: Progress,
    title: str,
    temperature: float = 0.6,
) -> tuple[Tensor, float]:
    """``prompt`` (1, tokens) continued by ``length`` sampled bytes, and bytes a second, the prompt's pass left out.

    Args:
        step: logits of the last of the ids that it has not seen yet.
    """
    generator = torch.Generator(prompt.device).manual_seed(4)
    ids, new = prompt, prompt
    start = time.perf_counter()
    for index in progress.track(range(length), description=title):
        probabilities = torch.softmax(step(new)[:, -1] / temperature, dim=-1)
        new = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
        if index == 0:
            new.item()  # waits for the device
            start = time.perf_counter()
    ids[0, -1].item()
    return ids, (length - 1) / max(time.perf_counter() - start, 1e-9)


@torch.no_grad()
def compare(
    model: ByteGPT, prompt: str, length: int, text: Tensor, progress: Progress
) -> tuple[dict[str, Sample], float]:
    """A sample with each storage, and bytes a second when everything is computed anew for each byte.

    Args:
        text: uint8 (bytes) that the model has not seen; its beginning is what logits are compared on.
    """
    device = model.head.weight.device
    ids = torch.tensor([list(prompt.encode())], device=device)
    excerpt = text[: min(ids.shape[1] + length, model.size.seqlen)].long().to(device)[None]
    with precision(device):
        want = model(excerpt).float()
    samples = {}
    for name, storage in STORAGES.items():
        decoder = Decoder(model, 1, ids.shape[1] + length, **storage)
        out, speed = generate(decoder, ids, length, progress, f"writing a sample, {name} cache")
        got = Decoder(model, 1, excerpt.shape[1], **storage)(excerpt)
        samples[name] = Sample(
            bytes(out[0].tolist()).decode(errors="replace"),
            speed,
            decoder.nbytes,
            (got - want).abs().max().item(),
            (got.argmax(-1) == want.argmax(-1)).float().mean().item(),
        )

    seen = ids[:, :0]

    def recompute(new: Tensor) -> Tensor:
        nonlocal seen
        seen = torch.cat([seen, new], dim=1)
        with precision(device):
            return model(seen[:, -model.size.seqlen :])[:, -1:].float()

    _, recomputed = generate(recompute, ids, min(length, RECOMPUTED), progress, "writing without a cache")
    return samples, recomputed


def table(samples: dict[str, Sample], recomputed: float) -> Table:
    rows = Table(title="Generating with a key/value cache", box=None, pad_edge=False)
    for title in ("cache", "bytes/s", "cache size", "largest logit difference", "same choice"):
        rows.add_column(title, justify="left" if title == "cache" else "right")
    for name, sample in samples.items():
        rows.add_row(
            name,
            f"{sample.tokens_per_second:.0f}",
            f"{sample.cache_bytes / 1024:.0f} KiB",
            f"{sample.largest_logit_difference:.1e}",
            f"{100 * sample.same_choices:.1f} %",
        )
    rows.add_row("none: all computed anew", f"{recomputed:.0f}", "", "", "")
    return rows
