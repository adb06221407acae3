"""onepass' mask function for transformers: described masks equal stored ones, and what carries a description."""

from __future__ import annotations

import pytest
import torch
from hf_models import Causal, padding
from onepass.huggingface import VisibleKeys, onepass_attention, onepass_mask
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

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
    inner = causal_mask_function
    # Newer versions count positions from each sequence's start.
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        inner = masking_utils.remap_positions_for_packed_sequence(inner, position_ids)
    function = and_masks(packed_sequence_mask_function(ids), inner)
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


def test_mask_of_another_length_is_refused() -> None:
    q = torch.randn(3, 2, 5, 8)
    with pytest.raises(ValueError, match=r"attention_mask: got a mask for 7 queries and 7 keys; need 5 and 5"):
        onepass_attention(Causal(), q, q, q, onepass_mask(3, 7, 7))
