"""A small byte-level GPT whose attention is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onepass

# Causal attention: q, k, v (batch, num_heads, seqlen, head_dim) → out of the same shape.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def onepass_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return onepass.attention(q, k, v, causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass(frozen=True)
class Size:
    """Layers, channels, heads, and tokens per excerpt and step."""

    layers: int
    width: int
    heads: int
    seqlen: int
    batch: int


class Block(nn.Module):
    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention = attention
        self.norm_attention = nn.RMSNorm(size.width)
        self.norm_mlp = nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], over_cache: Attention | None = None) -> Tensor:
        """``over_cache``: attention that also rotates and sees earlier tokens."""
        heads = self.qkv(self.norm_attention(x)).unflatten(2, (3, self.heads, -1))  # (batch, seqlen, 3, heads, dim)
        q, k, v = heads.transpose(1, 3).unbind(2)
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if over_cache is None:
            mixed = self.attention(rotate(q, rotation), rotate(k, rotation), v)
        else:
            mixed = over_cache(q, k, v)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm_mlp(x))).square())


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of channels turned by an angle that grows with the position."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).to(x.dtype)


class ByteGPT(nn.Module):
    """A decoder-only transformer over bytes: logits (batch, seqlen, 256) from ids (batch, seqlen)."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size, attention) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        nn.init.zeros_(self.head.weight)
        self.cosine, self.sine = (nn.Buffer(table) for table in self.rotation(size.seqlen))

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length, head_dim / 2) of the angles of positions 0 to ``length`` − 1."""
        dim = self.size.width // self.size.heads
        device = self.embedding.weight.device
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor, over_cache: Attention | None = None) -> Tensor:
        """``over_cache``: attention for every block in turn, when ids continue sequences whose keys are stored."""
        rotation = (self.cosine[: ids.shape[1]], self.sine[: ids.shape[1]])
        x = F.rms_norm(self.embedding(ids), (self.size.width,))
        for block in self.blocks:
            x = block(x, rotation, over_cache)
        return self.head(self.norm(x))

    def loss(self, excerpts: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte; excerpts as from :func:`onepass.demo.corpus.batch`."""
        logits = self(excerpts[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), excerpts[:, 1:].flatten())
