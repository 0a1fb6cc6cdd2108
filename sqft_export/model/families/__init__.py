"""Model families as data: where the decoder blocks and the head are, and what adapters go on."""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One or more Hugging Face ``model_type`` that share their layout.

    blocks: path of the list of decoder blocks.
    embedding, head: of tokens.
    targets: Linears of a block that get an adapter where the recipe names none.
    groups: those of them that share a rank; they are handed the same input.
    attention: the implementation in transformers to take, None for its own choice; others may leave
        out what a model has, as the capped scores of Gemma 2.
    tied: whether embedding and head are one where ``config.json`` does not say.
    builder: what ONNX Runtime GenAI's model builder calls its class, None where it has none.
    builder_ropes: scalings of rotary positions that the class computes as the model does.
    rope_builders: scaling of rotary positions -> the builder's class for it, where it is another.
    norm_offset: what the class adds to a norm's weight; graphs hold the sum.
    query_scaled: whether the class scales queries by head_size ** -0.5; graphs hold scaled biases.
    learned_positions: whether every position has its own row, and there is none after the last.
    joined: Linear of a block that holds several -> what the builder calls its equal parts.
    """

    model_types: tuple[str, ...]
    blocks: str
    embedding: str
    head: str
    targets: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    attention: str | None = None
    tied: bool = False
    builder: str | None = None
    builder_ropes: tuple[str, ...] = ("default",)
    rope_builders: dict[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    query_scaled: bool = False
    learned_positions: bool = False
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _load() -> dict[str, Family]:
    families = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            families.update(dict.fromkeys(family.model_types, family))
    return families


FAMILIES = _load()


def rope_type(config: dict[str, Any]) -> str:
    """The scaling of rotary positions; that of full attention, where layers differ.

    :param config: of transformers' class, with what ``config.json`` leaves to it.
    """
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return str(rope.get("rope_type") or "default")


def builder_lacks(family: Family, config: dict[str, Any]) -> str | None:
    """Why ONNX Runtime GenAI's builder is not used for a model; None where it is.

    :param config: of transformers' class, with what ``config.json`` leaves to it.
    """
    if family.builder is None:
        return f"is not used for {', '.join(family.model_types)}"
    if (rope := rope_type(config)) not in family.builder_ropes:
        return f"does not compute rope_type {rope} as the model does"
    return None


def builder_class(family: Family, config: dict[str, Any]) -> str:
    """The class of ONNX Runtime GenAI's builder for a model that it has one for."""
    assert family.builder
    return family.rope_builders.get(rope_type(config), family.builder)


def adapted(
    family: Family, targets: tuple[str, ...] | None, groups: tuple[tuple[str, ...], ...] | None
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Last names of the Linears that get an adapter, and which share a rank.

    :param targets, groups: the recipe's; what it leaves out is the family's.
    """
    targets = family.targets if targets is None else targets
    if groups is None:
        within = (tuple(name for name in group if name in targets) for group in family.groups)
        groups = tuple(group for group in within if group)
    return targets, groups


def rank_groups(
    names: Iterable[str], blocks: str, groups: tuple[tuple[str, ...], ...]
) -> dict[str, list[str]]:
    """Group, such as ``3.q_proj,k_proj`` -> Linears that share one rank, in block order."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        block, _, path = name.removeprefix(f"{blocks}.").partition(".")
        for group in groups:
            if path.rsplit(".", 1)[-1] in group:
                grouped.setdefault(f"{block}.{','.join(group)}", []).append(name)
    return grouped
