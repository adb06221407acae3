"""Sequences of different lengths packed one after the other: no padding is stored or computed."""

import itertools

import onepass
import torch

lengths = [5, 130, 64, 1]
num_heads, head_dim = 4, 64
torch.manual_seed(0)
total = sum(lengths)
q, k, v = (torch.randn(total, num_heads, head_dim) for _ in range(3))
ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

packed = onepass.varlen_attention(q, k, v, ends, ends, causal=True)

# The same, one sequence at a time.
for begin, end in itertools.pairwise(ends.tolist()):
    alone = onepass.attention(*(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)), causal=True)
    difference = (packed[begin:end].transpose(0, 1) - alone[0]).abs().max().item()
    print(f"tokens {begin:3d} to {end:3d}: largest difference {difference:.1e}")
    assert difference < 1e-5
