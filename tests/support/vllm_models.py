"""Tiny models of several of vLLM's families: their configurations, and names and shapes of their checkpoints."""

import json
from pathlib import Path
from typing import Any

HIDDEN, HEADS, KV, DIM, VOCABULARY, LAYERS, WIDE, EXPERTS = 64, 4, 2, 32, 320, 2, 96, 4
BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "intermediate_size": WIDE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    # Qwen2's and Phi-3's heads divide their hidden size.
    "biased": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "max_window_layers": 99,
        "hidden_size": HEADS * DIM,
    },
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDE,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "max_window_layers": 99,
    },
    "fused": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": HEADS * DIM},
    "sliding": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": DIM,
        "rope_local_base_freq": 10000.0,
    },
}


def write_config(kind: str, directory: Path) -> Path:
    """A model's directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**BASE, **CONFIGS[kind]}))
    return directory


def is_tied(kind: str) -> bool:
    return bool({**BASE, **CONFIGS[kind]}["tie_word_embeddings"])


def tensors(kind: str) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint of this kind, in a checkpoint's order."""
    hidden = CONFIGS[kind].get("hidden_size", HIDDEN)
    found = {"model.embed_tokens.weight": [VOCABULARY, hidden]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}": shape for name, shape in _attention(kind, hidden).items()}
        found |= {f"{prefix}mlp.{name}": shape for name, shape in _mlp(kind, hidden).items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind == "sliding":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        found |= {f"{prefix}{norm}.weight": [hidden] for norm in norms}
    found["model.norm.weight"] = [hidden]
    if not is_tied(kind):
        found["lm_head.weight"] = [VOCABULARY, hidden]
    return found


def _attention(kind: str, hidden: int) -> dict[str, list[int]]:
    query, key = HEADS * DIM, KV * DIM
    if kind == "fused":
        return {"qkv_proj.weight": [query + 2 * key, hidden], "o_proj.weight": [hidden, query]}
    found = {}
    for name, rows in (("q", query), ("k", key), ("v", key)):
        found[f"{name}_proj.weight"] = [rows, hidden]
        if kind == "biased":
            found[f"{name}_proj.bias"] = [rows]
    found["o_proj.weight"] = [hidden, query]
    if kind in ("experts", "sliding"):
        found["q_norm.weight"] = found["k_norm.weight"] = [DIM]
    return found


def _mlp(kind: str, hidden: int) -> dict[str, list[int]]:
    if kind == "fused":
        return {"gate_up_proj.weight": [2 * WIDE, hidden], "down_proj.weight": [hidden, WIDE]}
    if kind != "experts":
        return _block("", hidden)
    found = {"gate.weight": [EXPERTS, hidden]}
    for number in range(EXPERTS):
        found |= _block(f"experts.{number}.", hidden)
    return found


def _block(prefix: str, hidden: int) -> dict[str, list[int]]:
    return {
        f"{prefix}gate_proj.weight": [WIDE, hidden],
        f"{prefix}up_proj.weight": [WIDE, hidden],
        f"{prefix}down_proj.weight": [hidden, WIDE],
    }
