"""Hugging Face transformers (5.x): importing this module registers ``attn_implementation="onepass"``.

    import onepass.huggingface
    model = AutoModel.from_pretrained(name, attn_implementation="onepass")

``OnepassCache`` keeps a model's keys and values in pages or quantized; ``model.generate_batch`` works.

Grouped key/value heads, sliding windows, softcap, attention sinks, position biases, ALiBi, dropout and packed rows pass
through; left and right padding become bounds on the keys, so no (batch, 1, seqlen, seqlen) mask is stored.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from onepass.huggingface.attention import onepass_attention
from onepass.huggingface.cache import OnepassCache
from onepass.huggingface.masks import Visibility, VisibleKeys, onepass_mask
from onepass.huggingface.models import register_models
from onepass.huggingface.paged import paged_attention, register_paged

__all__ = [
    "OnepassCache",
    "Visibility",
    "VisibleKeys",
    "onepass_attention",
    "onepass_mask",
    "paged_attention",
    "register",
]


def register(name: str = "onepass") -> None:
    """Registers onepass under ``name`` (importing this module does it for ``"onepass"``): the attention and the mask
    function, attention classes for models that bring their own code (GPT-J, Falcon, BLOOM, MPT), and attention over the
    paged cache of ``generate_batch``, also as ``"paged|" + name``."""
    AttentionInterface.register(name, onepass_attention)
    AttentionMaskInterface.register(name, onepass_mask)
    register_models(name)
    register_paged(name)


register()
