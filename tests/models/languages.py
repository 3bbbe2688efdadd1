"""Small language models, ours and transformers', that several tests make."""

import torch

from groundup.models.base import build_model

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": []}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama biased and tied": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama3 scaling": ("LlamaConfig", {"rope_parameters": ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "linear scaling": ("LlamaConfig", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "yarn scaling": ("Qwen3Config", {"head_dim": 16, "rope_parameters": ROPE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3MoeConfig", MOE),
    "qwen3 moe normalised": ("Qwen3MoeConfig", MOE | {"norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gpt2": ("GPT2Config", None),
}  # fmt: skip


def theirs_made(name, folder):
    """A random model of transformers, saved; in float32, with attention written out."""
    import transformers

    kind, extra = CONFIGS[name]
    settings = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, kind)(**(settings if extra is None else SMALL | extra))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


def small(name, **arguments):
    torch.manual_seed(0)
    net = build_model(name, arguments, (64,), 50)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


FORMS = {
    "decoder": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2},
    "windows": {"layers": 2, "width": 32, "heads": 4, "window": 5},
    "experts": {"layers": 2, "width": 32, "heads": 4, "experts": 3},
    "gpt2": {"layers": 2, "width": 32},
    "lstm": {"width": 32, "layers": 2},
}
