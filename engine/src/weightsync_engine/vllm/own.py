"""vLLM's own way of loading, of a whole model or of some of its modules."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

try:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
except ImportError:
    # Up to vLLM 0.27.1 these two are all that is processed last.
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    def is_deferred_attention_layer(layer: torch.nn.Module) -> bool:
        """Does vLLM process it after all others, whatever was loaded?"""
        return isinstance(layer, (Attention, MLAAttention))


def deferred(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that vLLM processes after every load."""
    return [layer for layer in model.modules() if is_deferred_attention_layer(layer)]


def load_all(model: Any, model_config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load every module. Raises what a loader raises; the model is then neither the old nor the new one."""
    _pack_experts_again(model.modules())
    initialize_layerwise_reload(model)
    model.load_weights(iter(tensors))
    finalize_layerwise_reload(model, model_config)
    process_shared(model)


def load_some(
    model: Any,
    model_config: Any,
    layers: Sequence[torch.nn.Module],
    tensors: Sequence[tuple[str, torch.Tensor]],
) -> None:
    """Load ``layers`` only, from ``tensors``: all that go into them. Other modules keep what they have.

    A tensor that goes into others as well is written to them as it is. Attention is processed anew in any case.
    """
    part = _Part([*layers, *deferred(model)])
    _pack_experts_again(layers)
    initialize_layerwise_reload(part)
    if tensors:
        model.load_weights(iter(tensors))
    finalize_layerwise_reload(part, model_config)


class _Part(torch.nn.Module):
    """Stands for a model that has some modules only; vLLM's reload asks for nothing else."""

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self._chosen = tuple({id(layer): layer for layer in layers}.values())

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:
        return iter(self._chosen)


def _pack_experts_again(layers: Iterable[torch.nn.Module]) -> None:
    """Have experts processed as at the first load.

    vLLM's CPU kernels pack (and pad) them, but only when their kernel is set up: a reload would leave them
    unpacked and be answered with nonsense, or fail where they are padded.
    """
    for layer in layers:
        method: Any = getattr(layer, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None


def process_shared(model: torch.nn.Module) -> None:
    """Make anew what an output layer keeps of an embedding that it shares.

    Nothing is loaded into it, so that the reload leaves it alone: on a CPU it would go on computing with what it
    packed of the old weights.
    """
    seen: set[int] = set()
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, VocabParallelEmbedding) or weight is None:
            continue
        if id(weight) in seen:
            layer.quant_method.process_weights_after_loading(layer)
        seen.add(id(weight))


def process_embeddings(model: torch.nn.Module) -> None:
    """Make anew what embeddings and output layers keep of their weights, which is something on CPUs only."""
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and getattr(layer, "weight", None) is not None:
            layer.quant_method.process_weights_after_loading(layer)
