"""Attention over keys that are in two places, merged exactly: the building block of context parallelism."""

import onepass
import torch

torch.manual_seed(0)
q = torch.randn(1, 8, 16, 64)
k, v = torch.randn(2, 1, 8, 1000, 64)

near = onepass.attention(q, k[:, :, :300], v[:, :, :300], return_lse=True)
far = onepass.attention(q, k[:, :, 300:], v[:, :, 300:], return_lse=True)
out, lse = onepass.merge_states(near.out, near.lse, far.out, far.lse)

whole = onepass.attention(q, k, v, return_lse=True)
print(f"out differs by at most {(out - whole.out).abs().max().item():.1e}")
print(f"lse differs by at most {(lse - whole.lse).abs().max().item():.1e}")
assert torch.allclose(out, whole.out, atol=1e-5)
