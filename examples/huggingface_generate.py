"""A transformers model with onepass attention: a batch of left-padded prompts, generated greedily.

The model is small and has random weights, so that the example needs no download; from_pretrained takes the same
``attn_implementation``.
"""

import onepass.huggingface  # noqa: F401  (registers "onepass")
import torch
from transformers import AutoModelForCausalLM, MistralConfig

config = MistralConfig(
    vocab_size=100,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
prompts = torch.randint(2, 100, (3, 24), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(prompts)
mask[1, :7] = 0  # left padding becomes a bound on the keys, not a mask tensor
mask[2, :20] = 0

generated = {}
for implementation in ("eager", "onepass"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    generated[implementation] = model.generate(prompts, attention_mask=mask, max_new_tokens=20, do_sample=False)

print(generated["onepass"][:, 24:])
assert torch.equal(generated["eager"], generated["onepass"])
print("the same tokens as with eager attention")
