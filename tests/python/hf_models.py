"""Small transformers models with random weights, one for each kind of attention, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

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


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


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


class Causal(torch.nn.Module):
    is_causal = True
