"""The architecture as a test: who may import whom, who stays free of torch, and no pickle (R1).

Reads source files only, so that a module which cannot be imported here is still checked. The rules
are those of docs/design.md, section 4.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
LINKED = ("kernels", "bench")  # folders of the repository that are parts of the package

# lower layers first; a part may import its own layer and the layers below it
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "cores", "budget", "sections", "config", "log", "metrics", "tracing", "progress"}),
    frozenset({"request", "sampling", "lease", "messages"}),
    frozenset(
        {
            "wire",
            "queues",
            "waker",
            "transfer",
            "frames",
            "tensors",
            "rundir",
            "media",
            "conversation",
            "methods",
        }
        | {"encoders", "pruning", "attention", "kv", "models", "kernels"}
    ),
    frozenset({"engine", "catalogue"}),
    frozenset({"workers"}),
    frozenset(
        {
            "__main__",
            "ask",
            "show",
            "generation",
            "server",
            "llm",
            "offline",
            "batch",
            "bench",
            "cli",
            "doctor",
            "evaluation",
            "options",
            "planning",
            "cluster",
        }
    ),
)
# an API process made of these holds no model (idea 2)
TORCH_FREE = (
    "mmserve.server",
    "mmserve.media.fetch",
    "mmserve.messages",
    "mmserve.queues",
    "mmserve.workers.dispatcher",
    "mmserve.workers.supervisor",
    "mmserve.wire",
    "mmserve.transfer",
    "mmserve.frames",
    "mmserve.rundir",
    "mmserve.conversation",
    "mmserve.methods",
    "mmserve.generation",
    "mmserve.models.chat",
    "mmserve.models.layout",
    "mmserve.models.resolve",
    "mmserve.config",
    "mmserve.sections",
    "mmserve.log",
)
MODEL_LIBRARIES = frozenset({"torch", "transformers", "triton", "PIL", "av", "decord"})
# these run on a bare GPU machine
BARE = ("kernels", "attention", "kv", "pruning", "models", "engine")
# the API's side of a model: its template and tokenizer, and where its files come from
NOT_BARE = frozenset({"mmserve.models.chat", "mmserve.models.resolve"})
BARE_LIBRARIES = frozenset({"torch", "triton", "numpy", "safetensors", "transformers", "mmserve"})
# library -> parts that may import it; the demo is a client and not listed here
OWNERS = {
    "zmq": {"queues"},
    "PIL": {"media", "evaluation"},
    "av": {"media", "evaluation", "bench"},
    "decord": {"media"},
    "torchcodec": {"media"},
    "lmdb": {"encoders"},
    "redis": {"encoders"},
    # batch and cli are HTTP clients of a running server, never fetchers of media
    "httpx": {"media", "batch", "cli"},
    "ray": {"cluster"},
    "gradio": set(),
}
UNSAFE_MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
)
UNSAFE_ATTRIBUTES = frozenset({"recv_pyobj", "send_pyobj"})
UNSAFE_CALLS = frozenset(
    {"torch.load", "torch.save", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
)


class Import(NamedTuple):
    module: str
    line: int
    at_load: bool  # runs when the module is imported, not when a function is called


def module_name(path: Path, root: Path = ROOT) -> str:
    """The dotted name of a source file; kernels/ and bench/ are named as they are imported."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "mmserve")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of mmserve, kernels and bench, each file once."""
    found = {}
    links = {ROOT / "mmserve" / name for name in LINKED}
    for folder in ("mmserve", *LINKED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if links.isdisjoint(path.parents):
                found[module_name(path)] = (path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Each imported module with its full name; what only a type checker sees is left out."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_load = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, at_load) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            # `from a import b` may import the module a.b
            yield from (Import(f"{base}.{alias.name}", node.lineno, at_load) for alias in node.names)
        inside = at_load and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def imports_of(module: str) -> list[Import]:
    path, tree = sources()[module]
    return list(imports(tree, module, is_package=path.stem == "__init__"))


def part(module: str) -> str | None:
    """The part of mmserve a dotted name lies in: `mmserve.kv.table` in `kv`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mmserve" and len(parts) > 1 else None


def layer(name: str) -> int:
    """Its place from the bottom; a part without one counts as the highest."""
    return next((index for index, parts in enumerate(LAYERS) if name in parts), len(LAYERS))


def loaded_with(module: str) -> set[str]:
    """Everything that importing a module loads, parents included: modules of ours, names of libraries."""
    loaded: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        parents = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)]
        for known in parents:
            if known in loaded:
                continue
            loaded.add(known)
            if known in sources():
                pending += [found.module for found in imports_of(known) if found.at_load]
    return loaded


def unsafe(tree: ast.AST, module: str = "m") -> Iterator[str]:
    """Each way in which a module could run code that comes with data (R1)."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{module}:{line} imports {n}" for n in names if n.split(".")[0] in UNSAFE_MODULES)
            if isinstance(node, ast.ImportFrom):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (f"{module}:{line} imports {name}" for name in full if name in UNSAFE_CALLS)
        elif isinstance(node, ast.Attribute):
            if node.attr in UNSAFE_ATTRIBUTES or ast.unparse(node) in UNSAFE_CALLS:
                yield f"{module}:{line} uses {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg == "allow_pickle" and constant is not False:
                    yield f"{module}:{line} passes allow_pickle"
                if keyword.arg == "trust_remote_code":
                    yield f"{module}:{line} passes trust_remote_code"
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if ast.unparse(node.func).endswith(("import_module", "__import__")) and first in UNSAFE_MODULES:
                yield f"{module}:{line} imports {first}"


def ours(names: Iterable[str]) -> Iterator[str]:
    """The names that are modules of ours; a name imported from a module stands for that module."""
    for name in names:
        if name in sources():
            yield name
        elif name.rpartition(".")[0] in sources():
            yield name.rpartition(".")[0]


def test_every_part_has_a_layer() -> None:
    parts = {part(module) for module in sources()} - {None}
    known = frozenset().union(*LAYERS)
    assert parts <= known, "give these a layer in LAYERS and in docs/design.md"


def test_no_part_imports_a_higher_one() -> None:
    wrong = []
    for module in sources():
        home = part(module)
        if home is None:  # the package itself only hands out names, lazily
            continue
        for found in imports_of(module):
            target = part(found.module) or ""
            # a name of the package itself, such as __version__, is no part
            if f"mmserve.{target}" in sources() and layer(target) > layer(home):
                wrong.append(f"{module}:{found.line} imports {found.module}")
    assert wrong == []


def test_importing_the_package_loads_nothing_else() -> None:
    assert {name for name in loaded_with("mmserve") if name.startswith("mmserve.")} == set()


def test_kernels_import_nothing_of_mmserve() -> None:
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for module in sources()
        if part(module) == "kernels"
        for found in imports_of(module)
        if part(found.module) not in (None, "kernels")
    ]
    assert wrong == []


