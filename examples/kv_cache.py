"""Decoding over a paged int8 cache: two sequences share a prompt, then a batch mixes decoding with a prompt."""

import onepass
import torch

num_heads, num_heads_kv, head_dim = 8, 2, 128
torch.manual_seed(0)


def tokens(count: int, heads: int) -> torch.Tensor:
    return torch.randn(count, heads, head_dim)


cache = onepass.KVCache(3, 4096, num_heads_kv, head_dim, quantization="int8", page_size=16)
prompt_k, prompt_v = tokens(100, num_heads_kv), tokens(100, num_heads_kv)

# Packed tokens: sequence 0 gets the prompt, 1 and 2 nothing.
cache.append(prompt_k, prompt_v, cu_seqlens=torch.tensor([0, 100, 100, 100], dtype=torch.int32))
cache.fork(0, 1)  # shares the pages until one of the two writes to them
print(cache, "- lengths", cache.seqlens.tolist(), "- free pages", cache.free_pages)

# One call: sequences 0 and 1 decode one token each, sequence 2 begins with a prompt of 50.
lengths = torch.tensor([0, 1, 2, 52], dtype=torch.int32)
q, k, v = tokens(52, num_heads), tokens(52, num_heads_kv), tokens(52, num_heads_kv)
out = onepass.cached_attention(q, cache, cu_seqlens_q=lengths, k_new=k, v_new=v)
print("out", tuple(out.shape), "- lengths", cache.seqlens.tolist())

# The same for sequence 1 without quantization.
keys, values = torch.cat([prompt_k, k[1:2]]), torch.cat([prompt_v, v[1:2]])
exact = onepass.attention(*(x.transpose(0, 1)[None] for x in (q[1:2], keys, values)))
error = (out[1] - exact[0, :, 0]).abs().max().item()
print(f"int8 moves the output of sequence 1 by at most {error:.1e}")
assert error < 2e-2
