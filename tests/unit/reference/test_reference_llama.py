"""The reference engine's model against Hugging Face's, and its checkpoints against themselves."""

import hashlib

import pytest
import torch
from staged_images import manifest_of
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from weightsync_engine.reference.llama import Cache, Config, Llama
from weightsync_engine.reference.model_files import TINY, Shape, random_weights, write_checkpoint

IDS = torch.tensor([5, 80, 99, 120, 33, 7, 8, 200])
SHAPES = {
    "grouped": TINY,
    "tied": Shape(64, 128, 2, 4, 2, 32, tied=True),
    "every head its own": Shape(64, 96, 1, 2, 2, 32),
    "one key head": Shape(32, 64, 3, 4, 1, 16),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_computes_what_transformers_computes(tmp_path, shape):
    write_checkpoint(tmp_path, shape, seed=5)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        wanted = torch.log_softmax(theirs(IDS[None]).logits[0], dim=-1)
    ours, cache = Llama.read(tmp_path), Cache()
    assert (ours.forward(IDS[:3], cache) - wanted[2]).abs().max() < 1e-4
    for position in range(3, len(IDS)):
        logprobs = ours.forward(IDS[position : position + 1], cache)
        assert (logprobs - wanted[position]).abs().max() < 1e-4
    assert cache.length == len(IDS)


def test_loading_makes_it_another_model(tmp_path):
    write_checkpoint(tmp_path / "a", TINY, seed=1)
    write_checkpoint(tmp_path / "b", TINY, seed=2)
    one, two = Llama.read(tmp_path / "a"), Llama.read(tmp_path / "b")
    assert not torch.equal(one.forward(IDS, Cache()), two.forward(IDS, Cache()))
    one.load(random_weights(TINY, 2).items())
    assert torch.equal(one.forward(IDS, Cache()), two.forward(IDS, Cache()))


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        size = write_checkpoint(tmp_path / name, TINY, seed)
        assert size == sum(tensor.nbytes for tensor in random_weights(TINY, seed).values())

    def files(name):
        return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / name).iterdir()}

    assert files("a") == files("b")
    assert {name for name in files("a") if files("a")[name] != files("c")[name]} == {"model.safetensors"}


def test_every_text_survives_its_tokenizer(tmp_path):
    write_checkpoint(tmp_path, TINY, 1)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("plain", "  two  blanks\n", "żółć 🙂", "a-b_c's"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert max(ids) < TINY.vocabulary


def test_check_names_every_problem():
    weights = random_weights(TINY, 1)
    model = Llama(CONFIG, weights)
    assert model.check(manifest_of(weights)) == ()
    bad = dict(weights)
    bad["other"] = bad.pop("model.norm.weight")
    bad["lm_head.weight"] = bad["lm_head.weight"].to(torch.bfloat16)
    bad["model.embed_tokens.weight"] = bad["model.embed_tokens.weight"][:-1]
    found = {problem.tensor: str(problem) for problem in model.check(manifest_of(bad))}
    assert set(found) == {"other", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    assert "no such tensor" in found["other"]
    assert "mix two versions" in found["model.norm.weight"]
    assert "publish it as float32, or start the engine with --dtype bfloat16" in found["lm_head.weight"]
    assert "[319, 64], the model wants [320, 64]" in found["model.embed_tokens.weight"]


CONFIG = Config(64, 2, 4, 2, 32, 1e-6, 10000.0, False, 2048, 2, 320)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model_type": "qwen3"}, "Llama only"), ({"rope_scaling": {"rope_type": "yarn"}}, "yarn")],
)
def test_what_it_can_not_serve_is_refused(tmp_path, change, words):
    import json

    write_checkpoint(tmp_path, TINY, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        Config.read(tmp_path)
