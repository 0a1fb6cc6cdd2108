"""Names and matrices of routed experts in the files of a checkpoint."""

from collections.abc import Mapping

from sqft_export.model.families import Experts
from sqft_export.model.tensorfiles import Slice, TensorInfo


def expert_tensors(
    stored: Mapping[str, TensorInfo], blocks: str, experts: Experts
) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with the name and the matrix of every expert.

    :param stored: tensors under their stored names.
    :param blocks: path of the list of decoder blocks.
    """
    found: dict[str, TensorInfo] = {}
    both, down = (f".{path}" for path in experts.batched)
    names = experts.linears
    for name, info in stored.items():
        for old, new in experts.renamed.items():
            name = name.replace(old, new)
        if name.startswith(f"{blocks}.") and name.endswith((both, down)) and len(info.shape) == 3:
            end = both if name.endswith(both) else down
            parts = names[:2] if end == both else names[2:]
            prefix = f"{name.removesuffix(end)}.{_experts_path(experts)}"
            found |= dict(_matrices(info, prefix, parts))
        else:
            found[name] = info
    return found


def _experts_path(experts: Experts) -> str:
    """Return the path of the experts in a block."""
    return f"{experts.batched[0].partition('.')[0]}.experts"


def _matrices(
    info: TensorInfo, prefix: str, parts: tuple[str, ...]
) -> list[tuple[str, TensorInfo]]:
    """Return the matrices of a batched tensor by the name of their Linear."""
    count, outputs, inputs = info.shape
    rows = outputs // len(parts)
    return [
        (
            f"{prefix}.{number}.{part}.weight",
            TensorInfo(
                info.file,
                info.key,
                info.dtype,
                (rows, inputs),
                Slice(number, index * rows, (index + 1) * rows),
            ),
        )
        for number in range(count)
        for index, part in enumerate(parts)
    ]
