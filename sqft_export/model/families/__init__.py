"""Model families as data: the paths of decoder blocks and head, and the adapters' Linears."""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqft_export.model.config import ModelConfig, RopeParameters

FULL_ATTENTION = "full_attention"  # entry of ``layer_types``


@dataclass(frozen=True)
class Experts:
    """Routed experts of a family, each with its own Linears.

    linears: last names of an expert's Linears: gate, up, down.
    routers: matrices of a block that stay in floats, as paths in the block: a router has few
        weights, and one wrong choice changes a token's whole computation.
    renamed: part of a stored name -> the same part in the model class.
    batched: paths in a block of stored matrices ``[experts, out, in]``, of gate with up and of
        down. Checkpoints store either these or every expert separately.
    stored_buffers: last names of buffers of the class that checkpoints store, as a router's bias;
        they are read as parameters.
    biases: whether the experts' Linears have biases, which checkpoints store as
        ``<batched>_bias`` ``[experts, out]``.
    alternate: whether the stored matrices are ``[experts, in, out]``, and outputs of gate and up
        alternate. Checkpoints in MXFP4 have ``[experts, out, in]`` and the same order of outputs.
    """

    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    routers: tuple[str, ...] = ("mlp.gate",)
    renamed: dict[str, str] = field(default_factory=dict)
    batched: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    stored_buffers: tuple[str, ...] = ()
    biases: bool = False
    alternate: bool = False


@dataclass(frozen=True)
class Family:
    """One or more Hugging Face ``model_type`` with the same layout.

    blocks: path of the list of decoder blocks.
    embedding, head: paths of the token embedding and the output projection.
    targets: Linears of a block that get an adapter if the recipe names none.
    groups: targets that share a rank, because they have the same input.
    attention: attention implementation of transformers; None for its default. Other
        implementations may lack a feature, such as the capped scores of Gemma 2.
    tied: whether embedding and head are tied if ``config.json`` has no such field.
    builder: class of ONNX Runtime GenAI's model builder; None if it has no class for the family.
    builder_ropes: types of rope scaling that the builder's class computes correctly.
    rope_builders: type of rope scaling -> the builder's class for it, if that is another class.
    genai_type: type in ``genai_config.json``, if the builder's class alone writes another.
    norm_offset: offset that the model class adds to a norm's weight; graphs contain the sum.
    plain_norms: paths in a block of norms without that offset.
    query_scaled: whether the model class scales queries by head_size ** -0.5; graphs contain
        scaled biases.
    learned_positions: whether positions are rows of a table, which limits the length.
    joined: Linear that combines several equal parts -> the builder's names of the parts. A Linear
        with one part has another name in the builder.
    openvino_config: model type whose export config of optimum-intel describes the graph, where it
        has none for this one, or only for other versions of transformers.
    transposed: Linears of a block that the model class stores as ``[in, out]`` (Conv1D of
        transformers). They are Linears ``[out, in]`` everywhere but in Hugging Face folders.
    experts: routed experts; None for a dense family.
    floats: path in a block of a Linear that stays in floats -> why it does.
    buffers: paths in a block of buffers that checkpoints store; they are read as weights.
    tables: token embedding besides ``embedding`` -> config field with the number of columns that
        share a scale. Tables are as large as the decoder, so they are INT8 if it is quantized.
    recurrent: kinds in ``layer_types`` of the layers whose state is no key-value cache.
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
    genai_type: str | None = None
    norm_offset: float = 0.0
    plain_norms: tuple[str, ...] = ()
    query_scaled: bool = False
    learned_positions: bool = False
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    openvino_config: str | None = None
    transposed: tuple[str, ...] = ()
    experts: Experts | None = None
    floats: dict[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    tables: dict[str, str] = field(default_factory=dict)
    recurrent: tuple[str, ...] = ()

    def is_transposed(self, name: str) -> bool:
        """Return whether a weight's matrix is stored as ``[in, out]``."""
        module, _, part = name.rpartition(".")
        inside = module.startswith(f"{self.blocks}.") and part == "weight"
        return inside and module.rpartition(".")[2] in self.transposed

    def is_router(self, name: str) -> bool:
        """Return whether a module of a block is a router, which stays in floats."""
        return self.experts is not None and self._path_in_block(name) in self.experts.routers

    def stays_in_floats(self, name: str) -> bool:
        """Return whether a matrix of a block is neither pruned nor quantized."""
        return self.is_router(name) or self._path_in_block(name) in self.floats

    def offset_of(self, name: str) -> float:
        """Return the offset that the model class adds to the weight of a module; 0 for no norm."""
        plain = "norm" not in name or self._path_in_block(name) in self.plain_norms
        return 0.0 if plain else self.norm_offset

    def _path_in_block(self, name: str) -> str | None:
        """Return the path of a module in its block; None for a module outside the blocks."""
        if not name.startswith(f"{self.blocks}."):
            return None
        return name.removeprefix(f"{self.blocks}.").partition(".")[2]


def _load() -> dict[str, Family]:
    families = {}
    for module in pkgutil.iter_modules(__path__):
        for family in importlib.import_module(f"{__name__}.{module.name}").FAMILIES:
            families.update(dict.fromkeys(family.model_types, family))
    return families


FAMILIES = _load()


def rope_type(config: ModelConfig) -> str:
    """Return the type of rope scaling; if layers differ, that of full attention.

    :param config: fields of transformers' config class, which include its defaults.
    """
    rope: RopeParameters = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return str(rope.get("rope_type") or "default")


def builder_lacks(family: Family, config: ModelConfig) -> str | None:
    """Return why ONNX Runtime GenAI's builder is not used for a model; None if it is used.

    :param config: fields of transformers' config class, which include its defaults.
    """
    if family.builder is None:
        return f"is not used for {', '.join(family.model_types)}"
    if (rope := rope_type(config)) not in family.builder_ropes:
        return f"does not compute rope_type {rope} as the model does"
    return None


def builder_class(family: Family, config: ModelConfig) -> str:
    """Return the class of ONNX Runtime GenAI's builder for a model that the builder supports."""
    assert family.builder
    return family.rope_builders.get(rope_type(config), family.builder)


def adapted(
    family: Family, targets: tuple[str, ...] | None, groups: tuple[tuple[str, ...], ...] | None
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the last names of the Linears with an adapter, and the groups that share a rank.

    :param targets: targets of the recipe; None for the family's.
    :param groups: groups of the recipe; None for the family's.
    """
    targets = family.targets if targets is None else targets
    if groups is None:
        within = (tuple(name for name in group if name in targets) for group in family.groups)
        groups = tuple(group for group in within if group)
    return targets, groups


def rank_groups(
    names: Iterable[str], blocks: str, groups: tuple[tuple[str, ...], ...]
) -> dict[str, list[str]]:
    """Return group -> Linears that share one rank, in block order.

    A group's name is its block and its Linears, such as ``3.q_proj,k_proj``.
    """
    grouped: dict[str, list[str]] = {}
    for name in names:
        block, _, path = name.removeprefix(f"{blocks}.").partition(".")
        for group in groups:
            if path.rsplit(".", 1)[-1] in group:
                grouped.setdefault(f"{block}.{','.join(group)}", []).append(name)
    return grouped