def test_no_cycle_at_load() -> None:
    graph = {
        module: {
            target
            for target in ours(found.module for found in imports_of(module) if found.at_load)
            # a package may gather its own modules
            if target != module and not module.startswith(f"{target}.")
        }
        for module in sources()
    }
    # take away modules that need nothing, until only cycles are left
    while ready := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in ready:
            del graph[module]
    assert sorted(graph) == []


def test_the_api_process_loads_no_model_library() -> None:
    wrong = [
        f"{module} loads {library}"
        for module in sources()
        if any(module == free or module.startswith(f"{free}.") for free in TORCH_FREE)
        for library in sorted(MODEL_LIBRARIES & {name.split(".")[0] for name in loaded_with(module)})
    ]
    assert wrong == []


def test_the_api_process_really_loads_no_model_library() -> None:
    """The same in a real interpreter: a library could bring torch along."""
    modules = [m for m in sources() if any(m == free or m.startswith(f"{free}.") for free in TORCH_FREE)]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"sys.exit(' '.join(sorted({set(MODEL_LIBRARIES)!r} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bare_parts_import_only_what_a_gpu_machine_has() -> None:
    wrong = []
    for module in sources():
        if part(module) not in BARE or module in NOT_BARE:
            continue
        for found in imports_of(module):
            library = found.module.split(".")[0]
            if library not in BARE_LIBRARIES | sys.stdlib_module_names:
                wrong.append(f"{module}:{found.line} imports {library}")
    assert wrong == []


def test_each_library_has_one_owner() -> None:
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for module in sources()
        for found in imports_of(module)
        if part(module) not in OWNERS.get(found.module.split(".")[0], {part(module)})
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["mmserve", *LINKED, "demo"])
def test_no_module_deserialises_code(folder: str) -> None:
    """R1."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    wrong = [hit for path in paths for hit in unsafe(ast.parse(path.read_text("utf-8")), str(path))]
    assert wrong == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, dill",
        "from pickle import loads",
        "from joblib.numpy_pickle import load",
        "def f():\n    import marshal",
        "import_module('pickle')",
        "importlib.import_module('shelve')",
        "__import__('pickle')",
        "socket.recv_pyobj()",
        "x = socket.send_pyobj",
        "torch.load(path)",
        "f = torch.load",
        "from torch import load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_scan_sees_every_way(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "yaml.safe_load(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "'import pickle'",
        "safetensors.torch.load(b)",
    ],
)
def test_the_scan_lets_safe_code_pass(code: str) -> None:
    assert list(unsafe(ast.parse(code))) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import mmserve.kv.table", {"mmserve.kv.table"}),
        ("from mmserve import kv", {"mmserve.kv"}),
        ("from . import store", {"mmserve.kv.store"}),
        ("from .store import Store", {"mmserve.kv.store.Store"}),
        ("from ..models import rope", {"mmserve.models.rope"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", {"numpy"}),
        ("try:\n    import triton\nexcept ImportError:\n    triton = None", {"triton"}),
    ],
)
def test_imports_get_their_full_names(code: str, expected: set[str]) -> None:
    found = list(imports(ast.parse(code), "mmserve.kv.table", is_package=False))
    assert {one.module for one in found} == expected
    assert all(one.at_load for one in found)


def test_an_import_inside_a_function_is_not_at_load() -> None:
    (found,) = imports(ast.parse("def f() -> None:\n    import torch"), "mmserve.x", is_package=False)
    assert not found.at_load
