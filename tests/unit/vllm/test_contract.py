"""Our code against what each supported vLLM has: names, signatures, routes. A new version that changes one fails.

The files in contract/ were made by scripts/vllm_contract.py from the versions' wheels; how is said there.
"""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import vllm_contract
from weightsync_engine.guard.routes import _INFERENCE, _OPEN, Access, access

ROOT = Path(__file__).resolve().parents[3]
ENGINE = ROOT / "engine/src/weightsync_engine"
FILES = {path.stem: path for path in (Path(__file__).parent / "contract").glob("*.json")}
TOO_OLD = "0.24.0"
"""Its backends are made with other arguments and have no start and finish: not supported, kept to see it refused."""

SUPPORTED = sorted(
    (version for version in FILES if version != TOO_OLD), key=lambda v: tuple(map(int, v.split(".")))
)
OPTIONAL = {
    "vllm.model_executor.layers.attention:is_deferred_attention_layer": "own.py has its own for versions before 0.28",
}
"""Names that our code does without where they are absent."""

CALLS = {
    "GET /get_world_size": set(),
    "GET /health": set(),
    "GET /is_paused": set(),
    "POST /finish_weight_update": set(),
    "POST /init_weight_transfer_engine": {"init_info"},
    "POST /pause": {"mode", "clear_cache"},
    "POST /resume": set(),
    "POST /start_weight_update": set(),
    "POST /update_weights": {"update_info"},
}
"""What the adapter asks of vLLM, and what it sends."""

LABEL = "POST /update_weight_version"
"""Asked as well, and done without where it is absent."""

AGENTS = """
GET /docs, GET /fault_tolerance/status, GET /get_world_size, GET /is_paused, GET /is_sleeping,
GET /kv_event_sources, GET /load, GET /ready, GET /readyz, GET /server_info, GET /tokenizer_info, GET /weight_info,
POST /abort_requests, POST /collective_rpc, POST /fault_tolerance/apply, POST /finish_weight_update, POST /generate,
POST /inference/v1/abort_requests, POST /init_weight_transfer_engine, POST /is_scaling_elastic_ep, POST /pause,
POST /release_kv_cache_memory, POST /reset_encoder_cache, POST /reset_mm_cache, POST /reset_prefix_cache,
POST /resume, POST /scale_elastic_ep, POST /shutdown_weight_transfer_engine, POST /sleep,
POST /start_draft_weight_update, POST /start_profile, POST /start_weight_update, POST /stop_profile,
POST /update_weight_version, POST /update_weights, POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter,
POST /wake_up, POST /weight_checker, WEBSOCKET /v1/realtime
"""
"""Routes of which somebody has decided that they are for the agent: all but those that are open or inference."""


def problems(version: str) -> list[str]:
    """What our code could not rely on in a version, by name."""
    found = json.loads(FILES[version].read_text())
    return [*_symbols(found), *_backend(found), *_calls(found)]


def _symbols(found):
    symbols = found["symbols"]
    for key in sorted({f"{module}:{name}" for module, name in vllm_contract.imported()} - set(symbols)):
        yield f"{key} is new in our code: run scripts/vllm_contract.py for every version"
    for key, described in symbols.items():
        if described is None and key not in OPTIONAL:
            yield f"{key} is not there"
    for name, ours in {
        "vllm.model_executor.model_loader.reload:initialize_layerwise_reload": ["model"],
        "vllm.model_executor.model_loader.reload:finalize_layerwise_reload": ["model", "model_config"],
        "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info": ["layer"],
        "vllm.model_executor.model_loader.reload.layerwise:_get_original_loader": ["tensor"],
        "vllm.model_executor.model_loader.reload.meta:restore_layer_on_meta": ["layer", "info"],
        "vllm.model_executor.model_loader.reload.meta:to_meta_tensor": ["tensor"],
        "vllm.config:set_current_vllm_config": ["vllm_config"],
        "vllm.distributed.parallel_state:get_world_group": [],
    }.items():
        described = symbols.get(name)
        if described is not None and not takes(described["parameters"], len(ours)):
            yield f"{name} takes {described['parameters']}, not {ours}"
    if not set(found["reload_asks_of_model"]) <= {
        "modules",
        "_do_torchao_reload",
        "_original_do_torchao_reload",
    }:
        yield f"the reload asks a model for {found['reload_asks_of_model']}: a part of one has its modules only"
    if found["plain_methods"] != list(vllm_contract.PLAIN_METHODS):
        yield f"of the plain methods there are {found['plain_methods']}"
    if found["group"] != ["cpu_group", "world_size"]:
        yield f"a group has {found['group']}"


