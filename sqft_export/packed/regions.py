"""Find the tensors of a weight file that a packed file can store sparse.

These are tensors most of whose elements may equal one value, such as the zero point. They are read
from the graph alone, whichever tool wrote it: an OpenVINO IR, an ONNX model with external data, or
a GGUF file, which holds graph and weights in one file.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from sqft_export.errors import UserError, one_line
from sqft_export.kernels.ir import Stored, read_graph
from sqft_export.packed.blocks import BLOCK
from sqft_export.packed.container import MAX_FILE_BYTES, MAX_GROUP_ELEMENTS, ZeroPoints
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.untrusted import MAX_ONNX_BYTES, read_bounded

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

MIN_TENSOR_BYTES = 1024  # smaller tensors are stored raw
# Of ggml's types: bits per code and float16 numbers per block; bits per float.
GGUF_BLOCKS = {"Q4_0": (4, 1), "Q4_1": (4, 2), "Q8_0": (8, 1)}
GGUF_FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
ZERO_POINT_BITS: dict[str, Literal[4, 8]] = {"u4": 4, "i4": 4, "u8": 8, "i8": 8}
IR_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the weight file.

    at, size: its offset and bytes.
    fill: the code that stands for zero, or the location of the zero points of its groups.
    group: consecutive elements that share a zero point; 0 if all do.
    """

    name: str
    at: int
    size: int
    bits: int
    elements: int
    fill: int | ZeroPoints
    group: int


@dataclass(frozen=True)
class StoredBlocks:
    """A tensor in ggml's blocks. floats: float16 numbers per block. row: blocks per row."""

    name: str
    at: int
    size: int
    bits: int
    floats: int
    row: int


Region = StoredTensor | StoredBlocks


class _External(NamedTuple):
    """An initializer of an ONNX model, with its offset and bytes in the weight file."""

    tensor: "TensorProto"
    at: int
    size: int


