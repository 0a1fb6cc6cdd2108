"""A graph and its weights with chosen products laid out for the kernels, weights in one buffer."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sqft_export.kernels.ir import Graph, Product, Read, matrix_of
from sqft_export.kernels.library import (
    FORMATS,
    Kept,
    Kernels,
    Matrix,
    MatrixHeader,
    aligned,
    count_kept,
    header_of,
    lay_out,
    planned,
)
from sqft_export.numerics.codes import round_up

BOUNDARY = 64
STOCK = "stock"
Choose = Callable[[Product, Matrix, Kept], str]  # -> a format, or stock


@dataclass(frozen=True)
class Rewritten:
    """An IR in memory.

    forms: of every compressed product by its weight, as it was laid out.
    """

    text: bytes
    weights: np.ndarray
    forms: dict[str, str]


def form_for(form: str, kept: Kept, matrix: Matrix, kernels: Kernels) -> str:
    """What ``dense`` or ``sparse`` is for a matrix: a format that these kernels read.

    Sparse is the 2:4 format where the mask allows and any mask is no faster, else mask and kept
    codes, if that is smaller than the dense format.
    """
    if form != "sparse":
        return form
    if kept.pairs and not kernels.any_mask_pays and matrix.group % 32 == 0:
        return "pairs"
    sizes = {f: _bytes(matrix, f, kernels.lanes, kept) for f in ("dense", "mask")}
    return min(sizes, key=lambda f: sizes[f])


def _bytes(matrix: Matrix, form: str, lanes: int, kept: Kept) -> int:
    header = planned(matrix, form, lanes, kept.counts)
    return header.bytes if header else 2**62


def _most_bytes(product: Product) -> int:
    """No format takes more."""
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
    """Lay out the weights of every product for which ``choose`` names a format.

    One matrix at a time is read; the buffer is in huge pages where there are such.

    :param read: offset and size -> bytes of the dense weight file.
    :param allocate: gives memory of a size, on a multiple of 64, that the runtime will read where
        it is; None: the weights go into a file.
    """
    products, constants = graph.products(), list(graph.constants())
    bound = sum(round_up(constant.size, BOUNDARY) for constant in constants)
    bound += sum(_most_bytes(product) for product in products)
    buffer, end = (allocate or aligned)(bound), 0
    forms: dict[str, str] = {}
    for product in products:
        made = _laid_out(product, read, choose, kernels, allocate is not None, buffer[end:])
        forms[product.name] = FORMATS[made.format] if made else STOCK
        if made:
            graph.move(graph.replace(product, made.bytes), end)
            end = round_up(end + made.bytes, BOUNDARY)
    places: dict[tuple[int, int], int] = {}  # constants that share their bytes still do
    for constant in constants:
        if constant.layer not in graph.layers:
            continue
        place = constant.at, constant.size
        if place not in places:
            buffer[end : end + constant.size] = read(*place)
            places[place], end = end, round_up(end + constant.size, BOUNDARY)
        graph.move(constant.layer, places[place])
    return Rewritten(graph.text(), buffer[:end], forms)


def _laid_out(
    product: Product,
    read: Read,
    choose: Choose,
    kernels: Kernels,
    resident: bool,
    out: np.ndarray,
) -> MatrixHeader | None:
    """Where it was written to the front of ``out``; None where it stays with the runtime."""
    matrix = matrix_of(product, read)
    if matrix is None:
        return None
    kept = count_kept(matrix)
    form = choose(product, matrix, kept)
    if form == STOCK:
        return None
    header = planned(matrix, form_for(form, kept, matrix, kernels), kernels.lanes, kept.counts)
    if header is None:
        return None
    assert header.bytes <= len(out)
    header.resident = resident
    lay_out(header, matrix, kept.counts, out[: header.bytes])
    return header


def mark_resident(graph: Graph, weights: np.ndarray, kernels: Kernels) -> None:
    """Say of matrices in memory that they are read where they lie, if they are in these kernels'
    order.

    :param weights: uint8, the whole weight file, from a multiple of 64 on.
    :raises DamagedError: if a matrix is damaged.
    """
    for stored in graph.laid_out():
        blob = weights[stored.at : stored.at + stored.size]
        if header_of(blob, stored.name).lanes == kernels.lanes and stored.at % BOUNDARY == 0:
            MatrixHeader.from_buffer(blob.data).resident = 1
