"""Makes a random Llama checkpoint of a given shape and seed, in Hugging Face's form, without any download."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weightsync_engine.reference.model import Shape

SPECIAL: Final = ("<pad>", "<bos>", "<eos>")
VOCABULARY: Final = 320
"""256 bytes and the special tokens, rounded up to what kernels like."""


@dataclass(frozen=True)
class Size:
    """How large a checkpoint is to be."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    tied: bool = False


TINY: Final = Size(128, 256, 2, 4, 2, 32)
"""About 1.5 MB: starts at once."""
DEMO: Final = Size(512, 1536, 8, 8, 4, 64)
"""About 100 MB: its transfer can be watched, and interrupted."""


def config(size: Size) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 2048,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def make_weights(shape: Shape, seed: int, scale: float = 0.2) -> dict[str, torch.Tensor]:
    """Random float32 weights by checkpoint name; the same for the same seed, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, sizes in shape.parameters().items():
        noise = torch.randn(sizes, generator=generator)
        weights[name] = 1.0 + 0.1 * noise if name.endswith("norm.weight") else scale * noise
    return weights


def write_checkpoint(directory: Path, size: Size, seed: int) -> int:
    """Write config, weights and a byte-level tokenizer. Returns the bytes of the weights file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(size), indent=1))
    _write_tokenizer(directory)
    # Wide layers want smaller weights, or the softmax saturates and every seed answers alike.
    scale = 0.2 * (128 / size.hidden_size) ** 0.5
    weights = make_weights(Shape.read(directory), seed, scale)
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    return path.stat().st_size


def _write_tokenizer(directory: Path) -> None:
    # Byte-level BPE without merges: every text can be encoded, one token a byte.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
