"""The implementations that are measured side by side."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onepass.bench.cases import Attention, Case


def onepass(case: Case, device: torch.device) -> Attention:
    import onepass as library

    window = None if case.window is None else (case.window - 1, 0)
    return lambda q, k, v: library.attention(q, k, v, causal=case.causal, window=window)


def torch_sdpa(case: Case, device: torch.device) -> Attention:
    """PyTorch's fused attention as its users call it: ``is_causal`` where that says all, else a boolean mask."""
    grouped = case.num_heads != case.num_heads_kv
    if case.window is None and (not case.causal or case.seqlen_q == case.seqlen_k):
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)
    mask = visible(case, device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def eager(case: Case, device: torch.device) -> Attention:
    """The formula, which stores all scores."""
    mask = None if case.window is None and not case.causal else visible(case, device)
    group = case.num_heads // case.num_heads_kv

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * case.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, dim=-1) @ v

    return attention


def visible(case: Case, device: torch.device) -> Tensor:
    """Boolean (seqlen_q, seqlen_k), true where the query sees the key (bottom-right diagonal)."""
    query = torch.arange(case.seqlen_q, device=device)[:, None] + case.seqlen_k - case.seqlen_q
    key = torch.arange(case.seqlen_k, device=device)
    mask = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=device)
    if case.causal:
        mask &= key <= query
    if case.window is not None:
        mask &= key > query - case.window
    return mask


CONTENDERS: dict[str, Callable[[Case, torch.device], Attention]] = {
    "onepass": onepass,
    "torch": torch_sdpa,
    "eager": eager,
}
