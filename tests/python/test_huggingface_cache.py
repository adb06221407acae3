"""onepass.huggingface.OnepassCache: generation equals eager's with beams and rollbacks, quantized storage is close."""

from __future__ import annotations

from typing import Any

import onepass.huggingface.cache as cache_module
import pytest
import torch
from hf_models import GENERATING, SEQLEN, Case, Causal, named, padding, relative_error, tokens
from onepass import KVCache, attention
from onepass.huggingface import OnepassCache, onepass_attention
from torch import Tensor
from transformers import PreTrainedModel

STORAGES: dict[str, dict[str, Any]] = {
    "contiguous": {"max_seqlen": 48},
    "growing": {},
    "pages": {"max_seqlen": 48, "page_size": 4},
    "growing pages": {"page_size": 16},
}
QUANTIZED: dict[str, tuple[dict[str, Any], float]] = {  # storage, allowed error of the logits over their largest
    "int8": ({"quantization": "int8"}, 0.06),
    "int8 pages": ({"quantization": "int8", "page_size": 4, "scale_granularity": "group:8"}, 0.06),
    "fp8_e4m3": ({"quantization": "fp8_e4m3"}, 0.3),
    "fp8_e5m2": ({"quantization": "fp8_e5m2", "page_size": 16}, 0.5),
    "bfloat16": ({"dtype": torch.bfloat16}, 0.03),
}
# MPT's model code refuses every cache that the user brings. Falcon, which makes mask tensors of its own, attends over
# copies.
CASES = [case for case in GENERATING if case.name != "mpt-alibi"]
DIRECT = [case for case in CASES if "falcon" not in case.name]


