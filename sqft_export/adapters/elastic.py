"""Elastic ranks: which layers share one, what it is at a step, and setting it."""

import random

from torch import nn

from sqft_export.adapters.files import PREFIX
from sqft_export.adapters.linear import CompressedLinear, ElasticLoraLinear, Update, WeightCache
from sqft_export.model.families import Family, adapted, rank_groups
from sqft_export.recipe.schema import Adapt
from sqft_export.run.device import device_memory
from sqft_export.run.host import FLOAT32_ROOM, float32_fits


def draw_ranks(groups: list[str], ranks: tuple[int, ...], seed: int, step: int) -> dict[str, int]:
    """Rank of every group at an optimizer step; a function of its arguments alone.

    Uniform and independent per group, as in NLS. Being stateless it is the same on every process
    and after a resume.
    """
    rng = random.Random(f"{seed}/{step}")
    return {group: rng.choice(ranks) for group in groups}


def train_scales(model: nn.Module) -> None:
    """Give every adapted layer on a grid scales that move."""
    for layer in elastic_layers(model).values():
        layer.train_scales()


def elastic_layers(model: nn.Module) -> dict[str, ElasticLoraLinear]:
    """Name in the base model -> adapted layer."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ElasticLoraLinear)
    }


def groups_of(model: nn.Module, family: Family, config: Adapt) -> dict[str, list[str]]:
    """Group -> layers of a model with adapters that share a rank; none where it is not elastic."""
    _, groups = adapted(family, config.target_modules, config.elastic_groups)
    return rank_groups(elastic_layers(model), family.blocks, groups if config.elastic else ())


def set_ranks(
    layers: dict[str, ElasticLoraLinear], groups: dict[str, list[str]], ranks: dict[str, int]
) -> None:
    """Set the active rank of every group; layers in no group keep the highest."""
    for group, names in groups.items():
        for name in names:
            layers[name].active_rank = ranks[group]


def cache_effective_weights(model: nn.Module) -> bool:
    """Let every compressed Linear keep its effective weight between forwards without gradient.

    The weights are one more set, of at most 4 bytes each.

    :return: False, and nothing is cached, where free memory does not hold them.
    """
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear) and not m.settled]
    weights = sum(layer.weight.numel() for layer in layers)
    free = device_memory(layers[0].weight.device) if layers else None
    fits = float32_fits(weights) if free is None else 4 * weights <= FLOAT32_ROOM * free
    if fits:
        for layer in layers:
            layer.cache = WeightCache()
    return fits


def drop_effective_weights(model: nn.Module) -> None:
    """Free what :func:`cache_effective_weights` let a model keep, and keep no more."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.cache = None


def compressed_layers(model: nn.Module) -> dict[str, tuple[CompressedLinear, Update | None]]:
    """Name in the base model -> the base Linear and the update that enters its weight, if any."""
    found: dict[str, tuple[CompressedLinear, Update | None]] = {}
    adapted = elastic_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            name = name.removeprefix(PREFIX).removesuffix(".base_layer")
            merges = name in adapted and not module.unmerged
            found[name] = (module, adapted[name].update() if merges else None)
    return found
