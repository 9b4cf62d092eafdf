"""Writes down what of vLLM the plugin, the adapter and the guard rest on, from a wheel's Python sources alone.

    python -m pip download vllm==0.33.0 --no-deps --dest /tmp/wheels
    python scripts/vllm_contract.py /tmp/wheels/vllm-0.33.0-*.whl

One file a version in tests/unit/vllm/contract/, names and signatures only; tests/unit/vllm/test_contract.py holds
our code to each. Nothing is imported: kernels and torch are not needed. An unpacked wheel's directory will do too.
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
OURS: Final = ROOT / "engine/src/weightsync_engine/vllm"
CONTRACT: Final = ROOT / "tests/unit/vllm/contract"
ENTRYPOINTS: Final = "vllm/entrypoints/"
RELOAD: Final = "vllm.model_executor.model_loader.reload.layerwise"
FACTORY: Final = "vllm.distributed.weight_transfer.factory"
WORKER: Final = "vllm/v1/worker/gpu_worker.py"
PLAIN_METHODS: Final = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod")
CLOSELY: Final = {
    "WeightTransferEngine",
    "WeightTransferEngineFactory",
    "WeightTransferInitInfo",
    "WeightTransferUpdateInfo",
    "QuantizeMethodBase",
}
"""Classes that ours extend, or whose members ours use."""
HTTP: Final = ("get", "post", "put", "delete", "patch", "head", "options", "websocket")


@dataclass
class Sources:
    """A wheel's Python files, parsed when asked for."""

    files: dict[str, str]
    _parsed: dict[str, ast.Module] = field(default_factory=dict)

    def tree(self, path: str) -> ast.Module | None:
        """The module in ``path``; None where there is no such file."""
        if path not in self._parsed and path in self.files:
            self._parsed[path] = ast.parse(self.files[path])
        return self._parsed.get(path)

    def module(self, name: str) -> ast.Module | None:
        """The module or package of that name."""
        path = name.replace(".", "/")
        return self.tree(f"{path}.py") or self.tree(f"{path}/__init__.py")

    def find(self, module: str, name: str, depth: int = 0) -> ast.stmt | None:
        """Where ``name`` is defined, through whatever modules pass it on."""
        tree = self.module(module)
        if tree is None or depth > 8:
            return None
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return node
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                origin = next(a.name for a in node.names if (a.asname or a.name) == name)
                found = self.find(self._origin(module, node), origin, depth + 1)
                if found is not None:
                    return found
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = f"{module.replace('.', '/')}/__init__.py" in self.files
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


def read(place: Path) -> Sources:
    """A wheel, or a directory that one was unpacked into. Raises OSError and zipfile.BadZipFile."""
    if place.is_dir():
        paths = sorted(place.glob("vllm/**/*.py"))
        return Sources({path.relative_to(place).as_posix(): path.read_text() for path in paths})
    with zipfile.ZipFile(place) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        return Sources({name: wheel.read(name).decode() for name in names})


def imported(directory: Path = OURS) -> list[tuple[str, str]]:
    """What our code takes from vLLM: (module, name)."""
    found = set()
    for path in directory.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found |= {(node.module or "", alias.name) for alias in node.names}
    return sorted(found)


def contract(sources: Sources) -> dict[str, Any]:
    """The whole of it, for one version."""
    symbols = {f"{module}:{name}": _described(sources.find(module, name)) for module, name in imported()}
    return {
        "symbols": symbols,
        "engine_is_made_with": _call_of(sources, FACTORY, "engine_cls"),
        "worker_asks_of_engine": _asked_of_engine(sources),
        "reload_asks_of_model": _asked_of_model(sources),
        "plain_methods": [name for name in PLAIN_METHODS if _is_class(sources, name)],
        "group": _group(sources),
        "routes": _routes(sources),
    }


