"""The tables of ``list``: targets, recipes, families, methods and fields to choose from."""

from collections.abc import Callable
from dataclasses import asdict
from typing import get_args

Entries = list[dict[str, str]]


def _targets() -> Entries:
    """Return runtimes and devices; why one is missing; whether we have run it."""
    from sqft_export.kernels.extension import unavailable_reason
    from sqft_export.kernels.library import find_kernels
    from sqft_export.targets.devices import Device, devices
    from sqft_export.targets.support import evidence_of

    kernels = find_kernels()  # kernels of this package
    name = kernels.name if kernels else "none"
    found = [*devices(), Device("openvino", "kernels", name, unavailable_reason())]
    return [
        asdict(one)
        | {"state": evidence_of(one.runtime, one.kind), "missing": one.missing or "here"}
        for one in found
    ]


def _recipes() -> Entries:
    """Return the recipes of this package, each with its first comment line."""
    from sqft_export.recipe.builtin import builtin_recipes

    first = {name: file.read_text().partition("\n")[0] for name, file in builtin_recipes().items()}
    return [
        {"recipe": name, "about": line.removeprefix("#").strip()} for name, line in first.items()
    ]


def _families() -> Entries:
    """Return tested model types, the Linears that get an adapter, and llama.cpp's name."""
    from sqft_export.model.families import FAMILIES
    from sqft_export.targets.gguf.architectures import ARCHITECTURES

    return [
        {
            "model_type": name,
            "adapters": ", ".join(family.targets),
            "gguf": ARCHITECTURES[name].name if name in ARCHITECTURES else "no",
        }
        for name, family in sorted(FAMILIES.items())
    ]


def _methods() -> Entries:
    """Return the allowed words of the fields that choose a method."""
    from sqft_export.recipe.schema import Adapt, Quantize, Search, Sparsify

    fields = [
        ("sparsify.method", Sparsify.model_fields["method"]),
        ("quantize.method", Quantize.model_fields["method"]),
        ("adapt.pipeline", Adapt.model_fields["pipeline"]),
        ("search.strategy", Search.model_fields["strategy"]),
    ]
    return [
        {"field": name, "methods": ", ".join(get_args(field.annotation))} for name, field in fields
    ]


def _fields() -> Entries:
    """Return every field of a recipe with allowed values, default and meaning."""
    from sqft_export.recipe.fields import recipe_fields

    shown = ("field", "default", "allowed", "about")
    return [{name: getattr(row, name) for name in shown} for row in recipe_fields()]


CATALOG: dict[str, Callable[[], Entries]] = {
    "targets": _targets,
    "recipes": _recipes,
    "families": _families,
    "methods": _methods,
    "fields": _fields,
}