def _gguf_regions(file: Path) -> Iterator[Region]:
    """Yield the tensors of types that can be stored sparse."""
    for tensor in read_gguf(file).tensors:
        kind, at, size = tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
        name, row = str(tensor.name), int(tensor.shape[0]) // BLOCK
        if kind in GGUF_BLOCKS and row > 0 and size > 0:
            bits, floats = GGUF_BLOCKS[kind]
            yield StoredBlocks(name, at, size, bits, floats, row)
        elif kind in GGUF_FLOATS and size >= MIN_TENSOR_BYTES:
            bits = GGUF_FLOATS[kind]
            yield StoredTensor(name, at, size, bits, size * 8 // bits, 0, 0)


def find_regions(graph: Path, weights: Path) -> list[Region]:
    """Return the tensors in ``weights`` by offset. Of tensors that overlap the first is kept.

    :raises UserError: if the graph is invalid, or refers to bytes outside the weight file.
    """
    found: list[Region]
    if graph == weights:
        found = list(_gguf_regions(weights))
    else:
        found = list(
            _ir_tensors(graph) if graph.suffix == ".xml" else _onnx_tensors(graph, weights.name)
        )
    _check_bounds(graph, found, weights.stat().st_size)
    kept: list[Region] = []
    for region in sorted(found, key=lambda r: (r.at, -r.size)):
        large = isinstance(region, StoredBlocks) or region.size >= MIN_TENSOR_BYTES
        if large and (not kept or region.at >= kept[-1].at + kept[-1].size):
            kept.append(region)
    return _drop_zero_point_regions(kept)


def _drop_zero_point_regions(regions: list[Region]) -> list[Region]:
    """Drop tensors that contain zero points of other tensors: zero points are stored raw."""
    zeros = [r.fill for r in regions if isinstance(r, StoredTensor)]
    places = sorted((z.at, z.at + z.rows * z.row_bytes) for z in zeros if isinstance(z, ZeroPoints))
    starts = [start for start, _ in places]
    ends = [0, *itertools.accumulate((end for _, end in places), max)]
    return [r for r in regions if ends[bisect_left(starts, r.at + r.size)] <= r.at]


def _check_bounds(graph: Path, found: list[Region], size: int) -> None:
    """Check offsets and sizes against the weight file.

    :raises UserError: if a tensor is outside the file, or its size does not match its elements.
    """
    for tensor in found:
        shown = one_line(tensor.name, 80)
        if tensor.at < 0 or tensor.size < 0 or tensor.at + tensor.size > size:
            end = tensor.at + tensor.size
            raise UserError(
                f"{graph}: {shown}: bytes {tensor.at} to {end} are not in a weight file of {size}"
            )
        if isinstance(tensor, StoredBlocks):
            continue
        if tensor.size != -(-tensor.elements * tensor.bits // 8):
            raise UserError(
                f"{graph}: {shown}: {tensor.elements} elements of {tensor.bits} bits are not "
                f"{tensor.size} bytes"
            )
        zeros = tensor.fill
        if isinstance(zeros, ZeroPoints) and zeros.at + zeros.rows * zeros.row_bytes > size:
            raise UserError(f"{graph}: {shown}: its zero points are not in the weight file")


def _ir_tensors(file: Path) -> Iterator[StoredTensor]:
    """Yield the constants of an OpenVINO IR."""
    graph = read_graph(file)
    for constant in graph.constants():
        if constant.kind in IR_BITS:
            yield _ir_tensor(
                graph.layer_name(constant), constant, graph.subtracted_constant(constant)
            )


def _ir_tensor(name: str, data: Stored, zeros: Stored | None) -> StoredTensor:
    bits, elements = IR_BITS[data.kind], data.elements
    fill: int | ZeroPoints = 0
    group = 0
    count = zeros.elements if zeros else 0
    zero_bits = ZERO_POINT_BITS.get(zeros.kind) if zeros else None
    if zeros and zero_bits and count and elements % count == 0 and zero_bits <= bits:
        place = ZeroPoints(at=zeros.at, bits=zero_bits, rows=1, per_row=count, row_bytes=zeros.size)
        if _covers_groups(place, elements // count, elements):
            group, fill = elements // count, place
    return StoredTensor(name, data.at, data.size, bits, elements, fill, group)


def _covers_groups(zeros: ZeroPoints, group: int, elements: int) -> bool:
    """Return whether every group has a zero point, and the format allows the group size."""
    enough = zeros.rows * zeros.per_row * group >= elements
    within = zeros.per_row * zeros.bits <= 8 * zeros.row_bytes
    return enough and within and (group <= MAX_GROUP_ELEMENTS or group >= elements)


def _onnx_tensors(graph: Path, file: str) -> Iterator[StoredTensor]:
    """Yield the initializers of an ONNX model that are in the weight file ``file``."""
    import onnx

    try:
        model = onnx.load_from_string(read_bounded(graph, MAX_ONNX_BYTES))
    except UserError:
        raise
    except Exception as error:  # protobuf has its own exception classes
        raise UserError(f"{graph}: not an ONNX model: {one_line(error)}") from error
    stored: dict[str, _External] = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") == file:
            at, size = (
                _parse_byte_count(graph, tensor.name, where, key) for key in ("offset", "length")
            )
            stored[tensor.name] = _External(tensor, at, size)
    named = set()
    for node in model.graph.node:
        if weight := _quantized_weight_name(node):
            zeros = node.input[3] if len(node.input) > 3 else ""
            found = _quantized_tensor(weight, stored, zeros, node)
            if found and weight not in named:
                named.add(weight)
                yield found
    floats = {
        onnx.TensorProto.FLOAT: 32,
        onnx.TensorProto.FLOAT16: 16,
        onnx.TensorProto.BFLOAT16: 16,
    }
    for name, (tensor, at, size) in stored.items():
        if name not in named and tensor.data_type in floats:
            bits = floats[tensor.data_type]
            yield StoredTensor(name, at, size, bits, size * 8 // bits, 0, 0)


def _parse_byte_count(graph: Path, name: str, where: dict[str, str], key: str) -> int:
    """Return a tensor's offset or length in bytes.

    :raises UserError: if it is not a number.
    """
    found = where.get(key, "0" if key == "offset" else None)
    if found is None or not re.fullmatch(r"-?[0-9]{1,18}", found):
        raise UserError(
            f"{graph}: {one_line(name, 80)}: {key}: found {one_line(repr(found), 80)}; a number of "
            "bytes is expected"
        )
    return int(found)


def _quantized_weight_name(node: "NodeProto") -> str:
    """Return the name of the quantized weight that a node reads; "" for other nodes."""
    place = {"MatMulNBits": 1, "GatherBlockQuantized": 0}.get(node.op_type)
    return node.input[place] if place is not None and len(node.input) > place else ""


def _quantized_tensor(
    name: str, stored: dict[str, _External], zeros: str, node: "NodeProto"
) -> StoredTensor | None:
    """Return a weight of 4 or 8 bits; None for other weights and nodes without a block size."""
    attributes = {a.name: a.i for a in node.attribute}
    bits, block = attributes.get("bits", 4), attributes.get("block_size", 0)
    if name not in stored or bits not in (4, 8) or block < 1:
        return None
    _, at, size = stored[name]
    elements = size * 8 // bits
    if zeros not in stored:
        return StoredTensor(name, at, size, bits, elements, 2 ** (bits - 1), 0)
    tensor, zeros_at, zeros_size = stored[zeros]
    rows = attributes.get("N") or (tensor.dims[0] if tensor.dims else 0)
    if not 0 < rows <= zeros_size < MAX_FILE_BYTES or not 0 <= zeros_at < MAX_FILE_BYTES:
        return StoredTensor(name, at, size, bits, elements, 2 ** (bits - 1), 0)
    place = ZeroPoints(
        at=zeros_at,
        bits=bits,
        rows=rows,
        per_row=max(0, elements // block // rows),
        row_bytes=zeros_size // rows,
    )
    if not _covers_groups(place, block, elements):
        return StoredTensor(name, at, size, bits, elements, 2 ** (bits - 1), 0)
    return StoredTensor(name, at, size, bits, elements, place, block)