def _described(node: ast.stmt | None) -> Any:
    match node:
        case None:
            return None
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return {"parameters": _parameters(node)}
        case ast.ClassDef() if node.name not in CLOSELY:
            return "class"
        case ast.ClassDef():
            methods = {n.name: n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
            return {
                "methods": {name: _parameters(method) for name, method in methods.items()},
                "abstract": sorted(
                    name for name, method in methods.items() if "abstractmethod" in _marks(method)
                ),
                "attributes": sorted(_attributes(node)),
                "dataclass": "dataclass" in _marks(node),
            }
    return "value"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names in order; ``=`` after those that may be left out."""
    arguments = node.args
    plain = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    first = len(plain) - len(arguments.defaults)
    found = [name + ("=" if index >= first else "") for index, name in enumerate(plain)]
    if arguments.vararg:
        found.append(f"*{arguments.vararg.arg}")
    found += [
        "+" + a.arg + ("=" if default is not None else "")
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [*found, f"**{arguments.kwarg.arg}"] if arguments.kwarg else found


def _marks(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    return {name.id for mark in node.decorator_list for name in ast.walk(mark) if isinstance(name, ast.Name)}


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _call_of(sources: Sources, module: str, name: str) -> list[str]:
    for node in ast.walk(sources.module(module) or ast.Module([], [])):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            return [ast.unparse(argument) for argument in node.args]
    return []


def _asked_of_engine(sources: Sources) -> list[str]:
    found = set()
    for node in ast.walk(sources.tree(WORKER) or ast.Module([], [])):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("weight_transfer_engine"):
            found.add(node.attr)
    return sorted(found)


def _asked_of_model(sources: Sources) -> list[str]:
    found = set()
    for reload in ("initialize_layerwise_reload", "finalize_layerwise_processing"):
        function = sources.find(RELOAD, reload)
        for node in ast.walk(function) if function else ():
            match node:
                case ast.Attribute(value=ast.Name(id="model"), attr=name):
                    found.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id="model"), asked, *_]
                ):
                    found.add(str(ast.literal_eval(asked)))
    return sorted(found)


def _is_class(sources: Sources, name: str) -> bool:
    return any(
        re.search(rf"^class {name}\(", text, re.MULTILINE)
        for path, text in sources.files.items()
        if path.startswith("vllm/model_executor/layers/")
    )


def _group(sources: Sources) -> list[str]:
    node = sources.find("vllm.distributed.parallel_state", "GroupCoordinator")
    names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} if node else set()
    return sorted(names & {"world_size", "cpu_group"})


def _routes(sources: Sources) -> dict[str, list[str]]:
    """What may be sent to each route: parameters and body fields, ``=`` after those that may be left out."""
    found: dict[str, list[str]] = {}
    for path in sorted(sources.files):
        tree = sources.tree(path) if path.startswith(ENTRYPOINTS) else None
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                for route in _decorated(node):
                    found[route] = _taken(node)
            elif isinstance(node, ast.Call):
                found |= {route: [] for route in _added(node)}
    return dict(sorted(found.items()))


def _decorated(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for mark in node.decorator_list:
        if not isinstance(mark, ast.Call) or not isinstance(mark.func, ast.Attribute):
            continue
        if mark.func.attr in HTTP and mark.args and isinstance(mark.args[0], ast.Constant):
            yield f"{mark.func.attr.upper()} {mark.args[0].value!s}"


def _added(node: ast.Call) -> Iterator[str]:
    named = isinstance(node.func, ast.Attribute) and node.func.attr == "add_api_route"
    if named and node.args and isinstance(node.args[0], ast.Constant):
        methods = next((ast.literal_eval(k.value) for k in node.keywords if k.arg == "methods"), ["GET"])
        yield from (f"{method} {node.args[0].value!s}" for method in methods)


def _taken(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Of a function that reads the body by itself, what it asks the body for."""
    found = [name for name in _parameters(node) if name.rstrip("=") not in ("raw_request", "request")]
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "body.get":
            found.append(f"{ast.literal_eval(call.args[0])}=")
    return found


def version_of(place: Path) -> str:
    """From the name of a wheel or directory. Raises ValueError."""
    found = re.search(r"(\d+\.\d+\.\d+)", place.name)
    if not found:
        raise ValueError(f"{place.name} names no version")
    return found.group(1)


def write(places: Iterable[Path], directory: Path = CONTRACT) -> None:
    """One file each."""
    directory.mkdir(parents=True, exist_ok=True)
    for place in places:
        path = directory / f"{version_of(place)}.json"
        path.write_text(json.dumps(contract(read(place)), indent=1) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    write(map(Path, sys.argv[1:]))
