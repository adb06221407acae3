"""transformers models with attn_implementation="onepass" against eager attention, small and randomly initialised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers
from onepass.huggingface import VisibleKeys, onepass_attention, onepass_mask
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

VOCABULARY = 101
SEQLEN = 19


@dataclass(frozen=True)
class Case:
    name: str
    config: Callable[[], PreTrainedConfig]
    generates: bool = True
    peer: str = "eager"

    def build(self, implementation: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(7)
        auto = AutoModelForCausalLM if self.generates else AutoModelForMaskedLM
        model = auto.from_config(self.config(), attn_implementation=implementation, dtype=dtype)
        # Larger weights than the models' initialisation, so that attention is far from uniform.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                    parameter.mul_(6.0)
        return model.eval()


def llama_like(kind: type[PreTrainedConfig], **options: object) -> Callable[[], PreTrainedConfig]:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return lambda: kind(**{**settings, **options})


CASES = [
    Case(
        "bert",
        lambda: transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        generates=False,
    ),
    Case(
        "opt",
        lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    Case(
        "gptj",
        lambda: transformers.GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    Case("llama", llama_like(transformers.LlamaConfig)),
    Case("mistral-window", llama_like(transformers.MistralConfig, sliding_window=5)),
    Case(
        "gemma2-softcap",
        llama_like(transformers.Gemma2Config, sliding_window=6, attn_logit_softcapping=3.0, query_pre_attn_scalar=16),
    ),
    Case(
        "falcon-rotary",
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
    ),
    Case(
        "falcon-alibi",
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            new_decoder_architecture=False,
            multi_query=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
        peer="sdpa",  # the eager code of transformers 5.23 adds the biases twice: to the scores and in the mask
    ),
    Case(
        "bloom-alibi",
        lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            n_layer=2,
            n_head=6,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    Case(
        "mpt-alibi",
        lambda: transformers.MptConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            n_layers=2,
            n_heads=4,
            max_seq_len=64,
            expansion_ratio=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    Case(
        "gpt-oss-sinks",
        llama_like(transformers.GptOssConfig, sliding_window=7, num_local_experts=2, num_experts_per_tok=1),
    ),
]
GENERATING = [case for case in CASES if case.generates]


def padding(side: str, batch: int = 3, seqlen: int = SEQLEN) -> Tensor:
    """(batch, seqlen) of ones with 0, 4 and 8 padded tokens on one side, or in the middle of the row ("holes")."""
    mask = torch.ones(batch, seqlen, dtype=torch.long)
    for row in range(1, batch):
        width = 4 * row
        match side:
            case "left":
                mask[row, :width] = 0
            case "right":
                mask[row, seqlen - width :] = 0
            case "holes":
                mask[row, 5 : 5 + width] = 0
    return mask


def tokens(batch: int = 3, seqlen: int = SEQLEN) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(3))


def run(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits where the mask is 1, and the gradients of a loss over them."""
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask).logits
    visible = logits if mask is None else logits[mask.bool()]
    weights = torch.randn(visible.shape, generator=torch.Generator().manual_seed(5)).to(visible.dtype)
    (visible * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return visible.detach(), gradients


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of ``want``."""
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()


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
    case = next(case for case in CASES if case.name == "mistral-window")
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
    model = next(case for case in CASES if case.name == name).build("onepass")
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


class Causal(torch.nn.Module):
    is_causal = True


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


def test_position_bias_is_learned() -> None:
    """T5 adds a learned bias to its scores; its gradient must flow through onepass."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
    bias = torch.randn(1, 4, 9, 9, generator=generator, requires_grad=True)
    mask = onepass_mask(2, 9, 9, attention_mask=padding("right", 2, 9).bool())
    out, _ = onepass_attention(Causal(), q, k, v, mask, position_bias=bias)
    out.square().sum().backward()
    got, bias.grad = bias.grad, None
    scores = q @ k.transpose(-1, -2) * 8**-0.5 + bias
    scores = scores.masked_fill(~mask.visibility.to_dense(q.device), float("-inf"))
    want = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
    want.square().sum().backward()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, bias.grad, rtol=1e-4, atol=1e-5)


