"""Model families as data: where the decoder blocks and the head are, and what adapters go on."""

import functools
import importlib
import json
import logging
import pkgutil
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


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
    halves: Linear of a block that the builder takes apart -> what it calls its equal parts.
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
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _load() -> dict[str, Family]:
    families = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            families.update(dict.fromkeys(family.model_types, family))
    return families


FAMILIES = _load()


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a Hugging Face ``config.json``; of one that is not listed, by its structure.

    :raises UserError: naming ``where``, if it has no blocks of Linears that could be compressed.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    return _unlisted(json.dumps(config, sort_keys=True, default=str), where)


@functools.cache
def _unlisted(config: str, where: str) -> Family:
    from sqft_export.structure import by_structure

    family = by_structure(json.loads(config), where)
    logger.warning(
        "%s: model_type %s is none of the tested ones (%s); taken by its structure: blocks %s, "
        "adapters on %s",
        where,
        family.model_types[0],
        ", ".join(sorted(FAMILIES)),
        family.blocks,
        ", ".join(family.targets),
    )
    return family


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


def shapes(config: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its shape, from ``config.json`` alone.

    :raises UserError: naming ``where`` and what transformers can't make a model of.
    """
    from sqft_export.structure import empty_model

    model = empty_model(config, where)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}
