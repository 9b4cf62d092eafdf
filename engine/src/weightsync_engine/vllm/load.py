"""Puts a version's tensors into a model that serves, through the model's own loaders."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

OUTPUT: Final = "lm_head.weight"
"""The output layer's tensor. Where it is tied to the embedding, trainers publish it or don't, as they like."""


def is_tied(model_config: Any) -> bool:
    """Is the model's output layer its embedding?"""
    return bool(getattr(model_config.hf_config, "tie_word_embeddings", False))


def load(
    model: Any, model_config: Any, device: torch.device, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Load layer by layer. Raises what a loader raises; the model is then neither the old nor the new one."""
    if is_tied(model_config):
        # Two tensors into one parameter: the later one would win, whichever that is.
        tensors = ((name, tensor) for name, tensor in tensors if not name.endswith(OUTPUT))
    initialize_layerwise_reload(model)
    model.load_weights(tensors)
    finalize_layerwise_reload(model, model_config)
    _process_tied(model)
    if device.type != "cpu":
        # Copies may still be under way, and the memory that they read from goes when this returns.
        torch.accelerator.synchronize()


def _process_tied(model: torch.nn.Module) -> None:
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
