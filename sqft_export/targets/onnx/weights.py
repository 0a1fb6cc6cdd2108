"""Weights of an ONNX deployment: names, the layout of MatMulNBits, and the data file.

Weights are appended to ``model.onnx.data`` one layer at a time, to save memory:

    <parts>.B            uint8 [out, blocks, block_size * bits / 8]   low nibble first
    <parts>.scales       float32 [out, blocks]                        float16 scales as float32
    <parts>.zero_points  uint8 [out, ceil(blocks * bits / 8)]         omitted if symmetric

``parts`` names the Linears whose rows are concatenated, such as ``q_proj,k_proj,v_proj``. A range
of rows is written ``gate_up_proj[0:160]``; it is used if one Linear feeds several products.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.memory import release_memory
from sqft_export.numerics.codes import QuantizedWeight, from_arrays, join_rows, round_up
from sqft_export.numerics.nibbles import pack_nibbles, unpack_nibbles
from sqft_export.packed.container import PackedFile
from sqft_export.packed.folders import packed_file
from sqft_export.targets.folder import graph_and_weights
from sqft_export.targets.genai_config import DecoderConfig

# Accuracy level of int8 activations, the builder's default on the CPU.
DEPLOYED_ACCURACY = 4
BLOCK_SIZES = (16, 32, 64, 128, 256)  # sizes with fast MatMulNBits kernels
INLINE_BYTES = 1024  # smaller tensors stay in the graph file
DATA_ALIGNMENT = 4096  # bytes; alignment of tensors in the data file, so that they can be mapped


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a Linear; all rows if ``stop`` is None."""

    linear: str
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return self.linear if self.stop is None else f"{self.linear}[{self.start}:{self.stop}]"

    @classmethod
    def parse(cls, text: str) -> "Rows":
        """Parse the result of ``str``."""
        found = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", text)
        return cls(found[1], int(found[2]), int(found[3])) if found else cls(text)

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.start, self.stop)


def parts_name(parts: list[Rows]) -> str:
    """Return the prefix of the tensor names of concatenated parts."""
    return ",".join(map(str, parts))


