"""Rewrite a graph and its weights so that chosen products run on the kernels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sqft_export.kernels.ir import Graph, Product, Read, read_matrix
from sqft_export.kernels.library import (
    FORMATS,
    KeptCounts,
    Kernels,
    Matrix,
    MatrixHeader,
    allocate_aligned,
    count_kept,
    pack_matrix,
    plan_matrix,
    read_header,
)
from sqft_export.numerics.codes import round_up

MATRIX_ALIGNMENT = 64
STOCK = "stock"
Choose = Callable[[Product, Matrix, KeptCounts], str]  # returns a form: stock, dense or sparse


@dataclass(frozen=True)
class Rewritten:
    """A rewritten IR in memory.

    text: the graph. weights: uint8, the complete weight file.
    forms: by weight name: the format of each compressed product, or stock.
    """

    text: bytes
    weights: np.ndarray
    forms: dict[str, str]


def resolve_format(form: str, kept: KeptCounts, matrix: Matrix, kernels: Kernels) -> str:
    """Return the format of a matrix (dense, mask or pairs) for the form ``dense`` or ``sparse``.

    For ``sparse`` this is the 2:4 format if the mask has that pattern and these kernels are slow on
    unstructured masks; else the smaller of mask and dense.
    """
    if form != "sparse":
        return form
    if kept.pairs and not kernels.any_mask_pays and matrix.group % 32 == 0:
        return "pairs"
    sizes = {f: _planned_bytes(matrix, f, kernels.lanes, kept) for f in ("dense", "mask")}
    return min(sizes, key=lambda f: sizes[f])


def _planned_bytes(matrix: Matrix, form: str, lanes: int, kept: KeptCounts) -> int:
    """Return the packed size; a huge number if the kernels do not support the shape."""
    header = plan_matrix(matrix, form, lanes, kept.counts)
    return header.bytes if header else 2**62


def _max_bytes(product: Product) -> int:
    """Return an upper bound on the packed size of a product in any format."""
    rows, span = round_up(product.rows, 32), round_up(product.inputs, 32)
    groups = max(product.scale.elements // product.rows, span // 16)
    padded = max(span, groups * round_up(max(1, product.inputs // groups), 32))
    return rows * padded * (product.bits + 1) // 8 + rows * groups * 4 + 16 * rows + 8192


def rewrite(
    graph: Graph,
    read: Read,
    choose: Choose,
    kernels: Kernels,
    allocate: Callable[[int], np.ndarray] | None = None,
) -> Rewritten:
    """Pack the weights of every product that ``choose`` does not leave to the runtime.

    One matrix at a time is read. The buffer is in huge pages if the system has them.

    :param read: returns bytes of the dense weight file at an offset and size.
    :param allocate: returns memory of a size, aligned to 64 bytes, that the runtime reads in place;
        None: the weights will be written to a file.
    """
    products, constants = graph.products(), list(graph.constants())
    bound = sum(round_up(constant.size, MATRIX_ALIGNMENT) for constant in constants)
    bound += sum(_max_bytes(product) for product in products)
    buffer, end = (allocate or allocate_aligned)(bound), 0
    forms: dict[str, str] = {}
    for product in products:
        made = _pack_product(product, read, choose, kernels, allocate is not None, buffer[end:])
        forms[product.name] = FORMATS[made.format] if made else STOCK
        if made:
            graph.set_offset(graph.replace(product, made.bytes), end)
            end = round_up(end + made.bytes, MATRIX_ALIGNMENT)
    places: dict[tuple[int, int], int] = {}  # constants that share bytes keep sharing them
    for constant in constants:
        if constant.layer not in graph.layers:
            continue
        place = constant.at, constant.size
        if place not in places:
            buffer[end : end + constant.size] = read(*place)
            places[place], end = end, round_up(end + constant.size, MATRIX_ALIGNMENT)
        graph.set_offset(constant.layer, places[place])
    return Rewritten(graph.text(), buffer[:end], forms)


def _pack_product(
    product: Product,
    read: Read,
    choose: Choose,
    kernels: Kernels,
    resident: bool,
    out: np.ndarray,
) -> MatrixHeader | None:
    """Pack a product into the beginning of ``out`` and return its header.

    :return: None if the product stays on the runtime's kernels.
    """
    matrix = read_matrix(product, read)
    if matrix is None:
        return None
    kept = count_kept(matrix)
    form = choose(product, matrix, kept)
    if form == STOCK:
        return None
    header = plan_matrix(
        matrix, resolve_format(form, kept, matrix, kernels), kernels.lanes, kept.counts
    )
    if header is None:
        return None
    assert header.bytes <= len(out)
    header.resident = resident
    pack_matrix(header, matrix, kept.counts, out[: header.bytes])
    return header


def mark_resident(graph: Graph, weights: np.ndarray, kernels: Kernels) -> None:
    """Mark matrices in memory as resident, so that the kernels read them in place without a copy.

    Matrices packed for another vector length are not marked.

    :param weights: uint8, the complete weight file, aligned to 64 bytes.
    :raises DamagedError: if a matrix is damaged.
    """
    for stored in graph.packed_constants():
        blob = weights[stored.at : stored.at + stored.size]
        if (
            read_header(blob, stored.name).lanes == kernels.lanes
            and stored.at % MATRIX_ALIGNMENT == 0
        ):
            MatrixHeader.from_buffer(blob.data).resident = 1
