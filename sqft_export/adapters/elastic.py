"""Elastic ranks: group the layers that share a rank, draw ranks in training, and set them."""

import random

from torch import nn

from sqft_export.adapters.files import PREFIX
from sqft_export.adapters.linear import CompressedLinear, ElasticLoraLinear, Update, WeightCache
from sqft_export.machine.device import device_memory
from sqft_export.machine.host import FLOAT32_MEMORY_SHARE, float32_fits
from sqft_export.model.families import Family, adapted, rank_groups
from sqft_export.recipe.schema import Adapt


def draw_ranks(groups: list[str], ranks: tuple[int, ...], seed: int, step: int) -> dict[str, int]:
    """Draw the rank of every group for one optimizer step.

    Ranks are uniform and independent per group, as in NLS. The result depends only on the
    arguments, so every process draws the same ranks, also after a resume. Example::

        draw_ranks(["attention", "mlp"], (8, 16), seed=3, step=0) -> {"attention": 16, "mlp": 8}
    """
    rng = random.Random(f"{seed}/{step}")
    return {group: rng.choice(ranks) for group in groups}


def train_scales(model: nn.Module) -> None:
    """Make the scales of every adapted layer trainable."""
    for layer in elastic_layers(model).values():
        layer.train_scales()


def elastic_layers(model: nn.Module) -> dict[str, ElasticLoraLinear]:
    """Return name in the base model -> adapted layer."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ElasticLoraLinear)
    }


def groups_of(model: nn.Module, family: Family, config: Adapt) -> dict[str, list[str]]:
    """Return group -> names of the layers that share a rank; empty for a fixed rank."""
    _, groups = adapted(family, config.target_modules, config.elastic_groups)
    return rank_groups(elastic_layers(model), family.blocks, groups if config.elastic else ())


def set_ranks(
    layers: dict[str, ElasticLoraLinear], groups: dict[str, list[str]], ranks: dict[str, int]
) -> None:
    """Set the active rank of every group; layers in no group keep their rank."""
    for group, names in groups.items():
        for name in names:
            layers[name].active_rank = ranks[group]


def cache_effective_weights(model: nn.Module) -> bool:
    """Let every compressed Linear cache its effective weight for forwards without gradient.

    The cache needs up to 4 bytes per weight.

    :return: False if it does not fit into free memory; nothing is cached then.
    """
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    layers = [layer for layer in layers if not layer.holds_effective]
    weights = sum(layer.weight.numel() for layer in layers)
    free = device_memory(layers[0].weight.device) if layers else None
    fits = float32_fits(weights) if free is None else 4 * weights <= FLOAT32_MEMORY_SHARE * free
    if fits:
        for layer in layers:
            layer.cache = WeightCache()
    return fits


def drop_effective_weights(model: nn.Module) -> None:
    """Free the caches of :func:`cache_effective_weights` and stop caching."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.cache = None


def compressed_layers(model: nn.Module) -> dict[str, tuple[CompressedLinear, Update | None]]:
    """Return name in the base model -> its Linear, and the update to be merged into it or None."""
    found: dict[str, tuple[CompressedLinear, Update | None]] = {}
    adapted = elastic_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            name = name.removeprefix(PREFIX).removesuffix(".base_layer")
            merges = name in adapted and not module.unmerged
            found[name] = (module, adapted[name].update() if merges else None)
    return found
