"""The house: imports between rooms point down, those inside a room form no cycle.

A word means one thing; functions are short and flat.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sqft_export"
# Each folder, and each module at the top of the package, is a room. Room -> the rooms right below
# it. A room may import these and everything below them.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "compiled": set(),
    "libraries": {"errors"},
    "telemetry": set(),
    "untrusted": {"errors"},
    "documents": {"untrusted"},
    "textfiles": {"untrusted"},
    "numerics": {"compiled", "libraries"},
    "recipe": {"documents", "numerics", "textfiles"},
    "folders": {"recipe"},
    "machine": {"recipe"},
    "artifacts": {"machine"},
    "data": {"recipe"},
    "model": {"machine"},
    "kernels": {"machine"},
    "packed": {"artifacts", "folders", "kernels"},
    "adapters": {"data", "folders", "model"},
    "targets": {"adapters", "packed"},
    "sparsifiers": {"recipe"},
    "quantizers": {"targets"},
    "search": set(),
    "measure": {"targets", "telemetry"},
    "verify": {"measure"},
    "metrics": {"artifacts", "verify"},
    "report": {"metrics"},
    "plan": {"probes", "sparsifiers"},
    "probes": {"inference"},
    "stages": {"plan", "probes", "quantizers", "search", "web"},
    "run": {"stages"},
    "inference": {"report"},
    "api": {"inference", "run"},
    "web": {"probes"},
    "commands": {"api", "web"},
    "cli": {"commands"},
}
# Modules that count as a lower room than the rest of their folder.
LOWER = {"folders": {"model.chat", "targets.folder", "targets.genai_config"}}
# Packages whose ``__init__`` has content: protocols, registries and exporters of several modules.
FRONTS = {"model.families", "quantizers", "search", "sparsifiers", "stages", "targets"}
FRONTS |= {"targets.gguf", "targets.onnx", "targets.web"}
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] not in "_.")
# What every plug of a kind offers: the same name in each, held by a Protocol.
CONTRACTS = {"NEEDS", "compress", "search"}
LONGEST = 40
DEEPEST = 3


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its code."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.startswith("builtin"):
            found[name] = ast.parse(file.read_text())
    return found


MODULES = modules()


def room_of(module: str) -> str:
    lower = [room for room, modules in LOWER.items() if module in modules]
    return lower[0] if lower else module.partition(".")[0]


def below(room: str) -> set[str]:
    """All rooms that a room may import."""
    return BELOW[room].union(*map(below, BELOW[room]))


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_at_run_time(node)


def imports_of(tree: ast.Module) -> set[str]:
    """Modules below ``sqft_export`` that one imports, inside functions too."""
    names = set()
    for node in nodes_at_run_time(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqft_export"):
            base = (node.module or "").removeprefix("sqft_export").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                names.add(whole if whole in MODULES else base)
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("sqft_export.")}
    return {name.removeprefix("sqft_export.") for name in names}


IMPORTS = {module: imports_of(tree) for module, tree in MODULES.items()}


def test_imports_point_down():
    """Between rooms; a new room needs a line in ``BELOW``."""
    assert {room_of(module) for module in MODULES} == set(BELOW)
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room_of(other) not in {room_of(module)} | below(room_of(module))
    ]
    assert not wrong


def test_no_imports_are_circular():
    """Inside a room, modules are free to import each other in one direction."""
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


def test_packages_without_content_import_nothing():
    packages = {m for m in MODULES if (PACKAGE / m.replace(".", "/")).is_dir()}
    assert packages >= FRONTS
    assert not {m for m in packages - FRONTS if IMPORTS[m]}


def test_stages_import_no_sibling():
    for module, tree in MODULES.items():
        if module.startswith("stages."):
            assert not [other for other in imports_of(tree) if other.startswith("stages.")], module


def test_plugs_and_stages_are_held_to_their_protocols():
    """Every file of such a room stands in the tuple that mypy checks."""
    rooms = ("stages", "sparsifiers", "quantizers")
    for room in rooms:
        checking = [
            alias.name
            for node in ast.walk(MODULES[room])
            if isinstance(node, ast.ImportFrom) and node.module == f"sqft_export.{room}"
            for alias in node.names
        ]
        files = {m.split(".")[1] for m in MODULES if m.startswith(f"{room}.")} - {"allocation"}
        assert files == set(checking), room


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_name_is_public_in_two_rooms():
    rooms = defaultdict(set)
    for module, tree in MODULES.items():
        if "." in module or module in ROOMS:
            for name in public_names(tree):
                rooms[name].add(module.partition(".")[0])
    twice = {n: sorted(r) for n, r in rooms.items() if len(r) > 1 and n not in CONTRACTS}
    assert not twice


def depth_of(node: ast.AST) -> int:
    """Levels of blocks inside a function, its own not counted."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    inner = [
        depth_of(child) + (isinstance(child, blocks) and not is_elif(node, child))
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda)
    ]
    return max(inner, default=0)


def is_elif(parent: ast.AST, child: ast.AST) -> bool:
    return isinstance(parent, ast.If) and isinstance(child, ast.If) and parent.orelse == [child]


def test_functions_are_short_and_flat():
    long, deep = [], []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                if (node.end_lineno or 0) - node.lineno + 1 > LONGEST:
                    long.append(f"{module}.{node.name}")
                if depth_of(node) > DEEPEST:
                    deep.append(f"{module}.{node.name}: {depth_of(node)}")
    assert not long and not deep, (long, deep)


def test_no_code_of_a_model_folder_is_loaded():
    """transformers asks on the terminal where a call does not say."""
    silent = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if not named or not isinstance(node.func.value, ast.Name):
                continue
            loads = node.func.attr in ("from_pretrained", "from_config")
            if loads and node.func.value.id.startswith("Auto"):
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                silent += [module] if given.get("trust_remote_code") is not False else []
    assert not silent


def test_artifact_needs_the_standard_library_alone():
    hashing = {"errors", "machine.host", "untrusted"}
    hashing |= {f"artifacts.{name}" for name in ("claims", "hashes", "remote")}
    assert imports_of(MODULES["artifacts.store"]) == hashing
    assert imports_of(MODULES["untrusted"]) == {"errors"}
    assert imports_of(MODULES["artifacts.hashes"]) == {"machine.host"}
    assert imports_of(MODULES["machine.host"]) == {"errors", "machine.limits"}
    assert not imports_of(MODULES["machine.limits"])
    names = {
        n.module for n in ast.walk(MODULES["artifacts.store"]) if isinstance(n, ast.ImportFrom)
    }
    assert not names & {"numpy", "torch", "safetensors"}
