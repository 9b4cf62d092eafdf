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

sys.path.insert(0, str(Path(__file__).resolve().parent))
from vllm_models import HIDDEN, VOCABULARY, tensors, write_config


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
    from weightsync_engine.vllm.trace import fingerprint

    model = worker.get_model()
    tied = bool(getattr(worker.model_runner.model_config.hf_config, "tie_word_embeddings", False))
    before = fingerprint(model)
    out = {}
    for name, rows in asked.items():
        manifest = Manifest(tuple(TensorSpec(n, d, tuple(s)) for n, d, s in rows))
        out[name] = [str(problem) for problem in check(model, Path(directory), tied, manifest).problems]
    out["untouched"] = fingerprint(model) == before
    return out


def main(kind: str, directory: Path) -> None:
    from vllm import LLM

    # Where the engine looks for a checkpoint's names there is none, so that the loaders are all there is to ask.
    llm = LLM(
        model=str(write_config(kind, directory)),
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_memory_bytes=16 << 20,
        skip_tokenizer_init=True,
    )
    (found,) = llm.collective_rpc(ask, args=(questions(kind), str(directory)))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
