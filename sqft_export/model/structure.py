"""Derive the family of a model from its modules: the list of blocks, and the Linears in each.

A block that this package can't compress is refused with the reason, before any work: a recurrent
block keeps a state that is no key-value cache, and an expert sees only a part of the tokens.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from sqft_export.errors import UserError
from sqft_export.model.families import FAMILIES, Family

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Last names of parameters and modules that only recurrent layers have: state-space models, gated
# delta rules, RWKV, RG-LRU, xLSTM.
_RECURRENT = {
    *("A_log", "dt_bias", "dt_proj", "in_proj_qkvz", "in_proj_ba", "time_decay", "rg_lru"),
    *("mlstm_layer", "conv1d", "conv_1d"),
}
_MATRIX = 2  # dimensions; a parameter with more holds the matrices of several experts


def family_of_model(model: "PreTrainedModel", model_type: str, where: str) -> Family:
    """Derive a family from a model; every Linear of every block gets an adapter.

    :param where: name of the config in messages.
    :raises UserError: if the model has no list of blocks, no causal self-attention, or blocks that
        can't be compressed.
    """
    paths = _find_blocks(model)
    if len(paths) != 1:
        lists = (
            f"several lists of Linears, {' and '.join(paths)}, in place of one" if paths else "no"
        )
        raise UserError(
            f"{where}: model_type: {model_type} has {lists} list of blocks with Linears in them; "
            f"tested are {', '.join(sorted(FAMILIES))}"
        )
    [path] = paths
    embedding, head = _find_ends(model, model_type, where)
    check_blocks(model, path, where)
    targets = tuple(
        dict.fromkeys(_last(name) for block in _blocks(model, path) for name in linears_of(block))
    )
    return Family(
        model_types=(model_type,),
        blocks=path,
        embedding=embedding,
        head=head,
        targets=targets,
        groups=tuple((target,) for target in targets),
        tied=bool(model.config.tie_word_embeddings),
    )


def check_blocks(model: "PreTrainedModel", path: str, where: str) -> None:
    """Check that every block can be compressed.

    :param path: path of the list of blocks.
    :raises UserError: naming the first part of a block that can't be.
    """
    for index, block in enumerate(_blocks(model, path)):
        if reason := find_unsupported_part(block):
            model_type = model.config.model_type
            raise UserError(f"{where}: model_type: {model_type}: {path}.{index}.{reason}")


def list_linears(model: "nn.Module", path: str) -> list[str]:
    """Return one line per run of blocks with the same Linears, such as ``blocks 0-2: q_proj``.

    :param path: path of the list of blocks.
    """
    names = [tuple(linears_of(block)) for block in _blocks(model, path)]
    lines = []
    for linears, run in groupby(enumerate(names), key=lambda item: item[1]):
        indices = [index for index, _ in run]
        first, last = indices[0], indices[-1]
        blocks = f"block {first}" if first == last else f"blocks {first}-{last}"
        lines.append(f"{blocks}: {', '.join(linears) or 'none'}")
    return lines


def linears_of(module: "nn.Module") -> list[str]:
    """Return the names of all Linears in a module."""
    from torch import nn

    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def find_unsupported_part(block: "nn.Module") -> str | None:
    """Return the name of a part of a block that can't be compressed, and why; None if none."""
    for name, part in block.named_modules():
        if reason := _reason_of(_last(name), part):
            return f"{name} {reason}"
    weights = dict(block.named_parameters())
    for name in block.state_dict():
        if name not in weights:
            return f"{name} is a buffer that checkpoints store; only weights are read"
    return None


def _reason_of(name: str, part: "nn.Module") -> str | None:
    """Return why a module of a block can't be compressed; None if it can."""
    from torch import nn

    weights = dict(part.named_parameters(recurse=False))
    if isinstance(part, nn.Conv1d) or _RECURRENT & {name, *weights}:
        return "belongs to a recurrent block, whose state is no key-value cache"
    matrices = [key for key, weight in weights.items() if weight.dim() > 1]
    if _is_list_of_experts(part) or any(weights[key].dim() > _MATRIX for key in matrices):
        return "is a mixture of experts; an expert sees only a part of the calibration tokens"
    if isinstance(part, nn.Linear) and type(part) is not nn.Linear:
        return f"computes more than a Linear ({type(part).__name__})"
    if matrices and not isinstance(part, nn.Linear):
        return f"has a matrix that is no Linear ({type(part).__name__})"
    return None


def _is_list_of_experts(part: "nn.Module") -> bool:
    """Return whether a module of a block is a list of parts with Linears."""
    from torch import nn

    parts = list(part) if isinstance(part, nn.ModuleList) else []
    return len(parts) > 1 and all(map(linears_of, parts))


def _find_blocks(model: "nn.Module") -> list[str]:
    """Return the paths of the longest lists of modules with Linears; blocks are one such list."""
    from torch import nn

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and linears_of(module)
    ]
    longest = max((len(module) for _, module in lists), default=0)
    paths = [name for name, module in lists if len(module) == longest]
    return [path for path in paths if not path.startswith(tuple(f"{one}." for one in paths))]


def _find_ends(model: "PreTrainedModel", model_type: str, where: str) -> tuple[str, str]:
    """Return the paths of the token embedding and the output projection.

    :raises UserError: if one of them is missing or is not one matrix.
    """
    names = {id(part): name for name, part in model.named_modules()}
    found = []
    for what, end in (
        ("token embedding", model.get_input_embeddings()),
        ("output projection", model.get_output_embeddings()),
    ):
        if end is None or id(end) not in names or getattr(end, "weight", None) is None:
            raise UserError(
                f"{where}: model_type: {model_type} has no {what} of one matrix; tested are "
                f"{', '.join(sorted(FAMILIES))}"
            )
        found.append(names[id(end)])
    return found[0], found[1]


def _blocks(model: "nn.Module", path: str) -> "Iterator[nn.Module]":
    from torch import nn

    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    yield from blocks


def _last(name: str) -> str:
    return name.rpartition(".")[2]
