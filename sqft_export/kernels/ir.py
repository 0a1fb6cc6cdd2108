"""Compressed products in an OpenVINO IR, and the graph with ``SqftMatMul`` in their place.

An embedding that is the head too is stored once: ``SqftGather`` looks rows up in the head's matrix.

Read and written as XML, so that no weight is needed in memory. A product is what every tool writes
for compressed weights (NNCF, optimum-intel, this package):

    Const(i4|u4|i8|u8) -> Convert -> [Subtract] -> Multiply(float16) -> [Reshape] -> [Convert]
        -> MatMul(transpose_b)
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import UserError, one_line
from sqft_export.kernels.library import FORMATS, Matrix, header_of
from sqft_export.numerics.nibbles import unpack_nibbles
from sqft_export.untrusted import MAX_IR_BYTES, read_bounded

OPERATOR, LOOKUP = "SqftMatMul", "SqftGather"
OPERATOR_SET = "sqft_export"
CODE_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}
Read = Callable[[int, int], np.ndarray]  # offset and size -> uint8 of the weight file
IR_NUMBER = re.compile(r"[0-9]{1,15}")  # of an IR: bytes, sizes and ids
MAX_DEPTH = 64  # levels of XML
MAX_AXES = 32
MAX_STEPS = 16  # layers between a constant and its product
MAX_READERS = 64  # of one constant; more are no product of ours


@dataclass(frozen=True)
class Stored:
    """A Const: its layer and where its bytes are."""

    layer: str
    name: str
    kind: str
    shape: tuple[int, ...]
    at: int
    size: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Product:
    """A MatMul with compressed weights.

    between: layers from the constants to the MatMul, which it makes unnecessary.
    lookups: Gathers that read the same weights by rows: an embedding that is the head as well.
    shared: something else reads them too; they stay.
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
        return CODE_BITS[self.codes.kind]

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


