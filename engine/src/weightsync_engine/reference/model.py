"""A Llama in plain torch: float32, greedy, grouped-query attention, rotary positions, a key-value cache."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """What config.json says of the model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool

    @classmethod
    def read(cls, directory: Path) -> "Shape":
        """From a Hugging Face checkpoint's config.json."""
        config = json.loads((directory / "config.json").read_text())
        rope = config.get("rope_parameters") or {}
        return cls(
            config["vocab_size"],
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config.get("num_key_value_heads") or config["num_attention_heads"],
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            config.get("rms_norm_eps", 1e-6),
            config.get("rope_theta") or rope.get("rope_theta", 10000.0),
            config.get("tie_word_embeddings", False),
        )

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint names and shapes, in the order of a state dict."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for layer in range(self.num_hidden_layers):
            p = f"model.layers.{layer}."
            out |= {
                p + "self_attn.q_proj.weight": (q, h),
                p + "self_attn.k_proj.weight": (kv, h),
                p + "self_attn.v_proj.weight": (kv, h),
                p + "self_attn.o_proj.weight": (h, q),
                p + "mlp.gate_proj.weight": (i, h),
                p + "mlp.up_proj.weight": (i, h),
                p + "mlp.down_proj.weight": (h, i),
                p + "input_layernorm.weight": (h,),
                p + "post_attention_layernorm.weight": (h,),
            }
        out["model.norm.weight"] = (h,)
        if not self.tied:
            out["lm_head.weight"] = (self.vocab_size, h)
        return out


Cache = list[tuple[Tensor, Tensor]]


class Llama:
    """The model and its weights, by checkpoint name."""

    def __init__(self, directory: Path) -> None:
        self.shape = Shape.read(directory)
        self.weights: dict[str, Tensor] = {
            name: tensor.to(torch.float32)
            for name, tensor in load_file(directory / "model.safetensors").items()
        }

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        d = self.shape.head_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
        angles = positions.to(torch.float32)[:, None] * inverse[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.shape.rms_norm_eps) * self.weights[name]

    @torch.inference_mode()
    def logits(self, ids: list[int], cache: Cache) -> Tensor:
        """Logits [vocab_size] after the last of ``ids``, which follow what is cached; extends it."""
        shape, w = self.shape, self.weights
        past = cache[0][0].shape[1] if cache else 0
        cos, sin = self._rope(torch.arange(past, past + len(ids)))
        x = w["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(shape.num_hidden_layers):
            p = f"model.layers.{layer}."
            y = self._norm(x, p + "input_layernorm.weight")
            q, k, v = (
                functional.linear(y, w[f"{p}self_attn.{n}_proj.weight"])
                .view(len(ids), -1, shape.head_dim)
                .transpose(0, 1)
                for n in "qkv"
            )
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if layer < len(cache):
                k = torch.cat((cache[layer][0], k), dim=1)
                v = torch.cat((cache[layer][1], v), dim=1)
                cache[layer] = (k, v)
            else:
                cache.append((k, v))
            x = x + self._attend(p, q, k, v)
            y = self._norm(x, p + "post_attention_layernorm.weight")
            gate = functional.silu(functional.linear(y, w[p + "mlp.gate_proj.weight"]))
            up = functional.linear(y, w[p + "mlp.up_proj.weight"])
            x = x + functional.linear(gate * up, w[p + "mlp.down_proj.weight"])
        head = w["model.embed_tokens.weight"] if shape.tied else w["lm_head.weight"]
        return functional.linear(self._norm(x[-1], "model.norm.weight"), head)

    def _attend(self, prefix: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        new, total = q.shape[1], k.shape[1]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return functional.linear(
            out.transpose(0, 1).reshape(new, -1), self.weights[prefix + "self_attn.o_proj.weight"]
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
