"""Llama in plain torch: float32, greedy, one sequence at a time."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from weightsync_contract.manifest import Manifest
from weightsync_engine.worker.problems import missing, unknown, wrong_dtype, wrong_shape
from weightsync_engine.worker.protocol import Problem


@dataclass(frozen=True)
class Config:
    """What of config.json matters here."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope_theta: float
    tied: bool
    positions: int
    eos: int
    vocabulary: int

    @classmethod
    def read(cls, directory: Path) -> "Config":
        """Raises OSError, ValueError or KeyError for what is no Llama's configuration."""
        raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
        if raw["model_type"] != "llama":
            raise ValueError(f"the reference engine serves Llama only, not {raw['model_type']!r}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported by the reference engine")
        heads = raw["num_attention_heads"]
        return cls(
            raw["hidden_size"],
            raw["num_hidden_layers"],
            heads,
            raw.get("num_key_value_heads", heads),
            raw.get("head_dim") or raw["hidden_size"] // heads,
            raw["rms_norm_eps"],
            float(rope.get("rope_theta") or raw.get("rope_theta", 10000.0)),
            raw.get("tie_word_embeddings", False),
            raw["max_position_embeddings"],
            raw["eos_token_id"],
            raw["vocab_size"],
        )


@dataclass
class Cache:
    """Keys and values of a sequence so far, a pair of [kv_heads, length, head_dim] each layer."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions in it."""
        return self.layers[0][0].shape[1] if self.layers else 0


class Llama:
    """The weights by their checkpoint names, and what they compute."""

    def __init__(self, config: Config, weights: dict[str, Tensor], device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._weights = {name: tensor.to(self.device, copy=True) for name, tensor in weights.items()}
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(torch.arange(config.positions, dtype=torch.float32), config.rope_theta**-half)
        self._cos, self._sin = angles.cos().to(self.device), angles.sin().to(self.device)

    @classmethod
    def read(cls, directory: Path, device: str = "cpu") -> "Llama":
        """From a checkpoint in one safetensors file, float32."""
        return cls(Config.read(directory), load_file(directory / "model.safetensors"), device)

    def parameters(self) -> Iterable[Tensor]:
        """The weights' tensors."""
        return self._weights.values()

    def check(self, manifest: Manifest) -> tuple[Problem, ...]:
        """Every reason why ``load`` of these tensors would be wrong."""
        problems = []
        for spec in manifest.tensors:
            own = self._weights.get(spec.name)
            if own is None:
                problems.append(unknown(spec.name))
            elif tuple(own.shape) != spec.shape:
                problems.append(wrong_shape(spec.name, spec.shape, own.shape))
            elif (wanted := str(own.dtype).removeprefix("torch.")) != spec.dtype:
                problems.append(wrong_dtype(spec.name, spec.dtype, wanted))
        given = {spec.name for spec in manifest.tensors}
        problems += [missing(name) for name in self._weights if name not in given]
        return tuple(problems)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite weights with those given."""
        for name, tensor in tensors:
            self._weights[name].copy_(tensor)
        if self.device.type != "cpu":
            # What they were copied from may be given back at once.
            torch.accelerator.synchronize()

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Log-probabilities [vocabulary] of what follows ``ids`` ([n], n >= 1), which follow the cache."""
        weights, config = self._weights, self.config
        start, count = cache.length, len(ids)
        cos, sin = self._cos[start : start + count], self._sin[start : start + count]
        # True where a position may look: at itself and all before it.
        seen = torch.ones(count, start + count, dtype=torch.bool, device=self.device).tril(start)
        past, cache.layers = cache.layers, []
        x = weights["model.embed_tokens.weight"][ids.to(self.device)]
        for number in range(config.layers):
            prefix = f"model.layers.{number}"
            normed = self._norm(x, f"{prefix}.input_layernorm.weight")
            x = x + self._attend(
                normed, f"{prefix}.self_attn", cos, sin, seen, past[number] if past else None, cache
            )
            normed = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate = functional.silu(normed @ weights[f"{prefix}.mlp.gate_proj.weight"].T)
            up = normed @ weights[f"{prefix}.mlp.up_proj.weight"].T
            x = x + (gate * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
        last = self._norm(x[-1], "model.norm.weight")
        head = weights["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
        return functional.log_softmax(last @ head.T, dim=-1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.epsilon)
        return x * scale * self._weights[name]

    def _attend(
        self,
        x: Tensor,
        prefix: str,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor,
        past: tuple[Tensor, Tensor] | None,
        cache: Cache,
    ) -> Tensor:
        config = self.config

        def heads(name: str, number: int) -> Tensor:
            projected = x @ self._weights[f"{prefix}.{name}.weight"].T
            return projected.view(len(x), number, config.head_dim).transpose(0, 1)

        query = _rotate(heads("q_proj", config.heads), cos, sin)
        key = _rotate(heads("k_proj", config.kv_heads), cos, sin)
        value = heads("v_proj", config.kv_heads)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=1), torch.cat((past[1], value), dim=1)
        cache.layers.append((key, value))
        share = config.heads // config.kv_heads
        key, value = key.repeat_interleave(share, 0), value.repeat_interleave(share, 0)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return attended.transpose(0, 1).reshape(len(x), -1) @ self._weights[f"{prefix}.o_proj.weight"].T


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
