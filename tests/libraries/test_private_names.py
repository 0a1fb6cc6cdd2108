"""Every private name of another library that the package uses exists, and is used in one module."""

import ast
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from transformers import Trainer

import sqft_export
from sqft_export import libraries
from sqft_export.libraries import optimum

MODULES = [module.name for module in pkgutil.iter_modules(libraries.__path__)]
STANDARD_LIBRARY = {"_exit", "_fields"}  # documented names of os and of named tuples


def exists(name: str) -> bool:
    """Whether ``<module>:<attribute>`` can be looked up."""
    module, _, path = name.partition(":")
    found: object = importlib.import_module(module)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def check_names(distribution: str, names: Iterable[str]) -> None:
    missing = [name for name in names if not exists(name)]
    version = importlib.metadata.version(distribution)
    assert not missing, f"{distribution} {version} has no {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_the_installed_library_has_every_private_name(module):
    found = importlib.import_module(f"{libraries.__name__}.{module}")
    assert found.PRIVATE
    check_names(found.DISTRIBUTION, found.PRIVATE)


def test_a_missing_name_is_reported_with_library_and_version(monkeypatch):
    monkeypatch.delattr(Trainer, "_save_rng_state")
    version = importlib.metadata.version("transformers")
    with pytest.raises(AssertionError, match=rf"transformers {version} has no .*_save_rng_state"):
        check_names("transformers", ["transformers:Trainer._save_rng_state"])


def test_the_version_limit_of_an_export_is_removed_only_while_it_runs():
    before = optimum.supported_versions("gemma")
    assert before is not None and before.most is not None
    with pytest.raises(KeyError), optimum.without_version_limit("gemma"):
        lifted = optimum.supported_versions("gemma")
        assert lifted is not None and lifted.most is None
        raise KeyError
    assert optimum.supported_versions("gemma") == before


def own_private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a module of the package defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def foreign_private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sqft_export"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            name = next((part for part in parts if part.startswith("_")), "")
        else:
            continue
        private = name.startswith("_") and not name.endswith("__")
        if private and name not in own | STANDARD_LIBRARY:
            yield name


def test_private_names_of_libraries_are_used_only_in_their_modules():
    package = Path(sqft_export.__file__).parent
    trees = {file: ast.parse(file.read_text()) for file in sorted(package.rglob("*.py"))}
    places = Path(libraries.__file__).parent
    own = {
        name
        for file, tree in trees.items()
        if not file.is_relative_to(places)
        for name in own_private_names(tree)
    }
    found = {
        f"{file.relative_to(package)}: {name}"
        for file, tree in trees.items()
        if not file.is_relative_to(places)
        for name in foreign_private_names(tree, own)
    }
    assert not found
