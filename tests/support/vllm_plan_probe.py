"""Brings versions into tiny models in vLLM by plan and by vLLM's own loading. One JSON line a kind of model.

``python vllm_plan_probe.py RANKS LAYOUT DIRECTORY KIND...``; LAYOUT is ``plain`` (linear layers lie as checkpoints
have them, as on GPUs) or ``packed`` (as vLLM packs them for CPUs).
"""

import hashlib
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
    "PYTHONPATH": str(Path(__file__).resolve().parent),
}
SUPPORT = str(Path(__file__).resolve().parent)
VERSIONS = (1, 2)
EMBEDDING = "model.embed_tokens.weight"


def prepare(worker, rows, directory, tied):
    """On the worker: trace a manifest."""
    from weightsync_contract.manifest import Manifest, TensorSpec
    from weightsync_engine.vllm.load import Loader
    from weightsync_engine.vllm.preflight import check

    model, config = worker.get_model(), worker.model_runner.model_config
    manifest = Manifest(tuple(TensorSpec(n, d, tuple(s)) for n, d, s in rows))
    worker.weightsync = Loader(model, config, worker.device)
    checked = check(model, directory, tied, manifest)
    assert not checked.problems, checked.problems
    worker.weightsync.record(manifest.layout, checked.found)


def apply(worker, path):
    """On the worker: bring a checkpoint's tensors in; says how they came, and what vLLM is to load next time."""
    from dataclasses import asdict

    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    loader = worker.weightsync
    # One memory, as an image that was received is.
    parts = load_file(path)
    flat = torch.cat([part.reshape(-1) for part in parts.values()])
    given, at = {}, 0
    for name, part in parts.items():
        given[name] = flat[at : at + part.numel()].view(part.shape)
        at += part.numel()
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        loaded = loader.load(given.items())
    plan = loader.plan
    return {
        **asdict(loaded),
        "slow": dict(plan.slow) if plan else None,
        "planned": list(plan.planned) if plan else [],
        "holds": plan is not None and plan.holds(worker.get_model()),
    }


def digests(worker):
    """On the worker: what every parameter is."""
    import torch

    return {
        name: hashlib.sha256(p.data.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, p in worker.get_model().named_parameters()
        if p.numel()
    }


def answer(llm):
    """Greedy tokens of a prompt longer than the window, and their log probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False, logprobs=0)
    prompt = {"prompt_token_ids": [5, 6, 7, 80, *range(100, 120)]}
    (output,) = llm.generate(prompt, parameters, use_tqdm=False)
    steps = output.outputs[0].logprobs
    return [
        (token, step[token].logprob) for token, step in zip(output.outputs[0].token_ids, steps, strict=True)
    ]


def probe(kind, ranks, layout, home):
    import torch
    from safetensors.torch import save_file
    from vllm import LLM
    from vllm_models import is_tied, tensors, write_config

    empty = write_config(kind, home / kind / "empty")
    for version in VERSIONS:
        generator = torch.Generator().manual_seed(version)
        values = {n: torch.randn(s, generator=generator) * 0.1 for n, s in tensors(kind).items()}
        save_file(values, write_config(kind, home / kind / str(version)) / "model.safetensors")
        # What is published has an output layer, also where the model takes its embedding for it.
        published = {"lm_head.weight": torch.full(values[EMBEDDING].shape, 0.5), **values}
        save_file(published, home / kind / f"{version}.safetensors")

    def engine(model, load_format):
        return LLM(
            model=str(model),
            load_format=load_format,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            kv_cache_memory_bytes=8 << 20,
            skip_tokenizer_init=True,
            tensor_parallel_size=ranks,
            distributed_executor_backend="mp" if ranks > 1 else None,
            worker_extension_cls="vllm_plain_linears.PlainLinears" if layout == "plain" else "",
        )

    llm = engine(empty, "dummy")
    shapes = {"lm_head.weight": tensors(kind)[EMBEDDING], **tensors(kind)}
    rows = [(name, "float32", shape) for name, shape in shapes.items()]
    llm.collective_rpc(prepare, args=(rows, empty, is_tied(kind)))
    out = {"kind": kind, "applied": [], "answers": [], "parameters": []}
    for version in (1, 2, 1, 2):
        out["applied"].append(llm.collective_rpc(apply, args=(str(home / kind / f"{version}.safetensors"),)))
        llm.reset_prefix_cache()
        out["answers"].append(answer(llm))
        out["parameters"].append(llm.collective_rpc(digests))
    llm.llm_engine.engine_core.shutdown()
    del llm
    llm = engine(home / kind / "2", "auto")
    out["fresh"] = {"answer": answer(llm), "parameters": llm.collective_rpc(digests)}
    llm.llm_engine.engine_core.shutdown()
    print("\n" + json.dumps(out), flush=True)


def main() -> None:
    ranks, layout, home, *kinds = sys.argv[1:]
    sys.path.insert(0, SUPPORT)
    for kind in kinds:
        probe(kind, int(ranks), layout, Path(home))
    os._exit(0)


if __name__ == "__main__":
    main()
