"""Baselines of ``benchmark.baselines`` that quantize the dense LoRA after its training.

A user without this package trains LoRA, merges it and quantizes the result. All these rows share
one training, that of the row ``dense + LoRA``.
"""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sqft_export.recipe.schema import Recipe

PeerName = Literal[
    "lora-then-int4",
    "lora-then-q4_0",
    "lora-then-q4_1",
    "lora-then-q4_k_m",
    "lora-then-q3_k_m",
    "lora-then-nncf",
]


@dataclass(frozen=True)
class Peer:
    """A baseline that is quantized after training.

    title: name of its rows for readers.
    stage: pass that writes it.
    runtime: its runtime; None for the runtimes of the recipe.
    modules: packages that write and run it, as alternatives of which one is enough.
    extra: extra of this package that installs them.
    """

    title: str
    stage: str
    runtime: str | None = None
    modules: tuple[str, ...] = ()
    extra: str = ""

    @property
    def installed(self) -> bool:
        """Return whether this machine can make and run it."""
        return not self.modules or any(importlib.util.find_spec(m) for m in self.modules)


_LLAMA_CPP = ("cyllama", "llama_cpp")
PEERS: dict[str, Peer] = {
    "lora-then-int4": Peer("LoRA, then GPTQ", "peers-grid"),
    **{
        f"lora-then-{kind.lower()}": Peer(
            f"LoRA, then {kind}", "peers-gguf", "gguf", _LLAMA_CPP, "gguf-runtime"
        )
        for kind in ("Q4_0", "Q4_1", "Q4_K_M", "Q3_K_M")
    },
    "lora-then-nncf": Peer("LoRA, then NNCF", "peers-nncf", "openvino", ("nncf",), "openvino"),
}
# Without benchmark.baselines in a recipe, the first of these that can be made here joins the table.
_DEFAULT_FILES = ("lora-then-q4_k_m", "lora-then-nncf")


def default_files(targets: Collection[str]) -> tuple[str, ...]:
    """Return the file of another quantizer that a table has by default; empty without one.

    :param targets: runtimes of the recipe.
    """
    made = [n for n in _DEFAULT_FILES if PEERS[n].runtime in targets and PEERS[n].installed]
    return tuple(made[:1])


_GRID_RUNTIMES = ("openvino", "gguf")  # runtimes for which other quantizers exist


def peers_of(recipe: "Recipe") -> tuple[str, ...]:
    """Return the baselines of this recipe that are quantized after training, in table order.

    They need a recipe that trains. Files of a runtime that is no target are left out. If the
    recipe does not list its baselines, these are ``lora-then-int4``, if the recipe quantizes,
    and one file of another quantizer, if its runtime is a target of the recipe and installed here.
    """
    targets = recipe.export.targets
    if recipe.adapt is None:
        return ()
    if "baselines" in recipe.benchmark.model_fields_set:
        listed = (name for name in PEERS if name in recipe.benchmark.baselines)
        return tuple(name for name in listed if PEERS[name].runtime in (None, *targets))
    has_grid = recipe.quantize.method not in ("none", "existing") and recipe.export.measured
    grid = ("lora-then-int4",) if has_grid else ()
    return grid + default_files(targets)


def grid_targets(recipe: "Recipe") -> tuple[str, ...]:
    """Return the runtimes that ``lora-then-int4`` is exported to.

    They are those of the recipe that have other quantizers; else the recipe's first one.
    """
    targets = recipe.export.measured
    return tuple(name for name in targets if name in _GRID_RUNTIMES) or targets[:1]
