"""Attention classes for models that do not call transformers' attention interface: Falcon, BLOOM, MPT, and GPT-J before
transformers 5.24.

Each subclass keeps the weights of the original class and hands queries, keys and values to onepass. GPT-J and Falcon
look their class up in a table by implementation name. BLOOM and MPT name theirs in the code of their blocks, so that
name is rebound to a subclass that acts only on models loaded with onepass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gptj import modeling_gptj
from transformers.models.mpt import modeling_mpt

from onepass.functional import alibi_slopes
from onepass.huggingface.attention import onepass_attention
from onepass.huggingface.cache import CachedStates

_names: set[str] = set()


def register_models(name: str) -> None:
    """Makes the models of this module accept ``attn_implementation=name``."""
    _names.add(name)
    if hasattr(modeling_gptj, "GPTJ_ATTENTION_CLASSES"):  # gone in 5.24, which calls the interface
        modeling_gptj.GPTJ_ATTENTION_CLASSES[name] = OnepassGPTJAttention
    modeling_falcon.FALCON_ATTENTION_CLASSES[name] = OnepassFalconAttention
    modeling_bloom.BloomAttention = OnepassBloomAttention
    modeling_mpt.MptAttention = OnepassMptAttention


@functools.lru_cache
def _slopes(num_heads: int, device: torch.device) -> Tensor:
    return alibi_slopes(num_heads, device=device)


class OnepassGPTJAttention(modeling_gptj.GPTJAttention):
    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        dropout = self.attn_dropout.p if self.training else 0.0
        out, _ = onepass_attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=1.0 / self.scale_attn
        )
        return out.transpose(1, 2), None


class OnepassFalconAttention(modeling_falcon.FalconAttention):
    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        if alibi is None:
            assert position_embeddings is not None
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        # As in the original: dropout only together with ALiBi, whose biases the model has put into the mask.
        dropout = self.attention_dropout.p if self.training and alibi is not None else 0.0
        out, _ = onepass_attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.inv_norm_factor
        )
        return self.dense(out.flatten(2)), None


class OnepassBloomAttention(modeling_bloom.BloomAttention):
    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation not in _names:
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, _ = onepass_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=alibi.view(-1, self.num_heads, 1, alibi.shape[-1]),
            # BLOOM counts keys from the first visible one: the same slopes, another constant in each row.
            alibi_slopes=_slopes(self.num_heads, query.device) if isinstance(key, CachedStates) else None,
        )
        out = self.dense(out.flatten(2))
        return modeling_bloom.dropout_add(out, residual, self.hidden_dropout, self.training), None


class OnepassMptAttention(modeling_mpt.MptAttention):
    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.config = config

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation not in _names:
            return super().forward(hidden_states, position_bias, attention_mask=attention_mask, **kwargs)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in transformers 5.24
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (
            x.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for x in mixed.chunk(3, dim=2)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if position_bias is not None:
            position_bias = position_bias[None, :, :, max(0, position_bias.shape[-1] - key.shape[2]) :]
        out, _ = onepass_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            position_bias=position_bias,
        )
        return self.out_proj(out.flatten(2)), None