class ExternalData:
    """Write initializers to ``model.onnx.data``; small ones stay in the graph."""

    def __init__(self, file: Path):
        self.file, self.stream = file, file.open("wb")

    def __enter__(self) -> "ExternalData":
        return self

    def __exit__(self, *failure: object) -> None:
        self.stream.close()

    def add(self, graph: onnx.GraphProto, name: str, array: np.ndarray) -> str:
        """Store an array as an initializer of ``graph`` and return its name."""
        array = np.ascontiguousarray(array)
        if array.nbytes < INLINE_BYTES:
            graph.initializer.append(numpy_helper.from_array(array, name))
            return name
        offset = round_up(self.stream.tell(), DATA_ALIGNMENT)
        self.stream.seek(offset)
        array.tofile(self.stream)
        self.stream.flush()
        release_memory()
        tensor = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        where = {"location": self.file.name, "offset": offset, "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
        return name


class Weights:
    """Read the matrices of a merged model, one at a time."""

    def __init__(self, merged: Path):
        from sqft_export.model.storage import quantized_names, read_grid, read_quantized

        self.checkpoint = Checkpoint(merged)
        self.quantized = set(quantized_names(self.checkpoint))
        self.head = self.checkpoint.family.head
        if self.checkpoint.stored_name(self.head) in self.quantized:
            self.quantized.add(self.head)
        # Cache the last one: consecutive products may use rows of the same Linear.
        self._read = lru_cache(maxsize=1)(partial(read_quantized, self.checkpoint))
        self._grid = partial(read_grid, self.checkpoint)

    @cached_property
    def linears(self) -> set[str]:
        """Names of the modules with a matrix: decoder Linears, embeddings, head."""
        shapes = self.checkpoint.shapes.items()
        found = {n.removesuffix(".weight") for n, shape in shapes if len(shape) == 2}
        return found | {self.head}

    def quantized_rows(self, part: Rows) -> QuantizedWeight[np.ndarray]:
        """Return some rows of a quantized weight."""
        weight: QuantizedWeight = self._read(self.checkpoint.stored_name(part.linear))
        return weight.rows(part.rows).numpy()

    def floats(self, parts: list[Rows]) -> np.ndarray:
        """Return the concatenated rows of the parts, float32 ``[out, in]``."""
        found = []
        for part in parts:
            name = self.checkpoint.stored_name(part.linear)
            found.append(self.checkpoint.tensor(f"{name}.weight").float().numpy()[part.rows])
        return np.concatenate(found) if len(found) > 1 else found[0]

    def kind(self, part: Rows) -> tuple[int, int, bool]:
        """Return bits, group size and symmetry. All parts of a MatMulNBits must share them."""
        grid = self._grid(self.checkpoint.stored_name(part.linear)).rows(part.rows)
        return grid.bits, grid.group_size, grid.symmetric


def block_size(inputs: int, group_size: int) -> int:
    """Return the block size of MatMulNBits for a group size.

    It is the group size. If a row is one group, it is the largest supported size that divides the
    row, and every block repeats the scale. If none divides it, the row is one block, padded to the
    next power of two.
    """
    if group_size < inputs:
        return group_size
    divisors = [size for size in BLOCK_SIZES if inputs % size == 0]
    return max(divisors, default=max(16, 1 << (inputs - 1).bit_length()))


def _pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack 4-bit values into bytes, low nibble first; return 8-bit values unchanged."""
    return values if bits == 8 else pack_nibbles(values)


def block_arrays(
    layers: list[QuantizedWeight[np.ndarray]],
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Return the tensors and attributes of one MatMulNBits for Linears that share their input."""
    whole = join_rows(layers)
    outputs, inputs = whole.codes.shape
    bits, size = whole.bits, block_size(inputs, whole.grid.group_size)
    blocks = -(-inputs // size)
    split = whole.in_groups(blocks)
    codes, scales, zeros = whole.codes, split.scale.astype(np.float32), split.zero_point
    if blocks * size != inputs:  # pad a short last block with codes that mean zero
        padded = np.repeat(zeros, size, axis=1)
        padded[:, :inputs] = codes
        codes = padded
    arrays = {"B": _pack_rows(codes.reshape(outputs, blocks, size), bits), "scales": scales}
    if not whole.grid.symmetric:
        arrays["zero_points"] = _pack_rows(zeros, bits)
    return arrays, {"K": inputs, "N": outputs, "bits": bits, "block_size": size}


def matmul_nbits(
    data: ExternalData,
    graph: onnx.GraphProto,
    weights: Weights,
    parts: list[Rows],
    x: str,
    output: str,
    name: str,
) -> onnx.NodeProto:
    """Return a MatMulNBits node of ``x`` and the concatenated rows of some parts."""
    arrays, sizes = block_arrays([weights.quantized_rows(part) for part in parts])
    prefix = parts_name(parts)
    names = [data.add(graph, f"{prefix}.{key}", array) for key, array in arrays.items()]
    return helper.make_node(
        "MatMulNBits",
        [x, *names],
        [output],
        name=name,
        domain="com.microsoft",
        accuracy_level=DEPLOYED_ACCURACY,
        **sizes,
    )


def quantize_gather(
    data: ExternalData,
    graph: onnx.GraphProto,
    weights: Weights,
    node: onnx.NodeProto,
    embedding: str,
    head: str | None,
) -> None:
    """Replace the Gather of an embedding by GatherBlockQuantized, which reads codes.

    :param head: module whose MatMulNBits already stores the same codes, or None.
    """
    weight = weights.quantized_rows(Rows(embedding))
    rows, columns = weight.codes.shape
    size = block_size(columns, weight.grid.group_size)
    split = weight.in_groups(-(-columns // size))
    if head and columns % size == 0:
        shape = data.add(graph, f"{embedding}.shape", np.array([rows, columns], np.int64))
        reshape = helper.make_node("Reshape", [f"{head}.B", shape], [f"{embedding}.B"])
        graph.node.insert(0, reshape)
    else:
        data.add(graph, f"{embedding}.B", weight.codes)
    data.add(graph, f"{embedding}.scales", split.scale.astype(np.float32))
    data.add(graph, f"{embedding}.zero_points", split.zero_point)
    new = helper.make_node(
        "GatherBlockQuantized",
        [f"{embedding}.B", node.input[1], f"{embedding}.scales", f"{embedding}.zero_points"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        bits=weight.bits,
        gather_axis=0,
        quantize_axis=1,
        block_size=size,
    )
    node.CopyFrom(new)


def product_parts(node: onnx.NodeProto) -> list[Rows]:
    """Return the rows that a node multiplies with; empty if it is not a product with weights."""
    if node.op_type not in ("MatMulNBits", "MatMul"):
        return []
    stem, _, key = node.input[1].rpartition(".")
    return list(map(Rows.parse, stem.split(","))) if key in ("B", "weight") else []


def set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace all nodes of a graph."""
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(fresh)


def read_quantized_weights(
    model: onnx.ModelProto, folder: Path
) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, one at a time.

    Codes are uint8 ``[out, in]``, scales float32 and zero points uint8 ``[out, groups]``.

    :param folder: the deployment.
    """
    array = _reader(model, folder)
    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":
            yield node.input[0].removesuffix(".B"), _read_gather(model, node, array)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    wanted = Counter(part.linear for node in products for part in product_parts(node))
    pieces: dict[str, dict[int, QuantizedWeight[np.ndarray]]] = {}
    for node in products:
        for part, rows in _split_rows(node, _read_product(node, array), model):
            pieces.setdefault(part.linear, {})[part.start] = rows
            if len(pieces[part.linear]) == wanted[part.linear]:
                found = pieces.pop(part.linear)
                yield part.linear, join_rows(found[start] for start in sorted(found))


def _reader(model: onnx.ModelProto, folder: Path) -> Callable[[str], np.ndarray]:
    """Return a function that reads an initializer by name, from the graph or the data file."""
    tensors = {t.name: t for t in model.graph.initializer}
    place = graph_and_weights(folder)[0].parent
    packed, content = packed_file(folder), np.empty(0, np.uint8)
    if packed is not None:
        with PackedFile(packed) as opened:
            content = opened.inflate_checked()

    def array(name: str) -> np.ndarray:
        copy = onnx.TensorProto()  # reading external data stores it in the proto, so use a copy
        copy.CopyFrom(tensors[name])
        where = {entry.key: entry.value for entry in copy.external_data}
        if not len(content) or "offset" not in where:
            return numpy_helper.to_array(copy, str(place))
        start = int(where["offset"])
        stored = content[start : start + int(where["length"])]
        kind = helper.tensor_dtype_to_np_dtype(copy.data_type)
        return stored.view(kind).reshape(tuple(copy.dims))

    return array


def read_float_weights(model: onnx.ModelProto, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield module and matrix ``[out, in]``, then name and values of other float initializers."""
    array = _reader(model, folder)
    matrices = set()
    for node in model.graph.node:
        parts = product_parts(node) if node.op_type == "MatMul" else []
        if parts:
            matrices.add(node.input[1])
            whole, row = array(node.input[1]).T, 0
            for part in parts:
                count = _rows_of(part, parts, len(whole), model)
                yield part.linear, whole[row : row + count]
                row += count
    for tensor in model.graph.initializer:
        name, end = tensor.name, ".weight"
        scale = name.endswith((".scales", ".B", ".zero_points"))
        if tensor.data_type != onnx.TensorProto.FLOAT or name in matrices or scale:
            continue
        matrix = name.endswith(end) and len(tensor.dims) == 2
        yield name.removesuffix(end) if matrix else name, array(name)


def _split_rows(
    node: onnx.NodeProto, joined: QuantizedWeight[np.ndarray], model: onnx.ModelProto
) -> Iterator[tuple[Rows, QuantizedWeight[np.ndarray]]]:
    """Yield each part of a product with its rows."""
    row, parts = 0, product_parts(node)
    for part in parts:
        count = _rows_of(part, parts, len(joined.codes), model)
        yield part, joined.rows(slice(row, row + count))
        row += count


def _rows_of(part: Rows, parts: list[Rows], rows: int, model: onnx.ModelProto) -> int:
    """Return the row count of a part. The key cache of its layer gives the rows of k and v.

    The rest are rows of q, which may also have a gate per column.

    :param rows: rows of all parts.
    """
    if len(parts) == 1:
        return rows
    layer = next(int(piece) for piece in part.linear.split(".") if piece.isdigit())
    cache = next(i for i in model.graph.input if i.name == f"past_key_values.{layer}.key")
    sizes = [dim.dim_value for dim in cache.type.tensor_type.shape.dim]
    keys = sizes[1] * sizes[3]
    return rows - 2 * keys if part == parts[0] else keys


def _read_gather(
    model: onnx.ModelProto, node: onnx.NodeProto, array: Callable[[str], np.ndarray]
) -> QuantizedWeight[np.ndarray]:
    """Read the quantized embedding, whose codes may be those of the head."""
    scale, zero = (array(node.input[i]) for i in (2, 3))
    shared = [n.input[0] for n in model.graph.node if list(n.output) == [node.input[0]]]
    codes = array((shared or node.input)[0])
    bits = next(a.i for a in node.attribute if a.name == "bits")
    return from_arrays(codes.reshape(len(scale), -1), scale, zero, bits)


def _read_product(
    node: onnx.NodeProto, array: Callable[[str], np.ndarray]
) -> QuantizedWeight[np.ndarray]:
    """Read the quantized weight of a MatMulNBits."""
    size = {a.name: a.i for a in node.attribute}
    scales = array(node.input[2]).reshape(size["N"], -1)
    stored = array(node.input[1])
    is_4_bit = size["bits"] == 4
    codes = unpack_nibbles(stored, size["block_size"]) if is_4_bit else stored
    codes = codes.reshape(size["N"], -1)[:, : size["K"]]
    if len(node.input) > 3 and node.input[3]:
        stored = array(node.input[3]).reshape(size["N"], -1)
        zeros = unpack_nibbles(stored, scales.shape[1]) if is_4_bit else stored
    else:
        zeros = np.full(scales.shape, 2 ** (size["bits"] - 1), np.uint8)
    return from_arrays(codes, scales, zeros, size["bits"])


def head_rows(decoder: DecoderConfig) -> list[int]:
    """Return the number of rows of q, k and v."""
    keys = decoder["num_key_value_heads"] * decoder["head_size"]
    return [decoder["num_attention_heads"] * decoder["head_size"], keys, keys]
