"""One training step through causal attention with grouped key/value heads and a sliding window."""

import onepass
import torch

batch, num_heads, num_heads_kv, seqlen, head_dim = 2, 8, 2, 512, 64
torch.manual_seed(0)
# Data laid out (batch, seqlen, heads, dim), as linear layers give it, is passed as a transposed view: no copy.
q = torch.randn(batch, seqlen, num_heads, head_dim, requires_grad=True)
k = torch.randn(batch, seqlen, num_heads_kv, head_dim, requires_grad=True)
v = torch.randn(batch, seqlen, num_heads_kv, head_dim, requires_grad=True)

out = onepass.attention(
    q.transpose(1, 2),
    k.transpose(1, 2),
    v.transpose(1, 2),
    causal=True,
    window=(127, 0),  # a query sees 128 tokens, itself included
)
loss = out.square().mean()
loss.backward()

print(f"out {tuple(out.shape)}, loss {loss.item():.4f}")
for name, tensor in {"q": q, "k": k, "v": v}.items():
    print(f"norm of {name}'s gradient: {tensor.grad.norm().item():.4f}")
