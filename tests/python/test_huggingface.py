"""transformers models with attn_implementation="onepass" against eager attention, small and randomly initialised."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hf_models import CASES, GENERATING, SEQLEN, VOCABULARY, Case, Causal, named, padding, relative_error, run, tokens
from onepass.huggingface import onepass_attention
from transformers import AutoModelForCausalLM, StaticCache


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_gradients_equal_eager(case: Case, side: str) -> None:
    mask = None if side == "none" else padding(side)
    eager, onepass = case.build(case.peer), case.build("onepass")
    want, want_gradients = run(eager, tokens(), mask)
    got, got_gradients = run(onepass, tokens(), mask)
    assert relative_error(got, want) < 2e-5
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        # A gradient that is only rounding noise (key biases: softmax cannot see them) is compared with the others.
        scale = max(gradient.abs().max().item(), 1e-3 * max(g.abs().max().item() for g in want_gradients.values()))
        assert ((got_gradients[name] - gradient).abs().max() / scale).item() < 1e-4, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eager_and_onepass_disagree_when_the_mask_is_dropped(case: Case) -> None:
    """The comparison above can fail: hiding keys changes these models' logits by far more than its tolerance."""
    model = case.build("onepass")
    with torch.no_grad():
        masked = model(input_ids=tokens(), attention_mask=padding("left")).logits[2, 9]
        unmasked = model(input_ids=tokens()).logits[2, 9]
    assert relative_error(masked, unmasked) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_is_as_close_to_float32_as_eager(case: Case, dtype: torch.dtype) -> None:
    reference = case.build(case.peer)
    state = {name: tensor.to(dtype).float() for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(state)
    mask = padding("left")
    with torch.no_grad():
        want = reference(input_ids=tokens(), attention_mask=mask).logits[mask.bool()]
        eager, onepass = (
            case.build(name, dtype)(input_ids=tokens(), attention_mask=mask).logits[mask.bool()].float()
            for name in (case.peer, "onepass")
        )
    scale = want.abs().max()
    eager_error, onepass_error = (eager - want).abs().max() / scale, (onepass - want).abs().max() / scale
    assert onepass_error <= 2 * eager_error + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("case", GENERATING, ids=lambda case: case.name)
def test_greedy_generation_equals_eager(case: Case, cache: str) -> None:
    if cache == "static" and case.name in ("falcon-alibi", "mpt-alibi"):
        pytest.skip("these models' own ALiBi code does not take a static cache")
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache != "none"}
    if cache == "static":
        options["cache_implementation"] = "static"
    results = []
    for implementation in (case.peer, "onepass"):
        model = case.build(implementation)
        out = model.generate(tokens(), attention_mask=padding("left"), **copy.deepcopy(options))
        results.append(out)
    assert torch.equal(results[0], results[1])


def test_chunked_prefill_over_a_static_cache() -> None:
    case = named("mistral-window")
    logits = []
    for implementation in ("eager", "onepass"):
        model = case.build(implementation)
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.no_grad():
            chunks = [model(input_ids=chunk, past_key_values=cache).logits for chunk in tokens().split(8, dim=1)]
        logits.append(torch.cat(chunks, dim=1))
    assert relative_error(logits[1], logits[0]) < 2e-5


def test_dropout_is_applied_in_training_only() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, attention_dropout=0.5
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="onepass")
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        model.train()
        torch.manual_seed(1)
        first = model(tokens()).logits
        second = model(tokens()).logits
        torch.manual_seed(1)
        again = model(tokens()).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt-oss-sinks"])
def test_packed_rows_equal_separate_sequences(name: str) -> None:
    model = named(name).build("onepass")
    lengths = [11, 1, 7]
    ids = tokens(1)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        by_position = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        by_argument = model(
            input_ids=ids,
            position_ids=position_ids,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            use_cache=False,
        ).logits
        apart = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    if name != "gpt-oss-sinks":  # whose model code does not hand position_ids to the mask
        assert relative_error(by_position, apart) < 2e-5
    assert relative_error(by_argument, apart) < 2e-5


def test_cu_seq_lens_without_position_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    out, _ = onepass_attention(
        Causal(), q, k, v, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=7, max_length_k=7
    )
    parts = [
        onepass_attention(Causal(), *(x[:, :, span] for x in (q, k, v)), None)[0]
        for span in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=1))


def test_user_masks_of_four_dimensions() -> None:
    model = named("llama").build("onepass")
    eager = named("llama").build("eager")
    visible = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    visible[1, :, 10:, 2:5] = False
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = eager(tokens(), attention_mask=added).logits
        assert relative_error(model(tokens(), attention_mask=visible).logits, want) < 2e-5
        assert relative_error(model(tokens(), attention_mask=added).logits, want) < 2e-5


def test_models_with_their_own_attention_code_are_refused() -> None:
    config = transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=64, num_layers=1, attention_heads=4, ffn_dim=64, max_position_embeddings=64
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="onepass")
    with pytest.raises(NotImplementedError, match="never calls the attention function"):
        model(tokens())


@pytest.mark.parametrize("name", ["llama", "mistral-window", "bert"])
def test_compiles_into_one_graph(name: str) -> None:
    case = named(name)
    model, mask = case.build("onepass"), padding("left")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, want_gradients = run(model, tokens(), mask)
    got, got_gradients = run(compiled, tokens(), mask)
    assert relative_error(got, want) < 2e-5
    for gradient, expected in zip(got_gradients.values(), want_gradients.values(), strict=True):
        assert relative_error(gradient, expected) < 1e-3
