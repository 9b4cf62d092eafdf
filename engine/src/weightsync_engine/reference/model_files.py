"""Makes checkpoints of small random Llamas in Hugging Face's format: the same seed gives the same bytes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS: Final = 1
EOS: Final = 2
_SPECIAL: Final = ("<pad>", "<bos>", "<eos>")
_TEMPLATE: Final = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. Every byte is a token, so 320 holds them with the special ones and padding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 320
    tied: bool = False
    positions: int = 2048


TINY: Final = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=32)
"""Some 550 KB in float32, for tests."""

DEMO: Final = Shape(hidden=512, intermediate=1408, layers=9, heads=8, kv_heads=2, head_dim=64)
"""Some 100 MB in float32: a transfer of it takes long enough to be watched, and to be interrupted."""


def random_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, float32, in the order of Hugging Face's ``state_dict``."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Wide enough that another seed answers otherwise, and that the best token has a clear lead.
        scale = 2.0 / math.sqrt(columns)
        return torch.randn(rows, columns, generator=generator) * scale

    def norm() -> torch.Tensor:
        return 1.0 + 0.1 * torch.randn(shape.hidden, generator=generator)

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {"model.embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden, generator=generator)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(query, shape.hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(key, shape.hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(key, shape.hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(shape.hidden, query),
            f"{prefix}.mlp.gate_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(shape.intermediate, shape.hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(shape.hidden, shape.intermediate),
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.post_attention_layernorm.weight": norm(),
        }
    weights["model.norm.weight"] = norm()
    if not shape.tied:
        weights["lm_head.weight"] = matrix(shape.vocabulary, shape.hidden)
    return weights


def write_checkpoint(
    path: Path, shape: Shape, seed: int, weights: dict[str, torch.Tensor] | None = None
) -> int:
    """Write config, tokenizer and weights (random unless given) into ``path``; returns the weights' bytes."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = random_weights(shape, seed) if weights is None else weights
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _write(path / "config.json", _config(shape))
    _write(path / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})
    _tokenizer().save(str(path / "tokenizer.json"))
    _write(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "model_max_length": shape.positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": _TEMPLATE,
        },
    )
    return sum(tensor.nbytes for tensor in tensors.values())


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": shape.positions,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")