MASKS = {
    "causal": causal_mask_function,
    "full": bidirectional_mask_function,
    "window": sliding_window_causal_mask_function(4),
    "window both sides": sliding_window_bidirectional_mask_function(3),
    "chunked": chunked_causal_mask_function(4, torch.tensor([0, 4, 8])),
}


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "q_offset", "kv_offset"),
    [(19, 19, 0, 0), (1, 19, 18, 0), (5, 19, 14, 0), (6, 19, 3, 0), (5, 9, 14, 10)],
    ids=["prefill", "decode", "chunk", "static chunk", "sliding cache"],
)
@pytest.mark.parametrize("pattern", MASKS)
def test_described_masks_equal_stored_masks(
    pattern: str, seqlen_q: int, seqlen_k: int, q_offset: int, kv_offset: int, side: str
) -> None:
    padded = None if side == "none" else padding(side).bool()
    arguments = {
        "batch_size": 3,
        "q_length": seqlen_q,
        "kv_length": seqlen_k,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": MASKS[pattern],
        "attention_mask": padded,
    }
    want = sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = onepass_mask(**arguments)
    assert isinstance(mask, VisibleKeys)
    assert mask.shape == want.shape
    assert torch.equal(mask.visibility.to_dense(want.device), want)
    assert torch.equal(mask & True, want), "an operation on the mask must see its values"
    if side != "holes" and pattern in ("causal", "window"):
        assert mask.visibility.dense is None, "this mask has a description"
    if side == "holes" and seqlen_q == seqlen_k:
        assert mask.visibility.dense is not None


def test_packed_mask_equals_stored_mask() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2]])
    function = packed_sequence_compatibility_function(causal_mask_function, position_ids, ids)
    mask = onepass_mask(2, 7, 7, mask_function=function)
    want = sdpa_mask(2, 7, 7, mask_function=function, allow_is_causal_skip=False)
    assert mask.visibility.cu_seqlens.tolist() == [0, 3, 7, 12, 13, 14]
    assert mask.visibility.max_seqlen == 5
    assert torch.equal(mask & True, want)


def test_mask_memory_is_linear() -> None:
    length = 1 << 20  # a stored boolean mask would be a terabyte
    padded = torch.ones(1, length, dtype=torch.bool)
    padded[0, :100] = False
    mask = onepass_mask(1, length, length, attention_mask=padded)
    assert mask.visibility.key_begin.tolist() == [100]
    assert mask.visibility.dense is None


def test_user_masks_of_four_dimensions() -> None:
    model = next(case for case in CASES if case.name == "llama").build("onepass")
    eager = next(case for case in CASES if case.name == "llama").build("eager")
    visible = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    visible[1, :, 10:, 2:5] = False
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = eager(tokens(), attention_mask=added).logits
        assert relative_error(model(tokens(), attention_mask=visible).logits, want) < 2e-5
        assert relative_error(model(tokens(), attention_mask=added).logits, want) < 2e-5


def test_models_with_their_own_attention_code_are_refused() -> None:
    config = transformers.CodeGenConfig(
        vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="onepass")
    with pytest.raises(NotImplementedError, match="never calls the attention function"):
        model(tokens())


def test_mask_of_another_length_is_refused() -> None:
    q = torch.randn(3, 2, 5, 8)
    with pytest.raises(ValueError, match=r"attention_mask: got a mask for 7 queries and 7 keys; need 5 and 5"):
        onepass_attention(Causal(), q, q, q, onepass_mask(3, 7, 7))


@pytest.mark.parametrize("name", ["llama", "mistral-window", "bert"])
def test_compiles_into_one_graph(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, mask = case.build("onepass"), padding("left")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, want_gradients = run(model, tokens(), mask)
    got, got_gradients = run(compiled, tokens(), mask)
    assert relative_error(got, want) < 2e-5
    for gradient, expected in zip(got_gradients.values(), want_gradients.values(), strict=True):
        assert relative_error(gradient, expected) < 1e-3
