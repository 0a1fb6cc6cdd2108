"""Everything that the package imports is declared, and everything that is declared is used."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions

from test_layers import MODULES, imports_of, nodes_at_run_time

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Used only where the user has installed them.
OPTIONAL = {
    "pynvml": "energy of an NVIDIA GPU (nvidia-ml-py)",
    "wandb": "one of the loggers that a recipe can name",
    "llama_cpp": "llama-cpp-python (extra llama-cpp), which its users compile",
    "fsspec": "object stores as the folder of runs (extra s3)",
    "onnxruntime_ep_webgpu": "WebGPU for ONNX Runtime, one of two packages that have it",
}
# Declared, but not imported by this package.
INDIRECT = {
    "llama-cpp-python": "imported as llama_cpp, where it is installed",
    "gptqmodel": "a test loads a merged folder through transformers",
    "onnxscript": "torch's ONNX exporter",
    "s3fs": "fsspec imports it for s3://",
}
TOOLS = ("dev", "docs")


def distribution(requirement: str) -> str:
    """Normalized name of a requirement, without extras, versions and markers."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[;<>=! ]", requirement)[0]).lower()


BASE = {distribution(requirement) for requirement in PROJECT["dependencies"]}
DECLARED = BASE | {
    distribution(requirement)
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra not in TOOLS
    for requirement in requirements
    if not requirement.startswith("sqft-export")
}
# Package of Python -> distributions that have it; lm-eval is not installed everywhere.
INSTALLED = {
    name: set(map(distribution, found)) for name, found in packages_distributions().items()
}


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Packages of other projects that statements import."""
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for top in {name.partition(".")[0] for name in names} - {"sqft_export"}:
            if top not in sys.stdlib_module_names:
                yield top


def distributions(package: str) -> set[str]:
    return INSTALLED.get(package, {distribution(package)})


def test_every_import_is_declared():
    missing = {
        f"{module} imports {package}"
        for module, tree in MODULES.items()
        for package in imported(nodes_at_run_time(tree))
        if package not in OPTIONAL and not distributions(package) & DECLARED
    }
    assert not missing


def test_everything_declared_is_used():
    packages = {p for tree in MODULES.values() for p in imported(nodes_at_run_time(tree))}
    used = set().union(*map(distributions, packages))
    assert not DECLARED - used - set(INDIRECT)
    assert not set(INDIRECT) - DECLARED


def test_the_package_and_its_command_line_start_without_extras():
    front = ast.parse((ROOT / "sqft_export" / "__init__.py").read_text())
    waiting, seen = {"cli", *imports_of(front)}, set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        first = [n for n in MODULES[module].body if isinstance(n, ast.Import | ast.ImportFrom)]
        extra = {package for package in imported(first) if not distributions(package) & BASE}
        assert not extra, f"{module} imports {extra}"
        waiting |= imports_of(ast.Module(first, [])) - seen
