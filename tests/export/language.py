"""Small transformers models of random weights, built once per process; importing transformers takes seconds."""

from functools import cache

import torch

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# Llama 3.1's frequencies, biases in the attention and a head tied to the embedding: what GGUF has to know besides the matrices
LLAMA3 = {
    "attention_bias": True, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
VARIANTS = {
    "llama": {}, "llama 3.1": LLAMA3, "qwen2": {}, "qwen3": {"head_dim": 32}, "olmo2": {},
    "wide llama": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
}  # fmt: skip


@cache
def language_model(name: str):
    """Return a model of VARIANTS in evaluation mode; copy it before changing it."""
    import transformers

    kind = next(kind for kind in ("Llama", "Qwen2", "Qwen3", "Olmo2") if kind.lower() in name)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **VARIANTS[name]})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3  # differences show: at the usual scale a small random network hardly uses its weights
            else:
                parameter += torch.randn_like(parameter) / 10  # biases and norms that would be missed
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], shape or (2, 9), generator=torch.Generator().manual_seed(1))