@pytest.fixture(autouse=True)
def _small_first_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 8)


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where stored keys and values are turned into tensors."""

    def refuse(*_: object) -> None:
        raise AssertionError("a copy of the cache was made")

    monkeypatch.setattr(KVCache, "dense", refuse)


def generate(model: PreTrainedModel, **options: Any) -> Tensor:
    settings = {"attention_mask": padding("left"), "max_new_tokens": 20, "do_sample": False}
    return model.generate(tokens(), **{**settings, **options})


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("case", DIRECT, ids=lambda case: case.name)
def test_greedy_tokens_equal_eager(case: Case, storage: str) -> None:
    want = generate(case.build(case.peer))
    cache = OnepassCache(**STORAGES[storage])
    assert torch.equal(generate(case.build("onepass"), past_key_values=cache), want)
    assert cache.get_seq_length() == SEQLEN + 19
    assert cache.nbytes == sum(layer.cache.nbytes for layer in cache.layers) > 0


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("storage", [{"page_size": 4}, {"quantization": "int8"}, {"quantization": "fp8_e4m3"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_device_of_the_model(name: str, storage: dict[str, Any], device: torch.device) -> None:
    """Storage, tables and masks live where the model does: the tokens are those of the CPU."""
    outputs = []
    for where in (torch.device("cpu"), device):
        model, cache = named(name).build("onepass").to(where), OnepassCache(**storage)
        ids, mask = tokens().to(where), padding("left").to(where)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)
        assert cache.layers[0].cache.k.device.type == where.type
        outputs.append(out.cpu())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copies_where_attention_cannot_read_the_cache(case: Case) -> None:
    """Falcon, and any model whose own eager code runs over the cache."""
    eager = case.build(case.peer)
    want = generate(eager)
    assert torch.equal(generate(case.build("onepass"), past_key_values=OnepassCache()), want)
    assert torch.equal(generate(eager, past_key_values=OnepassCache(page_size=4)), want)


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["opt", "gptj", "llama", "mistral-window"])
def test_beam_search_equals_eager(name: str, storage: str) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    want = generate(named(name).build("eager"), **options)
    cache = OnepassCache(**STORAGES[storage])
    assert torch.equal(generate(named(name).build("onepass"), past_key_values=cache, **options), want)


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("storage", QUANTIZED)
@pytest.mark.parametrize("name", ["opt", "gptj", "llama", "mistral-window"])
def test_quantized_logits_are_close(name: str, storage: str) -> None:
    options, allowed = QUANTIZED[storage]
    model, mask = named(name).build("onepass"), padding("left")
    ids = tokens()
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        cache = OnepassCache(**options)
        parts = [
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for begin, end in ((0, 14), (14, 15), (15, SEQLEN))
        ]
    got = torch.cat(parts, dim=1)
    error = relative_error(got[mask.bool()], want[mask.bool()])
    assert 0 < error < allowed


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("storage", [{}, {"page_size": 4}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["mistral-window", "gemma2-softcap", "gpt-oss-sinks"])
def test_windows_forget_what_they_have_passed(
    name: str, storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are those of a cache that keeps everything; storage stops growing."""
    monkeypatch.setattr(cache_module, "_KEPT_FOR_ROLLBACK", 3)
    model = named(name).build("onepass")
    kept = OnepassCache(max_seqlen=SEQLEN + 60, **storage)
    cache = OnepassCache(**storage)
    want = generate(model, past_key_values=kept, max_new_tokens=60)
    assert torch.equal(generate(model, past_key_values=cache, max_new_tokens=60), want)
    assert cache.get_seq_length() == SEQLEN + 59
    windowed = [layer for layer in cache.layers if layer.window is not None]
    assert windowed
    for layer in windowed:
        assert layer.forgotten > 0
        assert layer.length - layer.forgotten <= layer.cache.max_seqlen < SEQLEN + 59
        if "page_size" in storage:
            held = -(-(layer.length - layer.forgotten) // 4) * layer.cache.batch
            assert layer.cache.free_pages == layer.cache.k.shape[0] - held


def test_what_a_window_forgot_cannot_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_KEPT_FOR_ROLLBACK", 3)
    cache = OnepassCache()
    states = torch.randn(1, 2, 40, 8)
    query = torch.randn(1, 2, 1, 8)
    module = torch.nn.Module()
    for _ in range(2):
        key, value = cache.update(states, states, 0)
        onepass_attention(module, query, key, value, None, sliding_window=5)
    layer = cache.layers[0]
    assert layer.forgotten == 40 - 4 - 3
    dense = key.dequantized()
    assert dense.shape[2] == 80
    assert torch.equal(dense[:, :, 40:], states)
    assert not dense[:, :, : layer.forgotten].any()
    cache.crop(layer.forgotten + 4)
    with pytest.raises(ValueError, match=r"crop: got a length of 36; need at least 37: .* its window of 5 had passed"):
        cache.crop(36)
    with pytest.raises(ValueError, match=r"sliding_window: got 9; need the 5 of earlier calls"):
        onepass_attention(module, query, *cache.update(states, states, 0), None, sliding_window=9)


@pytest.mark.parametrize("storage", STORAGES)
def test_crop_goes_back(storage: str) -> None:
    """Rejected speculative tokens: after a rollback the same tokens give the same logits."""
    model, cache = named("llama").build("onepass"), OnepassCache(**STORAGES[storage])
    ids = tokens()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        first = model(ids[:, 9:14], past_key_values=cache).logits
        cache.crop(-5)
        assert cache.get_seq_length() == 9
        again = model(ids[:, 9:14], past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        whole = model(ids[:, :14], past_key_values=cache).logits
    assert torch.equal(first, again)
    assert relative_error(whole[:, 9:], first) < 2e-5


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_speculative_decoding_equals_eager(name: str, storage: str) -> None:
    """Drafts from the prompt itself, or from an assistant, are cropped where they are rejected."""
    ids = tokens()[:1, :6].repeat(1, 3)
    options = {"max_new_tokens": 14, "do_sample": False}
    want = named(name).build("eager").generate(ids, **options)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": named(name).build("onepass")}):
        cache = OnepassCache(**STORAGES[storage])
        got = named(name).build("onepass").generate(ids, past_key_values=cache, **options, **draft)
        assert torch.equal(got, want)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_conversation_goes_on(storage: str) -> None:
    """The cache of one answer serves the next question."""
    model, eager = named("llama").build("onepass"), named("llama").build("eager")
    cache, options = OnepassCache(**STORAGES[storage]), {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(tokens()[:, :10], past_key_values=cache, **options)
    question = torch.cat([first, tokens()[:, 10:15]], dim=1)
    second = model.generate(question, past_key_values=cache, **options)
    assert torch.equal(second, eager.generate(question, **options))


@pytest.mark.parametrize("storage", STORAGES)
def test_sequences_are_repeated_and_selected(storage: str) -> None:
    """A prompt computed once, continued in several ways."""
    model = named("llama").build("onepass")
    ids = tokens()
    with torch.no_grad():
        cache = OnepassCache(**STORAGES[storage])
        model(ids[:2, :10], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        got = model(ids[:, 10:], past_key_values=cache).logits
        rows = torch.cat([ids[[1, 0, 0], :10], ids[:, 10:]], dim=1)
        want = model(rows, use_cache=False).logits[:, 10:]
    assert cache.batch_size == 3
    assert relative_error(got, want) < 2e-5


@pytest.mark.parametrize("side", ["right", "holes"])
def test_masks_without_bounds_on_the_left(side: str) -> None:
    mask, ids = padding(side), tokens()
    logits = []
    for implementation in ("eager", "onepass"):
        model = named("llama").build(implementation)
        cache = OnepassCache() if implementation == "onepass" else None
        with torch.no_grad():
            first = model(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache, use_cache=True)
            second = model(ids[:, 15:], attention_mask=mask, past_key_values=first.past_key_values)
        logits.append(torch.cat([first.logits, second.logits], dim=1)[mask.bool()])
    assert relative_error(logits[1], logits[0]) < 2e-5


@pytest.mark.usefixtures("no_copies")
@pytest.mark.parametrize("window", [None, 5])
def test_calls_without_a_mask(window: int | None) -> None:
    """None with an OnepassCache: causal, the last query beside the last key, and not a static cache's unused tail."""
    q, k, v = torch.randn(3, 2, 4, 12, 16)
    cache = OnepassCache()
    cache.update(k[:, :, :9], v[:, :, :9], 0)
    states = cache.update(k[:, :, 9:], v[:, :, 9:], 0)
    out, _ = onepass_attention(Causal(), q[:, :, 9:], *states, None, sliding_window=window)
    options = {"causal": True, "window": None if window is None else (window - 1, 0)}
    want = attention(q, k, v, **options)[:, :, 9:].transpose(1, 2)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


def test_gradients_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"got ones that require a gradient; need torch\.no_grad"):
        named("llama").build("onepass")(tokens(), past_key_values=OnepassCache())


def test_a_full_cache_is_refused() -> None:
    model, cache = named("llama").build("onepass"), OnepassCache(max_seqlen=16)
    assert cache.get_max_length(0) == -1  # layers appear with the first tokens
    with torch.no_grad():
        model(tokens()[:, :10], past_key_values=cache)
        assert cache.get_max_length() == 16
        with pytest.raises(ValueError, match="got 7 new tokens behind 10 for sequence 0; need room"):
            model(tokens()[:, 10:17], past_key_values=cache)
        model(tokens()[:, 10:16], past_key_values=cache)
    assert cache.get_seq_length() == 16
