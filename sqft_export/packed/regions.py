"""Which bytes of a deployment's weight file are tensors with a value that most elements have.

Read from the graph alone, whoever wrote it: an OpenVINO IR, an ONNX model with external data, or a
GGUF file, which is both.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError, one_line
from sqft_export.packed.blocks import BLOCK
from sqft_export.packed.container import ZeroPoints

SMALLEST = 1024  # bytes of a tensor worth a look
# ggml's types: bits of a code and float16 numbers of a block; bits of a float.
GGUF_BLOCKS = {"Q4_0": (4, 1), "Q4_1": (4, 2), "Q8_0": (8, 1)}
GGUF_FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
IR_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the weight file.

    fill: the element that stands for zero, or where the zero points of its groups are.
    group: elements that share a zero point, 0 where all do.
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
    """A tensor of ggml's blocks. floats: float16 numbers of a block. row: blocks of a row."""

    name: str
    at: int
    size: int
    bits: int
    floats: int
    row: int


def gguf_regions(file: Path) -> list[StoredTensor | StoredBlocks]:
    """The same of a GGUF file, by offset; tensors of other types stay as they are.

    :raises UserError: if it is none.
    """
    import gguf

    try:
        tensors = sorted(gguf.GGUFReader(file).tensors, key=lambda tensor: tensor.data_offset)
    except Exception as error:  # whatever its reader makes of a stranger's bytes
        raise UserError(f"{file}: not a GGUF file: {one_line(error)}") from error
    found: list[StoredTensor | StoredBlocks] = []
    for tensor in tensors:
        kind, at, size = tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes)
        if kind in GGUF_BLOCKS:
            bits, floats = GGUF_BLOCKS[kind]
            row = int(tensor.shape[0]) // BLOCK
            found.append(StoredBlocks(tensor.name, at, size, bits, floats, row))
        elif kind in GGUF_FLOATS and size >= SMALLEST:
            bits = GGUF_FLOATS[kind]
            found.append(StoredTensor(tensor.name, at, size, bits, size * 8 // bits, 0, 0))
    return found


def regions_of(graph: Path, weights: Path) -> list[StoredTensor]:
    """Tensors in ``weights`` by offset, none over another; the first that claims a place counts.

    :raises UserError: if the graph is none, or speaks of bytes that the file has not.
    """
    found = list(_of_ir(graph) if graph.suffix == ".xml" else _of_onnx(graph, weights.name))
    _check_bounds(graph, found, weights.stat().st_size)
    kept: list[StoredTensor] = []
    for region in sorted(found, key=lambda r: (r.at, -r.size)):
        if region.size >= SMALLEST and (not kept or region.at >= kept[-1].at + kept[-1].size):
            kept.append(region)
    zeros = [r.fill for r in kept if isinstance(r.fill, ZeroPoints)]
    places = [(z.at, z.at + z.rows * z.row_bytes) for z in zeros]
    return [r for r in kept if not any(a < r.at + r.size and r.at < b for a, b in places)]


def _check_bounds(graph: Path, found: list[StoredTensor], size: int) -> None:
    """:raises UserError: naming a tensor that the graph puts outside the file, or whose size is not
    that of its elements."""
    for tensor in found:
        if tensor.at < 0 or tensor.size < 0 or tensor.at + tensor.size > size:
            end = tensor.at + tensor.size
            raise UserError(
                f"{graph}: {tensor.name}: bytes {tensor.at} to {end} are not in a weight file of "
                f"{size}"
            )
        if tensor.size != -(-tensor.elements * tensor.bits // 8):
            raise UserError(
                f"{graph}: {tensor.name}: {tensor.elements} elements of {tensor.bits} bits are not "
                f"{tensor.size} bytes"
            )
        zeros = tensor.fill
        if isinstance(zeros, ZeroPoints) and zeros.at + zeros.rows * zeros.row_bytes > size:
            raise UserError(f"{graph}: {tensor.name}: its zero points are not in the weight file")


def _of_ir(graph: Path) -> Iterator[StoredTensor]:
    try:
        root = ElementTree.parse(graph).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{graph}: not an IR: {error}") from error
    layers = {layer.get("id"): layer for layer in root.iter("layer")}
    sources: dict[tuple[str | None, str | None], Any] = {}
    targets: dict[str | None, list[tuple[Any, str | None]]] = {}
    for edge in root.iter("edge"):
        source, target = layers[edge.get("from-layer")], layers[edge.get("to-layer")]
        sources[edge.get("to-layer"), edge.get("to-port")] = source
        targets.setdefault(edge.get("from-layer"), []).append((target, edge.get("to-port")))
    for layer in layers.values():
        if layer.get("type") != "Const":
            continue
        data = _constant(layer)
        if data is None or data["bits"] is None:
            continue
        zeros = _subtracted(layer, sources, targets)
        yield _region(layer.get("name") or "", data, zeros)


def _constant(layer: Any) -> dict[str, Any] | None:
    data = layer.find("data")
    if data is None or data.get("offset") is None:
        return None
    shape = [int(size) for size in (data.get("shape") or "").split(",") if size.strip()]
    return {
        "at": int(data.get("offset")),
        "size": int(data.get("size")),
        "bits": IR_BITS.get(data.get("element_type")),
        "elements": prod(shape),
    }


def _subtracted(layer: Any, sources: Any, targets: Any) -> dict[str, Any] | None:
    """The constant that is subtracted from this one, both converted first."""
    converts = [t for t, _ in targets.get(layer.get("id"), []) if t.get("type") == "Convert"]
    readers = [found for convert in converts for found in targets.get(convert.get("id"), [])]
    for subtract, port in readers:
        if subtract.get("type") == "Subtract" and port == "0":
            other = sources.get((subtract.get("id"), "1"))
            if other is not None and other.get("type") == "Convert":
                other = sources.get((other.get("id"), "0"))
            if other is not None and other.get("type") == "Const":
                return _constant(other)
    return None


def _region(name: str, data: dict[str, Any], zeros: dict[str, Any] | None) -> StoredTensor:
    fill: int | ZeroPoints = 0
    group = 0
    count = zeros["elements"] if zeros else 0
    if zeros and count and zeros["bits"] in (4, 8) and data["elements"] % count == 0:
        group = data["elements"] // count
        fill = ZeroPoints(
            at=zeros["at"], bits=zeros["bits"], rows=1, per_row=count, row_bytes=zeros["size"]
        )
    return StoredTensor(name, data["at"], data["size"], data["bits"], data["elements"], fill, group)


def _of_onnx(graph: Path, file: str) -> Iterator[StoredTensor]:
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise UserError(f"{graph}: not an ONNX model: {error}") from error
    stored = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") == file:
            stored[tensor.name] = (tensor, int(where.get("offset", 0)), int(where["length"]))
    named = set()
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            gather = node.op_type == "GatherBlockQuantized"
            weight = node.input[0 if gather else 1]
            if weight in stored and weight not in named:
                named.add(weight)
                zeros = node.input[3] if len(node.input) > 3 else ""
                yield _quantized(weight, stored, zeros, node)
    floats = {
        onnx.TensorProto.FLOAT: 32,
        onnx.TensorProto.FLOAT16: 16,
        onnx.TensorProto.BFLOAT16: 16,
    }
    for name, (tensor, at, size) in stored.items():
        if name not in named and tensor.data_type in floats:
            bits = floats[tensor.data_type]
            yield StoredTensor(name, at, size, bits, size * 8 // bits, 0, 0)


def _quantized(name: str, stored: dict[str, Any], zeros: str, node: Any) -> StoredTensor:
    attributes = {a.name: a.i for a in node.attribute}
    bits, block = attributes.get("bits", 4), attributes["block_size"]
    _, at, size = stored[name]
    elements = size * 8 // bits
    if zeros not in stored:
        return StoredTensor(name, at, size, bits, elements, 2 ** (bits - 1), 0)
    tensor, zeros_at, zeros_size = stored[zeros]
    rows = attributes.get("N") or tensor.dims[0]
    place = ZeroPoints(
        at=zeros_at,
        bits=bits,
        rows=rows,
        per_row=elements // block // rows,
        row_bytes=zeros_size // rows,
    )
    return StoredTensor(name, at, size, bits, elements, place, block)