class Graph:
    """An IR.

    :raises UserError: if it is none.
    """

    def __init__(self, text: bytes, name: str):
        self.name, self.is_specialized = name, is_specialized(text)
        self.layers: dict[str, Any] = {}
        self.sources: dict[tuple[str, str], str] = {}
        self.readers: dict[str, list[str]] = {}
        self._edges: dict[str, list[Any]] = {}  # of a layer, from it and to it
        try:
            self.root = _parse_xml(text)
            self._read_layers()
            self._read_edges()
            self._check_order()
            # All numbers are checked here, so that nothing below meets one that is none.
            self._constants = {key: self._read_constant(key) for key in self.layers}
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise UserError(f"{name}: not an IR: {one_line(error)}") from error

    def _read_layers(self) -> None:
        for layer in self.root.iterfind("layers/layer"):
            key = layer.attrib["id"]
            _number(key, "a layer's id")
            if key in self.layers:
                raise ValueError(f"layer {key} is there twice")
            self.layers[key] = layer
        self._next = 1 + max(map(int, self.layers), default=0)
        self._gone: set[Any] = set()  # layers and edges that the text leaves out
        # Layers of a loop or a condition have ids of their own.
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
        """All constants in the weight file, in the order of the graph."""
        yield from (found for found in self._constants.values() if found)

    def _check_order(self) -> None:
        """:raises ValueError: naming a layer that its own output leads to."""
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
            raise ValueError(f"layer {stuck} is in or behind a circle of layers")

    def layer_name(self, constant: Stored) -> str:
        """The name that its layer has in the graph."""
        return self.layers[constant.layer].get("name", "")

    def check_places(self, size: int) -> None:
        """Compare what the constants take with the weight file.

        :param size: bytes of the weight file.
        :raises UserError: naming a constant that is not in it, or if they take more than all of it.
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

    def subtracted(self, constant: Stored) -> Stored | None:
        """The constant that is subtracted from this one, each of them converted first."""
        converts = self._readers_of(constant.layer, "Convert")
        pairs = [(c, s) for c in converts for s in self._readers_of(c, "Subtract")]
        for convert, subtract in pairs:
            if self.sources.get((subtract, "0")) != convert:
                continue
            other = self._past(self.sources.get((subtract, "1")), ("Convert",), [])
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
        """:raises ValueError: naming a number that is none."""
        data = self.layers[layer].find("data")
        if self._type(layer) != "Const" or data is None or data.get("offset") is None:
            return None
        name = self.layers[layer].get("name", "").removeprefix("self.")
        where = f"{one_line(name, 80)}: "
        sizes = [part.strip() for part in (data.get("shape") or "").split(",")]
        if len(sizes) > MAX_AXES:
            raise ValueError(f"{where}shape: found {len(sizes)} axes")
        shape = tuple(_number(size, f"{where}shape") for size in sizes if size)
        at = _number(data.get("offset"), f"{where}offset")
        size = _number(data.get("size") or "0", f"{where}size")
        return Stored(layer, name, data.get("element_type", ""), shape, at, size)

    def products(self) -> list[Product]:
        """In the order of the graph; what is not of the form above is left out."""
        if self.has_bodies:
            return []
        found = (self._product(layer) for layer in self.layers if self._type(layer) == "MatMul")
        return [product for product in found if product is not None]

    def laid_out(self) -> Iterator[Stored]:
        """The weights of every product of ours."""
        for layer in self.layers:
            if self._type(layer) == OPERATOR:
                stored = self._constant(self.sources.get((layer, "1")))
                if stored is not None:
                    yield stored

    def specialized(self, read: Read) -> Iterator[tuple[str, str]]:
        """Module and format of every product of ours."""
        for stored in self.laid_out():
            header = header_of(np.array(read(stored.at, stored.size)), stored.name)
            yield stored.name.removesuffix(".weight"), FORMATS[header.format]

    def _past(self, layer: str | None, kinds: tuple[str, ...], passed: list[str]) -> str | None:
        """The first layer above that is none of these kinds; None if it is too far, or in a
        circle."""
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
        multiply = self._past(self.sources.get((matmul, "1")), ("Convert", "Reshape"), passed)
        if self._type(multiply) != "Multiply" or multiply is None:
            return None
        passed.append(multiply)
        below: list[str] = []
        scale = self._constant(self._past(self.sources.get((multiply, "1")), ("Convert",), below))
        top, zero = self._past(self.sources.get((multiply, "0")), ("Convert",), passed), None
        if top is not None and self._type(top) == "Subtract":
            passed.append(top)
            zero = self._constant(self._past(self.sources.get((top, "1")), ("Convert",), below))
            if zero is None:
                return None
            top = self._past(self.sources.get((top, "0")), ("Convert",), passed)
        codes = self._constant(top)
        if codes is None or scale is None:
            return None
        return self._checked(matmul, codes, scale, zero, (*passed, *below))

    def _checked(
        self, matmul: str, codes: Stored, scale: Stored, zero: Stored | None, between: tuple
    ) -> Product | None:
        """None where the shapes are none that the kernels read."""
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
        ports = _inputs(self.layers[matmul])
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
        """Whether it takes rows of ``inputs`` numbers by ids, as an embedding does."""
        ports = _inputs(self.layers[layer])
        out = self.layers[layer].find("output/port")
        if self._type(layer) != "Gather" or len(ports) != 3 or out is None:
            return False
        if self.layers[layer].find("data") is None:
            return False
        ids, made = ([dim.text for dim in port.iter("dim")] for port in (ports[1], out))
        precisions = [port.get("precision") for port in (ports[0], out)]
        return made == [*ids, str(inputs)] and precisions == ["FP32", "FP32"]

    def _name_of(self, matmul: str) -> str:
        """Of the weights of a product that has none of its own."""
        origin = self.layers[matmul].get("name", "").partition("/")[0]
        return f"{origin.removeprefix('__module.')}.weight"

    def replace(self, product: Product, size: int) -> str:
        """Put the operators in place of a product and of lookups in its weights.

        :return: the Const of its weights; :meth:`move` says where they are.
        """
        layers = self.root.find("layers")
        assert layers is not None
        weights = self._new_constant(product.name, size)
        layers.insert(0, self.layers[weights])
        rows, length = {"rows": str(product.rows)}, {"length": str(product.inputs)}
        self._exchange(product.matmul, OPERATOR, rows | {"activations": "int8"}, 1, weights)
        if not product.shared:
            for lookup in product.lookups:
                self._exchange(lookup, LOOKUP, length, 0, weights)
            parts = [product.codes, product.scale, *([product.zero] if product.zero else [])]
            self._drop({*product.between, *(part.layer for part in parts)})
        return weights

    def _exchange(
        self, layer: str, operator: str, attributes: dict[str, str], port: int, weights: str
    ) -> None:
        """Make an operator of ours of a layer, of its first two inputs; one of them is weights."""
        edges, found = self.root.find("edges"), self.layers[layer]
        data, inputs, constant = found.find("data"), found.find("input"), self.layers[weights]
        assert edges is not None and data is not None and inputs is not None
        gone = [inputs[port].attrib["id"], *(extra.attrib["id"] for extra in inputs[2:])]
        for edge in self._edges.get(layer, []):
            if edge.attrib["to-layer"] == layer and edge.attrib["to-port"] in gone:
                self._gone.add(edge)
        found.attrib |= {"type": operator, "version": OPERATOR_SET}
        data.attrib.clear()
        data.attrib |= attributes
        size = constant.findtext("output/port/dim")
        inputs[2:] = []
        inputs[port] = _port(gone[0], int(size or 0))
        ends = {"from-layer": weights, "from-port": "0", "to-layer": layer, "to-port": gone[0]}
        ElementTree.SubElement(edges, "edge", ends)

    def _drop(self, gone: set[str]) -> None:
        for layer in gone:
            self._gone.update(self._edges.get(layer, []))
            self._gone.add(self.layers.pop(layer))

    def _new_constant(self, name: str, size: int) -> str:
        number = str(self._next)
        self._next += 1
        what = {"id": number, "name": name, "type": "Const", "version": "opset1"}
        layer = self.layers[number] = ElementTree.Element("layer", what)
        shape = {"element_type": "u8", "shape": str(size), "offset": "0", "size": str(size)}
        ElementTree.SubElement(layer, "data", shape)
        ElementTree.SubElement(layer, "output").append(_port("0", size))
        return number

    def move(self, layer: str, at: int) -> None:
        """Say where the bytes of a Const are."""
        data = self.layers[layer].find("data")
        assert data is not None
        data.set("offset", str(at))

    def text(self) -> bytes:
        """The IR as XML, without what was replaced."""
        for section in ("layers", "edges"):
            if (found := self.root.find(section)) is not None:
                found[:] = [element for element in found if element not in self._gone]
        return ElementTree.tostring(self.root, encoding="utf-8", xml_declaration=True)


def read_graph(file: Path) -> Graph:
    """The IR in a file.

    :raises UserError: if it is none.
    """
    return Graph(read_bounded(file, MAX_IR_BYTES), str(file))


class _Builder(ElementTree.TreeBuilder):
    """Refuses what no IR has and a reader can be kept busy with."""

    depth = 0

    def doctype(self, *_: Any) -> None:
        raise ValueError("it has a DOCTYPE")

    def start(self, tag: Any, attributes: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        return super().start(tag, attributes)

    def end(self, tag: Any) -> Any:
        self.depth -= 1
        return super().end(tag)


def _parse_xml(text: bytes) -> Any:
    return ElementTree.fromstring(text, ElementTree.XMLParser(target=_Builder()))


def _number(text: str | None, what: str) -> int:
    """:raises ValueError: if it is none, or no size of a weight file."""
    if text is None or not IR_NUMBER.fullmatch(text):
        shown = one_line(repr(text), 80)
        raise ValueError(f"{what}: found {shown}; a number that a weight file can have is expected")
    return int(text)


def _inputs(layer: Any) -> list[Any]:
    """The input ports of a layer; none where one has no id."""
    found = layer.find("input")
    ports = [] if found is None else list(found)
    return ports if all(port.tag == "port" and "id" in port.attrib for port in ports) else []


def _port(number: str, size: int) -> Any:
    port = ElementTree.Element("port", {"id": number, "precision": "U8"})
    ElementTree.SubElement(port, "dim").text = str(size)
    return port


def is_specialized(graph: bytes) -> bool:
    """Whether an IR has products of ours in it."""
    return f'type="{OPERATOR}"'.encode() in graph


def matrix_of(product: Product, read: Read) -> Matrix | None:
    """The weights of a product.

    :param read: offset and size -> bytes of the weight file.
    :return: None if a scale is no float16.
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
        bits, rows, product.inputs, codes, flip, _zeros(product, scale.shape, read), scale
    )


def _zeros(product: Product, shape: tuple[int, ...], read: Read) -> np.ndarray | None:
    """uint8 zero points, of the codes as unsigned; None: in the middle, as signed ones have it."""
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
