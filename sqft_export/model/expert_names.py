"""Names and matrices of routed experts in the files of a checkpoint."""

from collections.abc import Mapping

from sqft_export.model.families import Experts
from sqft_export.model.tensorfiles import Slice, TensorInfo

# Ends of stored names: biases; codes in MXFP4 and their scales, see ``numerics/mxfp4.py``.
_BIASES, _CODES, _SCALES = "_bias", "_blocks", "_scales"
_CODE_BYTES, _BLOCK_VALUES = 16, 32  # per scale
_BATCHED_AXES = 3  # of the matrices of all experts


def expert_tensors(
    stored: Mapping[str, TensorInfo], blocks: str, experts: Experts
) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with the name and the matrix of every expert.

    :param stored: tensors under their stored names.
    :param blocks: path of the list of decoder blocks.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        scales = stored.get(f"{name.removesuffix(_CODES)}{_SCALES}")
        for old, new in experts.renamed.items():
            name = name.replace(old, new)
        if name.startswith(f"{blocks}."):
            found |= _split(name, info, scales, experts)
        else:
            found[name] = info
    return found


def _split(
    name: str, info: TensorInfo, scales: TensorInfo | None, experts: Experts
) -> dict[str, TensorInfo]:
    """Return the tensors of every expert in a stored tensor; the tensor itself if it has none.

    :param scales: scales of the tensor, if it has codes in MXFP4.
    """
    for path, parts in zip(
        experts.batched, (experts.linears[:2], experts.linears[2:]), strict=True
    ):
        prefix, _, end = name.rpartition(f".{path}")
        if not prefix:
            continue
        prefix = f"{prefix}.{_experts_path(experts)}"
        if not end and len(info.shape) == _BATCHED_AXES:
            return _matrices(info, prefix, parts, experts.alternate)
        if end == _BIASES and experts.biases and len(info.shape) == _BATCHED_AXES - 1:
            return _biases(info, prefix, parts, experts.alternate)
        if end == _CODES and scales is not None and _are_codes(info, scales):
            return _codes(info, scales, prefix, parts)
        if end == _SCALES and experts.alternate:
            return {}  # read with the codes
    return {name: info}


def _experts_path(experts: Experts) -> str:
    """Return the path of the experts in a block."""
    return f"{experts.batched[0].partition('.')[0]}.experts"


def _are_codes(info: TensorInfo, scales: TensorInfo) -> bool:
    """Return whether two tensors have the shapes and dtypes of codes in MXFP4 and their scales."""
    bytes_only = info.dtype == scales.dtype == "U8"
    return bytes_only and info.shape == (*scales.shape, _CODE_BYTES) and len(scales.shape) == 3


def _slice(number: int, part: int, parts: int, rows: int, alternate: bool) -> Slice:
    """Return the rows of one Linear in a matrix of several ones, each of ``rows`` rows."""
    if alternate:
        return Slice(number, part, parts * rows, parts)
    return Slice(number, part * rows, (part + 1) * rows)


def _matrices(
    info: TensorInfo, prefix: str, parts: tuple[str, ...], alternate: bool
) -> dict[str, TensorInfo]:
    """Return the matrices of a batched tensor by the name of their Linear's weight."""
    count, *sizes = info.shape
    outputs, inputs = reversed(sizes) if alternate else sizes
    rows = outputs // len(parts)
    return {
        f"{prefix}.{number}.{part}.weight": TensorInfo(
            *(info.file, info.key, info.dtype, (rows, inputs)),
            _slice(number, index, len(parts), rows, alternate),
            transposed=alternate,
        )
        for number in range(count)
        for index, part in enumerate(parts)
    }


def _biases(
    info: TensorInfo, prefix: str, parts: tuple[str, ...], alternate: bool
) -> dict[str, TensorInfo]:
    """Return the vectors of a batched tensor ``[experts, out]`` by the name of their bias."""
    count, outputs = info.shape
    rows = outputs // len(parts)
    return {
        f"{prefix}.{number}.{part}.bias": TensorInfo(
            *(info.file, info.key, info.dtype, (rows,)),
            _slice(number, index, len(parts), rows, alternate),
        )
        for number in range(count)
        for index, part in enumerate(parts)
    }


def _codes(
    info: TensorInfo, scales: TensorInfo, prefix: str, parts: tuple[str, ...]
) -> dict[str, TensorInfo]:
    """Return the matrices of batched codes ``[experts, out, blocks, 16]`` as bfloat16."""
    count, outputs, blocks, _ = info.shape
    rows, found = outputs // len(parts), dict[str, TensorInfo]()
    for number in range(count):
        for index, part in enumerate(parts):
            cut = _slice(number, index, len(parts), rows, alternate=True)
            shape = (rows, blocks * _BLOCK_VALUES)
            found[f"{prefix}.{number}.{part}.weight"] = TensorInfo(
                *(info.file, info.key, "BF16", shape, cut),
                scales=TensorInfo(scales.file, scales.key, scales.dtype, (rows, blocks), cut),
            )
    return found
