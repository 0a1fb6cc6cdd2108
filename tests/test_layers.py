"""Imports point down: a module imports only from its own rank or a lower one."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sqft_export"
RANKS = [
    {"errors", "artifact", "numerics", "machine", "selection", "intervals"},
    {
        "sparse",
        "families",
        "structure",
        "recipe",
        "known_datasets",
        "tensorfiles",
        "checkpoint",
        "compressed",
        "skeleton",
    },
    {
        "sources",
        "tasks",
        "calibration",
        "reference",
        "adapters",
        "training",
        "targets",
        "pictures",
        "pages",
    },
    {"sparsifiers", "quantizers", "search", "evaluate", "plan", "predict"},
    {"worker", "inspection"},
    {"device"},
    {"stages"},
    {"pipeline", "comparison"},
    {"cli"},
]


def rank_of(part: str) -> int:
    return next(rank for rank, names in enumerate(RANKS) if part in names)


def imports_of(file: Path) -> set[str]:
    """First parts below ``sqft_export`` of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("sqft_export.")}
    return found


def test_imports_point_down():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in ("__init__", "builtin"):
            continue
        wrong += [
            f"{file.relative_to(PACKAGE)} imports {other}"
            for other in imports_of(file)
            if rank_of(other) > rank_of(part)
        ]
    assert not wrong


def test_artifact_needs_the_standard_library_alone():
    tree = ast.parse((PACKAGE / "artifact.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m for m in modules if m and m.startswith("sqft_export")} == {"sqft_export.errors"}
    assert not modules & {"numpy", "torch", "safetensors"}
