"""Loads a small model into vLLM in this process and asks the preflight about manifests. One JSON line a question.

``python vllm_loader_probe.py KIND DIRECTORY``; the directory is made. Its weights are vLLM's dummies: what is
asked is what the loaders would do.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

HIDDEN, HEADS, KV, DIM, VOCABULARY, LAYERS, WIDE, EXPERTS = 64, 4, 2, 32, 320, 2, 96, 4
BASE = {
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
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}
CONFIGS = {
    "tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "biased": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 99},
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
}
# Qwen2's heads divide its hidden size.
CONFIGS["biased"] |= {"head_dim": 32, "hidden_size": 128}


def tensors(kind: str) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint of this kind."""
    hidden = CONFIGS[kind].get("hidden_size", HIDDEN)
    query, key = HEADS * DIM, KV * DIM
    found = {"model.embed_tokens.weight": [VOCABULARY, hidden]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", query), ("k", key), ("v", key)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = [rows, hidden]
            if kind == "biased":
                found[f"{prefix}self_attn.{name}_proj.bias"] = [rows]
        found[f"{prefix}self_attn.o_proj.weight"] = [hidden, query]
        blocks = ["mlp."]
        if kind == "experts":
            found[f"{prefix}self_attn.q_norm.weight"] = found[f"{prefix}self_attn.k_norm.weight"] = [DIM]
            found[f"{prefix}mlp.gate.weight"] = [EXPERTS, hidden]
            blocks = [f"mlp.experts.{number}." for number in range(EXPERTS)]
        for block in blocks:
            found[f"{prefix}{block}gate_proj.weight"] = [WIDE, hidden]
            found[f"{prefix}{block}up_proj.weight"] = [WIDE, hidden]
            found[f"{prefix}{block}down_proj.weight"] = [hidden, WIDE]
        found[f"{prefix}input_layernorm.weight"] = [hidden]
        found[f"{prefix}post_attention_layernorm.weight"] = [hidden]
    found["model.norm.weight"] = [hidden]
    if kind != "tied":
        found["lm_head.weight"] = [VOCABULARY, hidden]
    return found


def questions(kind: str) -> dict[str, list[tuple[str, str, list[int]]]]:
    """Manifests by what they are to show."""
    good = [(name, "float32", shape) for name, shape in tensors(kind).items()]
    last = good[-2][0]
    up = next(name for name, _, _ in good if name.endswith("up_proj.weight"))
    asked = {
        "good": good,
        "again": good,
        "short": [row for row in good if row[0] != up],
        "renamed": [
            (name.replace("up_proj", "other_proj") if name == up else name, d, s) for name, d, s in good
        ],
        "cast": [(name, "bfloat16" if name == last else dtype, shape) for name, dtype, shape in good],
        "larger": [
            (name, dtype, [shape[0], shape[1] * 2] if name == up else shape) for name, dtype, shape in good
        ],
        "shuffled": good[::-1],
    }
    if kind == "tied":
        asked["with the output layer"] = [*good, ("lm_head.weight", "float32", [VOCABULARY, HIDDEN])]
    if kind == "biased":
        bias = next(name for name, _, _ in good if name.endswith("bias"))
        asked["no bias"] = [row for row in good if row[0] != bias]
    return asked


def ask(worker, asked, directory):
    """On the worker: check each manifest, and see whether the live model is what it was."""
    from weightsync_contract.manifest import Manifest, TensorSpec
    from weightsync_engine.vllm.preflight import check
    from weightsync_engine.vllm.trace import _fingerprint

    model = worker.get_model()
    tied = bool(getattr(worker.model_runner.model_config.hf_config, "tie_word_embeddings", False))
    before = _fingerprint(model)
    out = {}
    for name, rows in asked.items():
        manifest = Manifest(tuple(TensorSpec(n, d, tuple(s)) for n, d, s in rows))
        out[name] = [str(problem) for problem in check(model, Path(directory), tied, manifest)]
    out["untouched"] = _fingerprint(model) == before
    return out


def apply(worker, path, extra):
    """On the worker: load a checkpoint's tensors, and those of ``extra`` of their own values."""
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    from weightsync_engine.vllm.load import load

    tensors = load_file(path)
    tensors |= {name: torch.full(shape, 0.5) for name, shape in extra.items()}
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        load(worker.get_model(), worker.model_runner.model_config, torch.device("cpu"), tensors.items())


def main(kind: str, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**BASE, **CONFIGS[kind]}))
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in tensors(kind).items()}
    # Where the engine looks for a checkpoint's names there is none, so that the loaders are all there is to ask.
    weights = directory / "weights"
    weights.mkdir()
    (weights / "config.json").write_text((directory / "config.json").read_text())
    save_file(values, weights / "model.safetensors")

    def engine(model: Path, load_format: str) -> LLM:
        return LLM(
            model=str(model),
            load_format=load_format,
            dtype="float32",
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=2,
            kv_cache_memory_bytes=16 << 20,
            skip_tokenizer_init=True,
        )

    def answer(llm: LLM) -> list[int]:
        parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        (output,) = llm.generate({"prompt_token_ids": [5, 6, 7, 80]}, parameters, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    llm = engine(directory, "dummy")
    (found,) = llm.collective_rpc(ask, args=(questions(kind), str(directory)))
    found["applied"] = []
    # Twice: the first time it is vLLM's own form of the weights that is replaced, the second time ours.
    for extra in ({}, {"lm_head.weight": [VOCABULARY, HIDDEN]} if kind == "tied" else {}):
        llm.collective_rpc(apply, args=(str(weights / "model.safetensors"), extra))
        llm.reset_prefix_cache()
        found["applied"].append(answer(llm))
    del llm
    print(json.dumps({**found, "fresh": answer(engine(weights, "auto"))}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
