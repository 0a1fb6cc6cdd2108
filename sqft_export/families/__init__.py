"""Model families as data: where the decoder blocks, their projections and the head are."""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from sqft_export.errors import UserError


@dataclass(frozen=True)
class Family:
    """One or more Hugging Face ``model_type`` that share their layout.

    blocks: path of the list of decoder blocks.
    projections: Linear of a block -> (outputs, inputs), named as in :func:`dimensions`.
    vectors: other weights of a block -> their length, for predicting sizes.
    embedding, final_norm, head: the weights outside the blocks.
    builder: what ONNX Runtime GenAI's model builder calls its class, None where it has none.
    halves: Linear of a block that the builder takes apart -> what it calls its equal parts.
    """

    model_types: tuple[str, ...]
    blocks: str
    projections: dict[str, tuple[str, str]]
    vectors: dict[str, str]
    embedding: str
    final_norm: str
    head: str
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
    """The family of a Hugging Face ``config.json``.

    :raises UserError: naming ``where`` and the model types there are.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type: found {model_type!r}, allowed are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def dimensions(config: dict[str, Any]) -> dict[str, int]:
    """The named sizes that the projections of a family refer to."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    return {
        "hidden": hidden,
        "head": head_dim,
        "queries": queries,
        "keys": keys,
        "queries_keys_values": queries + 2 * keys,
        "intermediate": config["intermediate_size"],
        "gate_and_up": 2 * config["intermediate_size"],
        "vocabulary": config["vocab_size"],
    }


def shapes(config: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Every weight of the model and its shape, from ``config.json`` alone."""
    family, size = family_of(config, where), dimensions(config)
    weights: dict[str, tuple[int, ...]] = {
        f"{family.embedding}.weight": (size["vocabulary"], size["hidden"]),
        f"{family.final_norm}.weight": (size["hidden"],),
    }
    if not config.get("tie_word_embeddings"):
        weights[f"{family.head}.weight"] = (size["vocabulary"], size["hidden"])
    for block in range(config["num_hidden_layers"]):
        at = f"{family.blocks}.{block}"
        for name, (outputs, inputs) in family.projections.items():
            weights[f"{at}.{name}.weight"] = (size[outputs], size[inputs])
        for name, length in family.vectors.items():
            weights[f"{at}.{name}"] = (size[length],)
    return weights
