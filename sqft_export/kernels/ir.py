"""Read an OpenVINO IR, find its compressed products, and replace them by ``SqftMatMul``.

An embedding that shares its matrix with the head is stored once: ``SqftGather`` looks up rows of
the head's matrix.

The IR is read and written as XML, so no weights are needed in memory. A product is the pattern that
NNCF, optimum-intel and this package write for compressed weights:

    Const(i4|u4|i8|u8) -> Convert -> [Subtract] -> Multiply(float16) -> [Reshape] -> [Convert]
        -> MatMul(transpose_b)
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from sqft_export.errors import UserError, one_line
from sqft_export.kernels.library import FORMATS, Matrix, read_header
from sqft_export.numerics.nibbles import unpack_nibbles
from sqft_export.untrusted import MAX_IR_BYTES, read_bounded

OPERATOR, LOOKUP = "SqftMatMul", "SqftGather"
OPERATOR_SET = "sqft_export"
CODE_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}
Read = Callable[[int, int], np.ndarray]  # returns uint8 of the weight file at an offset and size
IR_NUMBER = re.compile(r"[0-9]{1,15}")  # offsets, sizes and ids
MAX_DEPTH = 64  # levels of XML
MAX_AXES = 32
MAX_STEPS = 16  # layers between a constant and its product
MAX_READERS = 64  # per constant; one with more is not part of a product


@dataclass(frozen=True)
class Stored:
    """A Const: its layer id, and the location of its bytes in the weight file."""

    layer: str
    name: str
    kind: str
    shape: tuple[int, ...]
    at: int
    size: int

    @property
    def elements(self) -> int:
        """The number of elements of the shape."""
        return prod(self.shape)


@dataclass(frozen=True)
class Product:
    """A MatMul with compressed weights.

    between: layers between the constants and the MatMul, which the new operator replaces.
    lookups: Gathers that read rows of the same weights: an embedding tied to the head.
    shared: whether other layers read the weights too; the constants are then not removed.
    """

    matmul: str
    name: str
    codes: Stored
    scale: Stored
    zero: Stored | None
    rows: int
    inputs: int
    between: tuple[str, ...]
    lookups: tuple[str, ...]
    shared: bool

    @property
    def bits(self) -> int:
        """Bits per code."""
        return CODE_BITS[self.codes.kind]

    @property
    def module(self) -> str:
        """The name without ".weight"."""
        return self.name.removesuffix(".weight")


class Graph:
    """An OpenVINO IR, parsed and checked.

    :raises UserError: if ``text`` is not an IR.
    """

    def __init__(self, text: bytes, name: str):
        self.name, self.is_specialized = name, is_specialized(text)
        self.layers: dict[str, Element] = {}
        self.sources: dict[tuple[str, str], str] = {}
        self.readers: dict[str, list[str]] = {}
        self._edges: dict[str, list[Element]] = {}  # by layer: edges from it and to it
        try:
            self.root = _parse_xml(text)
            self._read_layers()
            self._read_edges()
            self._check_order()
            # All numbers are checked here, so that later code can rely on them.
            self._constants = {key: self._read_constant(key) for key in self.layers}
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise UserError(f"{name}: not an IR: {one_line(error)}") from error

    def _read_layers(self) -> None:
        for layer in self.root.iterfind("layers/layer"):
            key = layer.attrib["id"]
            _parse_number(key, "a layer's id")
            if key in self.layers:
                raise ValueError(f"layer {key} occurs twice")
            self.layers[key] = layer
        self._next_id = 1 + max(map(int, self.layers), default=0)
        self._removed: set[Element] = set()  # layers and edges that :meth:`text` omits
        # Layers inside a loop or a condition have separate ids.
        self.has_bodies = sum(1 for _ in self.root.iter("layer")) > len(self.layers)

    def _read_edges(self) -> None:
        for edge in self.root.iterfind("edges/edge"):
            source, target = edge.attrib["from-layer"], edge.attrib["to-layer"]
            for layer in (source, target):
                if layer not in self.layers:
                    raise ValueError(f"an edge names layer {one_line(layer, 40)}, which is missing")
            self.sources[target, edge.attrib["to-port"]] = source
            self.readers.setdefault(source, []).append(target)
            for layer in {source, target}:
                self._edges.setdefault(layer, []).append(edge)

    def constants(self) -> Iterator[Stored]:
        """Yield all constants in the weight file, in the order of the graph."""
        yield from (found for found in self._constants.values() if found)

    def _check_order(self) -> None:
        """Check that the graph has no cycle.

        :raises ValueError: if it has one; the message names a layer.
        """
        waiting = {layer: 0 for layer in self.layers}
        for targets in self.readers.values():
            for target in targets:
                waiting[target] += 1
        ready = [layer for layer, count in waiting.items() if not count]
        while ready:
            for target in self.readers.get(ready.pop(), []):
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
        if stuck := next((layer for layer, count in waiting.items() if count), None):
            raise ValueError(f"layer {stuck} is in or behind a cycle of layers")

    def layer_name(self, constant: Stored) -> str:
        """Return the name of the constant's layer in the graph."""
        return self.layers[constant.layer].get("name", "")

    def check_offsets(self, size: int) -> None:
        """Check that all constants are inside the weight file and do not overlap.

        :param size: bytes of the weight file.
        :raises UserError: if a constant is outside (it is named), or constants overlap.
        """
        for found in self._constants.values():
            if found and found.at + found.size > size:
                raise UserError(
                    f"{self.name}: {one_line(found.name)}: bytes {found.at} to "
                    f"{found.at + found.size} are not in a weight file of {size}"
                )
        places = {(found.at, found.size) for found in self._constants.values() if found}
        if sum(length for _, length in places) > size:
            raise UserError(f"{self.name}: constants overlap in the weight file")

    def subtracted_constant(self, constant: Stored) -> Stored | None:
        """Return the zero points of a constant, which are subtracted after a Convert of both."""
        converts = self._readers_of(constant.layer, "Convert")
        pairs = [(c, s) for c in converts for s in self._readers_of(c, "Subtract")]
        for convert, subtract in pairs:
            if self.sources.get((subtract, "0")) != convert:
                continue
            other = self._skip_layers(self.sources.get((subtract, "1")), ("Convert",), [])
            if found := self._constant(other):
                return found
        return None

    def _readers_of(self, layer: str, kind: str) -> list[str]:
        found = self.readers.get(layer, [])[:MAX_READERS]
        return [reader for reader in found if self._type(reader) == kind]

    def _type(self, layer: str | None) -> str:
        return self.layers[layer].get("type", "") if layer in self.layers else ""

    def _constant(self, layer: str | None) -> Stored | None:
        return self._constants.get(layer) if layer is not None else None

    def _read_constant(self, layer: str) -> Stored | None:
        """Return a layer's constant; None for other layers.

        :raises ValueError: if a number is invalid; the message names it.
        """
        data = self.layers[layer].find("data")
        if self._type(layer) != "Const" or data is None or data.get("offset") is None:
            return None
        name = self.layers[layer].get("name", "").removeprefix("self.")
        where = f"{one_line(name, 80)}: "
        sizes = [part.strip() for part in (data.get("shape") or "").split(",")]
        if len(sizes) > MAX_AXES:
            raise ValueError(f"{where}shape: found {len(sizes)} axes")
        shape = tuple(_parse_number(size, f"{where}shape") for size in sizes if size)
        at = _parse_number(data.get("offset"), f"{where}offset")
        size = _parse_number(data.get("size") or "0", f"{where}size")
        return Stored(layer, name, data.get("element_type", ""), shape, at, size)

    def products(self) -> list[Product]:
        """Return all products that match the pattern above, in the order of the graph."""
        if self.has_bodies:
            return []
        found = (self._product(layer) for layer in self.layers if self._type(layer) == "MatMul")
        return [product for product in found if product is not None]

    def packed_constants(self) -> Iterator[Stored]:
        """Yield the packed weights of every ``SqftMatMul``."""
        for layer in self.layers:
            if self._type(layer) == OPERATOR:
                stored = self._constant(self.sources.get((layer, "1")))
                if stored is not None:
                    yield stored

    def specialized_formats(self, read: Read) -> Iterator[tuple[str, str]]:
        """Yield module and format of every ``SqftMatMul``."""
        for stored in self.packed_constants():
            header = read_header(np.array(read(stored.at, stored.size)), stored.name)
            yield stored.name.removesuffix(".weight"), FORMATS[header.format]

    def _skip_layers(
        self, layer: str | None, kinds: tuple[str, ...], passed: list[str]
    ) -> str | None:
        """Follow first inputs upwards, past layers of some kinds; return the first other layer.

        :param passed: the skipped layers are appended.
        :return: None after ``MAX_STEPS`` layers, or in a cycle.
        """
        start = len(passed)
        while layer is not None and self._type(layer) in kinds:
            if layer in passed[start:] or len(passed) - start == MAX_STEPS:
                return None
            passed.append(layer)
            layer = self.sources.get((layer, "0"))
        return layer

    def _product(self, matmul: str) -> Product | None:
        data = self.layers[matmul].find("data")
        if data is None or data.get("transpose_b") != "true" or data.get("transpose_a") == "true":
            return None
        passed: list[str] = []
        multiply = self._skip_layers(
            self.sources.get((matmul, "1")), ("Convert", "Reshape"), passed
        )
        if self._type(multiply) != "Multiply" or multiply is None:
            return None
        passed.append(multiply)
        below: list[str] = []
        scale = self._constant(
            self._skip_layers(self.sources.get((multiply, "1")), ("Convert",), below)
        )
        top, zero = self._skip_layers(self.sources.get((multiply, "0")), ("Convert",), passed), None
        if top is not None and self._type(top) == "Subtract":
            passed.append(top)
            zero = self._constant(
                self._skip_layers(self.sources.get((top, "1")), ("Convert",), below)
            )
            if zero is None:
                return None
            top = self._skip_layers(self.sources.get((top, "0")), ("Convert",), passed)
        codes = self._constant(top)
        if codes is None or scale is None:
            return None
        return self._check_product(matmul, codes, scale, zero, (*passed, *below))

    def _check_product(
        self, matmul: str, codes: Stored, scale: Stored, zero: Stored | None, between: tuple
    ) -> Product | None:
        """Return the product; None if the kernels do not support its types or shapes."""
        if codes.kind not in CODE_BITS or scale.kind not in ("f16", "f32"):
            return None
        if len(codes.shape) not in (2, 3) or not codes.elements or not scale.shape:
            return None
        rows, inputs = codes.shape[0], prod(codes.shape[1:])
        groups = codes.shape[1] if len(codes.shape) == 3 else 1
        if scale.elements != rows * groups or scale.shape[0] != rows:
            return None
        if zero and (zero.kind != codes.kind or zero.elements not in (1, rows * groups)):
            return None
        sizes = [(codes, CODE_BITS[codes.kind]), (scale, 16 if scale.kind == "f16" else 32)]
        sizes += [(zero, CODE_BITS[zero.kind])] if zero else []
        if any(c.size != -(-c.elements * bits // 8) or c.at < 0 for c, bits in sizes):
            return None
        ports = _input_ports(self.layers[matmul])
        if len(ports) != 2 or ports[0].get("precision") != "FP32" or inputs % groups:
            return None
        inner = [*between, codes.layer, scale.layer, *([zero.layer] if zero else [])]
        if any(len(self.readers.get(layer, [])) > MAX_READERS for layer in inner):
            return None
        others = {r for layer in inner for r in self.readers.get(layer, [])} - {matmul, *inner}
        lookups = tuple(sorted(layer for layer in others if self._is_lookup(layer, inputs)))
        shared = len(lookups) < len(others)
        name = self._name_of(matmul) if shared else codes.name
        return Product(matmul, name, codes, scale, zero, rows, inputs, between, lookups, shared)

    def _is_lookup(self, layer: str, inputs: int) -> bool:
        """Return whether a layer looks up rows of ``inputs`` numbers by ids, as embeddings do."""
        ports = _input_ports(self.layers[layer])
        out = self.layers[layer].find("output/port")
        if self._type(layer) != "Gather" or len(ports) != 3 or out is None:
            return False
        if self.layers[layer].find("data") is None:
            return False
        ids, made = ([dim.text for dim in port.iter("dim")] for port in (ports[1], out))
        precisions = [port.get("precision") for port in (ports[0], out)]
        return made == [*ids, str(inputs)] and precisions == ["FP32", "FP32"]

    def _name_of(self, matmul: str) -> str:
        """Return a weight name derived from the MatMul, for weights that several layers share."""
        origin = self.layers[matmul].get("name", "").partition("/")[0]
        return f"{origin.removeprefix('__module.')}.weight"

    def replace(self, product: Product, size: int) -> str:
        """Replace a product by ``SqftMatMul``, and lookups in its weights by ``SqftGather``.

        :return: the id of the new Const for the weights; set its place with :meth:`set_offset`.
        """
        layers = self.root.find("layers")
        assert layers is not None
        weights = self._new_constant(product.name, size)
        layers.insert(0, self.layers[weights])
        rows, length = {"rows": str(product.rows)}, {"length": str(product.inputs)}
        self._replace_layer(product.matmul, OPERATOR, rows | {"activations": "int8"}, 1, weights)
        if not product.shared:
            for lookup in product.lookups:
                self._replace_layer(lookup, LOOKUP, length, 0, weights)
            parts = [product.codes, product.scale, *([product.zero] if product.zero else [])]
            self._remove_layers({*product.between, *(part.layer for part in parts)})
        return weights

    def _replace_layer(
        self, layer: str, operator: str, attributes: dict[str, str], port: int, weights: str
    ) -> None:
        """Change a layer into one of our operators, with two inputs.

        :param port: the input that becomes the Const ``weights``.
        """
        edges, found = self.root.find("edges"), self.layers[layer]
        data, inputs, constant = found.find("data"), found.find("input"), self.layers[weights]
        assert edges is not None and data is not None and inputs is not None
        gone = [inputs[port].attrib["id"], *(extra.attrib["id"] for extra in inputs[2:])]
        for edge in self._edges.get(layer, []):
            if edge.attrib["to-layer"] == layer and edge.attrib["to-port"] in gone:
                self._removed.add(edge)
        found.attrib |= {"type": operator, "version": OPERATOR_SET}
        data.attrib.clear()
        data.attrib |= attributes
        size = constant.findtext("output/port/dim")
        inputs[2:] = []
        inputs[port] = _port(gone[0], int(size or 0))
        ends = {"from-layer": weights, "from-port": "0", "to-layer": layer, "to-port": gone[0]}
        ElementTree.SubElement(edges, "edge", ends)

    def _remove_layers(self, gone: set[str]) -> None:
        for layer in gone:
            self._removed.update(self._edges.get(layer, []))
            self._removed.add(self.layers.pop(layer))

    def _new_constant(self, name: str, size: int) -> str:
        number = str(self._next_id)
        self._next_id += 1
        what = {"id": number, "name": name, "type": "Const", "version": "opset1"}
        layer = self.layers[number] = Element("layer", what)
        shape = {"element_type": "u8", "shape": str(size), "offset": "0", "size": str(size)}
        ElementTree.SubElement(layer, "data", shape)
        ElementTree.SubElement(layer, "output").append(_port("0", size))
        return number

    def set_offset(self, layer: str, at: int) -> None:
        """Set the offset of a Const in the weight file."""
        data = self.layers[layer].find("data")
        assert data is not None
        data.set("offset", str(at))

    def text(self) -> bytes:
        """Return the IR as XML, without the replaced layers."""
        for section in ("layers", "edges"):
            if (found := self.root.find(section)) is not None:
                found[:] = [element for element in found if element not in self._removed]
        return ElementTree.tostring(self.root, encoding="utf-8", xml_declaration=True)


def read_graph(file: Path) -> Graph:
    """Read the IR in a file.

    :raises UserError: if it is not an IR.
    """
    return Graph(read_bounded(file, MAX_IR_BYTES), str(file))


class _Builder(ElementTree.TreeBuilder):
    """Refuse XML that no IR contains and that could exhaust time or memory."""

    depth = 0

    def doctype(self, *_: object) -> None:
        raise ValueError("it has a DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str], /) -> Element:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        return super().start(tag, attributes)

    def end(self, tag: str, /) -> Element:
        self.depth -= 1
        return super().end(tag)


def _parse_xml(text: bytes) -> Element:
    return ElementTree.fromstring(text, ElementTree.XMLParser(target=_Builder()))


def _parse_number(text: str | None, what: str) -> int:
    """Parse a number of an IR.

    :raises ValueError: if it is not a number, or has more than 15 digits.
    """
    if text is None or not IR_NUMBER.fullmatch(text):
        shown = one_line(repr(text), 80)
        raise ValueError(f"{what}: found {shown}; a number of at most 15 digits is expected")
    return int(text)


def _input_ports(layer: Element) -> list[Element]:
    """Return the input ports of a layer; an empty list if one has no id."""
    found = layer.find("input")
    ports = [] if found is None else list(found)
    return ports if all(port.tag == "port" and "id" in port.attrib for port in ports) else []


def _port(number: str, size: int) -> Element:
    port = Element("port", {"id": number, "precision": "U8"})
    ElementTree.SubElement(port, "dim").text = str(size)
    return port


def is_specialized(graph: bytes) -> bool:
    """Return whether an IR contains ``SqftMatMul``."""
    return f'type="{OPERATOR}"'.encode() in graph


def read_matrix(product: Product, read: Read) -> Matrix | None:
    """Read the weights of a product.

    :param read: returns bytes of the weight file at an offset and size.
    :return: None if a scale is not exact in float16.
    """
    bits, rows = product.bits, product.rows
    flip = 2 ** (bits - 1) if product.codes.kind[0] == "i" else 0
    kind = np.float16 if product.scale.kind == "f16" else np.float32
    stored = read(product.scale.at, product.scale.size).view(kind).reshape(rows, -1)
    with np.errstate(over="ignore"):
        scale = stored.astype(np.float16)
    if not np.array_equal(scale.astype(stored.dtype), stored):
        return None
    codes = read(product.codes.at, product.codes.size)
    return Matrix(
        bits, rows, product.inputs, codes, flip, _zero_points(product, scale.shape, read), scale
    )


def _zero_points(product: Product, shape: tuple[int, ...], read: Read) -> np.ndarray | None:
    """Return the zero points (uint8) for unsigned codes.

    None stands for the middle of the range, which signed codes without zero points have.
    """
    signed = product.codes.kind[0] == "i"
    if product.zero is None:
        return None if signed else np.zeros(shape, np.uint8)
    zero = read(product.zero.at, product.zero.size)
    if product.bits == 4:
        zero = unpack_nibbles(zero.reshape(1, -1), product.zero.elements)[0]
    if signed:
        zero = zero ^ 2 ** (product.bits - 1)
    if len(zero) == 1:
        return np.full(shape, zero[0], np.uint8)
    return np.ascontiguousarray(np.broadcast_to(zero.reshape(-1, *shape[1:]), shape))
