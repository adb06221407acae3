"""transformers: generation over an int8 cache in pages, with beams, and continuous batching.

The model is small and has random weights, so that the example needs no download.
"""

import torch
from onepass.huggingface import OnepassCache
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

config = LlamaConfig(
    vocab_size=100,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, attn_implementation="onepass").eval()
prompts = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))
options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 20, "do_sample": False}

plain = model.generate(prompts, **options)
for storage in ({}, {"quantization": "int8", "page_size": 16}):
    cache = OnepassCache(max_seqlen=64, **storage)
    generated = model.generate(prompts, past_key_values=cache, **options)
    same = (generated == plain)[:, 24:].float().mean().item()
    print(f"{storage or 'float32'}: {cache.nbytes} bytes, {100 * same:.0f} % of the tokens as with transformers' cache")

beams = model.generate(prompts, past_key_values=OnepassCache(page_size=16), num_beams=4, **options)  # beams share pages
print("beam search:", tuple(beams.shape))

outputs = model.generate_batch(
    [prompts[0].tolist(), prompts[1, :5].tolist()],
    generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0),
    continuous_batching_config=ContinuousBatchingConfig(num_blocks=32),
)
batched = next(output for output in outputs.values() if len(output.prompt_ids) == 24)
assert batched.generated_tokens == plain[0, 24:].tolist()
print("continuous batching: the same tokens as one request at a time")