def _backend(found):
    base = found["symbols"]["vllm.distributed.weight_transfer.base:WeightTransferEngine"]
    ours = backend()
    for name in base["abstract"]:
        if name not in ours:
            yield f"WeightTransferEngine.{name} is abstract, and ours has none"
    for name in set(ours) & set(base["methods"]) - {"trainer_send_weights"}:
        if base["methods"][name] != ours[name]:
            yield f"WeightTransferEngine.{name} takes {base['methods'][name]}, ours {ours[name]}"
    made = found["engine_is_made_with"]
    if made != ours["__init__"][1:]:
        yield f"engines are made with {made}, ours with {ours['__init__'][1:]}"
    known = set(base["methods"]) | set(base["attributes"]) | set(ours)
    for name in found["worker_asks_of_engine"]:
        if name not in known:
            yield f"the worker asks an engine for {name}, which ours has not"
    for name in ("Init", "Update"):
        if not found["symbols"][f"vllm.distributed.weight_transfer.base:WeightTransfer{name}Info"][
            "dataclass"
        ]:
            yield f"WeightTransfer{name}Info is no dataclass"
    factory = found["symbols"]["vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory"]
    if not takes(factory["methods"]["register_engine"], 4) or "_registry" not in factory["attributes"]:
        yield "WeightTransferEngineFactory registers in another way"


def _calls(found):
    for route, sent in CALLS.items():
        taken = found["routes"].get(route)
        if taken is None:
            yield f"there is no {route}"
            continue
        names = {name.rstrip("=") for name in taken}
        required = {name for name in taken if not name.endswith("=")}
        if not sent <= names or not required <= sent:
            yield f"{route} takes {taken}, we send {sorted(sent)}"
    if LABEL in found["routes"] and found["routes"][LABEL] != ["new_version"]:
        yield f"{LABEL} takes {found['routes'][LABEL]}"


def takes(parameters: list[str], count: int) -> bool:
    """Can a function be called with ``count`` arguments in order?"""
    plain = [name for name in parameters if name[0] not in "+*"]
    open_ended = any(name.startswith("*") and not name.startswith("**") for name in parameters)
    required = [name for name in parameters if not name.endswith("=") and name[0] != "*"]
    return len(required) <= count and (open_ended or count <= len(plain))


def backend() -> dict[str, list[str]]:
    """The methods of our backend, from its source: vLLM need not be installed."""
    tree = ast.parse((ENGINE / "vllm/backend.py").read_text())
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "WeightSyncBackend"]
    return {n.name: vllm_contract._parameters(n) for n in node.body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_supported_version_has_all_that_we_rely_on(version):
    assert problems(version) == []


def test_the_versions_are_those_that_the_documentation_names():
    assert (SUPPORTED[0], SUPPORTED[-1]) == ("0.25.1", "0.33.0")
    assert "0.25.1 to 0.33" in (ROOT / "docs/vllm.md").read_text()


def test_a_version_that_differs_is_refused_by_name():
    found = problems(TOO_OLD)
    assert any("engines are made with ['config', 'parallel_config', 'model']" in line for line in found)
    assert any("receive_weights takes ['self', 'update_info', 'load_weights']" in line for line in found)


def test_the_calls_are_those_that_the_adapter_makes():
    tree = ast.parse((ENGINE / "adapter/http.py").read_text())
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    asked = {text.partition("?")[0] for text in texts if text.startswith("/") and " " not in text}
    asked = {text for text in asked if not text.startswith("/weightsync/")}
    assert asked == {route.split()[1] for route in [*CALLS, LABEL]}


def test_every_route_of_every_version_was_decided_on():
    agents = set(AGENTS.replace("\n", " ").strip().split(", "))
    agents = {route.strip() for route in agents}
    unknown, dead = {}, set(_INFERENCE)
    for version in FILES:
        for route in json.loads(FILES[version].read_text())["routes"]:
            method, path = route.split(" ")
            dead.discard(path)
            kind = access(path.replace("{response_id}", "resp_1"))
            if kind is Access.TOKEN and route not in agents:
                unknown.setdefault(route, []).append(version)
            assert kind is not Access.OPEN or path in _OPEN
            assert method != "WEBSOCKET" or kind is Access.TOKEN
    assert unknown == {}, "inference, open or the agent's? guard/routes.py, or AGENTS here"
    assert dead == set(), "no version has these"


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup")
def test_what_is_installed_is_what_its_file_says():
    """Held against the real thing once: what is written down by reading is what importing finds."""
    place = Path(next(iter(find_spec("vllm").submodule_search_locations))).parent
    version = next(
        line.split("'")[1]
        for line in (place / "vllm/_version.py").read_text().splitlines()
        if line.startswith("__version__ = version =")
    ).partition("+")[0]
    sources = vllm_contract.read(place)
    assert vllm_contract.contract(sources) == json.loads(FILES[version].read_text())


def test_a_reexported_name_is_found_where_it_is_defined():
    sources = vllm_contract.Sources(
        {
            "vllm/a/__init__.py": "from .b import thing as other\n",
            "vllm/a/b.py": "from vllm.c import thing\n",
            "vllm/c.py": "def thing(x, *rest, y=1, **more): ...\n",
        }
    )
    node = sources.find("vllm.a", "other")
    assert vllm_contract._described(node) == {"parameters": ["x", "*rest", "+y=", "**more"]}
    assert sources.find("vllm.a", "nothing") is None
