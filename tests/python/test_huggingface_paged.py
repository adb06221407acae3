"""Continuous batching: generate_batch through onepass gives the tokens of generate, one request at a time."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
import transformers
from hf_models import VOCABULARY, Case, named
from onepass.huggingface import paged_attention
from packaging.version import parse
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

NAMES = ["llama", "opt", "mistral-window", "gemma2-softcap", "gpt-oss-sinks"]
LENGTHS = [19, 3, 11, 1, 26]
NEW = 12


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "ContinuousBatchingLogger")


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def one_by_one(case: Case, inputs: list[list[int]]) -> list[list[int]]:
    model = case.build("eager")
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        for ids in inputs
    ]


# transformers < 5.20 says block_size.
PAGE_SIZE = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"


def batched(model: Any, inputs: list[list[int]], page_size: int = 4, **settings: Any) -> list[list[int]]:
    """Few tokens a step and small pages, so that prompts are cut into chunks and mixed with decoding requests."""
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            **{"num_blocks": 64, "max_batch_tokens": 16, PAGE_SIZE: page_size, **settings}
        ),
    )
    assert all(output.error is None for output in outputs.values())
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(ids)] for ids in inputs]


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_generate(name: str, page_size: int) -> None:
    if name == "opt" and parse(transformers.__version__) >= parse("5.24.dev0"):
        pytest.skip("transformers' OPT code asks the paged cache for what it lacks, with every implementation")
    model = named(name).build("onepass")
    assert batched(model, prompts(), page_size=page_size) == one_by_one(named(name), prompts())
    assert model.config._attn_implementation == "onepass", "restored"


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_device_of_the_model(name: str, device: torch.device) -> None:
    model = named(name).build("onepass").to(device)
    assert batched(model, prompts()) == one_by_one(named(name), prompts())


def test_full_layers_read_pages_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.generation.continuous_batching.cache_allocators"
    allocator = pytest.importorskip(name, reason="an older transformers").FullAttentionCacheAllocator
    update = allocator.update

    def without_reading(self: Any, *args: Any, **kwargs: Any) -> Any:
        read_index = kwargs.get("read_index", args[3] if len(args) > 3 else None)
        assert read_index.numel() == 0, "keys and values were gathered"
        return update(self, *args, **kwargs)

    monkeypatch.setattr(allocator, "update", without_reading)
    assert batched(named("llama").build("onepass"), prompts()) == one_by_one(named("llama"), prompts())


@pytest.mark.filterwarnings("ignore:.*paged.*:FutureWarning")
def test_the_prefixed_name() -> None:
    assert batched(named("llama").build("paged|onepass"), prompts()) == one_by_one(named("llama"), prompts())


def test_requests_share_prefixes() -> None:
    first = prompts()[4]
    inputs = [first, [*first[:20], 5, 6, 7], [*first[:20], 9]]
    got = batched(named("llama").build("onepass"), inputs, allow_block_sharing=True)
    assert got == one_by_one(named("llama"), inputs)


def test_generate_works_afterwards() -> None:
    model, ids = named("llama").build("onepass"), prompts()[0]
    batched(model, [ids])
    got = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    assert got == one_by_one(named("llama"), [ids])[0]


def test_models_with_their_own_attention_code_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="got a BloomForCausalLM, whose attention code is its own"):
        batched(named("bloom-alibi").build("onepass"), prompts())


def test_calls_without_a_cache_are_refused() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="cache: got none; need generate_batch"):
        paged_attention(torch.nn.Module(), q, q, q, None)
