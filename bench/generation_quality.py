"""How much a quantized key/value cache changes what models generate: a Markdown table for docs/kv-cache.md.

Models of four kinds with random weights, larger than usual so that attention is far from uniform; float32. Each cell
gives the largest and the mean difference of the logits over their standard deviation, in one pass over given text whose
keys all come from the cache, and how often the most probable token is the same.
"""

from __future__ import annotations

import torch
from onepass.huggingface import OnepassCache
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, MistralConfig, OPTConfig, PreTrainedModel

VOCABULARY, WIDTH, LAYERS, HEADS = 512, 512, 4, 8
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}
MODELS = {
    "OPT": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH,
    ),
    "GPT-J": GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, rotary_dim=32),
    "Llama": LlamaConfig(**LLAMA_LIKE),
    "Mistral, window 64": MistralConfig(**LLAMA_LIKE, sliding_window=64),
}
STORAGES = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8 token": {"quantization": "int8", "scale_granularity": "token"},
    "int8 head": {"quantization": "int8"},
    "int8 group:16": {"quantization": "int8", "scale_granularity": "group:16"},
    "fp8_e4m3": {"quantization": "fp8_e4m3"},
    "fp8_e5m2": {"quantization": "fp8_e5m2"},
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MODELS[name]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None  # the defaults lie beyond the vocabulary
    model = AutoModelForCausalLM.from_config(config, attn_implementation="onepass", dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in parameter_name and "wte" not in parameter_name:
                parameter.mul_(2.5)
    return model.eval()


@torch.no_grad()
def main() -> None:
    models = {name: build(name) for name in MODELS}
    text = torch.randint(2, VOCABULARY, (4, 384), generator=torch.Generator().manual_seed(1))
    exact = {name: model(text, use_cache=False).logits for name, model in models.items()}
    print("| storage | " + " | ".join(models) + " |\n|---|" + "---|" * len(models))
    for title, storage in STORAGES.items():
        cells = []
        for name, model in models.items():
            logits = model(text, past_key_values=OnepassCache(text.shape[1], **storage)).logits
            difference = (logits - exact[name]).abs() / exact[name].std()
            same = (logits.argmax(-1) == exact[name].argmax(-1)).float().mean().item()
            cells.append(f"{difference.max():.1e} / {difference.mean():.1e}, {100 * same:.1f} %")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
