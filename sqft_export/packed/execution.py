"""Run the matrix products of an OpenVINO deployment on this package's kernels.

auto    the fastest kernel of this machine for each product, measured once (kernels/choice.py),
        unless the variable SQFT_EXPORT_EXECUTION names one of the others
sparse  the smallest format: mask and kept codes, 2:4, or dense
dense   this package's dense format
stock   the runtime's own kernels, on inflated weights
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict, get_args

import numpy as np

from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK, Chooser, MeasurementCache, Shape, pinned_execution
from sqft_export.kernels.extension import require_kernels, unavailable_reason
from sqft_export.kernels.ir import Product, Read, read_graph, read_matrix
from sqft_export.kernels.library import count_kept
from sqft_export.kernels.rewrite import Choose, Rewritten, rewrite
from sqft_export.packed.container import PackedFile
from sqft_export.packed.folders import copy_deployment, dense_size, map_weights, packed_file
from sqft_export.packed.seal import PROVENANCE, read_seal, write_seal
from sqft_export.packed.streaming import check_dense_digest
from sqft_export.packed.usage import rewrite_card
from sqft_export.targets.folder import GRAPHS, WEIGHT_FILES, check_files, runtime_of

_logger = logging.getLogger(__name__)
Execution = Literal["auto", "sparse", "dense", "stock"]


def resolve_execution(execution: str) -> str:
    """Return ``execution``; for ``auto``, the value of ``SQFT_EXPORT_EXECUTION`` if it is set.

    :raises UserError: if the value is unknown.
    """
    if execution not in get_args(Execution):
        raise UserError(
            f"execution: found {execution!r}; allowed are {', '.join(get_args(Execution))}"
        )
    return (pinned_execution() or execution) if execution == "auto" else execution


def available_execution(execution: str) -> str:
    """Resolve ``execution``; log a warning and return ``stock`` if the kernels are missing."""
    execution = resolve_execution(execution)
    if execution == STOCK:
        return STOCK
    if missing := unavailable_reason():
        _logger.warning("sparse execution is not available, stock kernels are used: %s", missing)
        return STOCK
    return execution


@contextmanager
def open_weights(folder: Path) -> Iterator[Read]:
    """Yield a reader of the dense weight file of an OpenVINO deployment, packed or plain."""
    packed = packed_file(folder)
    if packed is not None:
        with PackedFile(packed) as opened:
            check_dense_digest(opened)
            yield opened.read
        return
    file = folder / WEIGHT_FILES["openvino"]
    content = map_weights(file)

    def read(at: int, size: int) -> np.ndarray:
        if at < 0 or at + size > len(content):
            raise UserError(
                f"{file}: has {len(content)} bytes; the graph reads up to byte {at + size}"
            )
        return content[at : at + size]

    yield read


def _chooser(execution: str, products: list[Product]) -> Choose:
    """Return the function that chooses a kernel for each product."""
    if execution == "auto":
        return Chooser(sum(product.codes.size for product in products))
    return lambda product, matrix, kept: execution


def rewrite_deployment(
    folder: Path, execution: str, allocate: Callable[[int], np.ndarray] | None = None
) -> Rewritten | None:
    """Return an OpenVINO deployment whose products run on our kernels; None if no product does.

    :param execution: auto, sparse or dense.
    :param allocate: see :func:`rewrite`.
    :raises UserError: if the deployment can't be read.
    """
    graph = read_graph(folder / GRAPHS["openvino"])
    if graph.is_specialized:
        raise UserError(f"{folder}: is specialized already")
    products = graph.products()
    if not products:
        return None
    choose = _chooser(execution, products)
    graph.check_offsets(dense_size(folder))
    with open_weights(folder) as read:
        made = rewrite(graph, read, choose, require_kernels(), allocate)
    return made if set(made.forms.values()) != {STOCK} else None


def list_kernels(folder: Path) -> dict[str, tuple[str, float | None]]:
    """Return for each module the kernel of its product, and its speed-up over the runtime's own.

    In a specialized folder the kernel is fixed and the speed-up None. Otherwise the result has the
    products that ``auto`` has measured on this machine.

    :raises UserError: if the deployment can't be read.
    """
    graph = read_graph(folder / GRAPHS["openvino"])
    found: dict[str, tuple[str, float | None]] = {}
    graph.check_offsets(dense_size(folder))
    with open_weights(folder) as read:
        for name, form in graph.specialized_formats(read):
            found[name] = (form, None)
        if unavailable_reason():
            return found
        memory = MeasurementCache()
        for product in graph.products():
            matrix = read_matrix(product, read)
            if matrix and (known := memory.get(Shape.of(matrix, count_kept(matrix)))):
                found[product.module] = (known.form, known.gain())
    return found


class SpecializedSizes(TypedDict):
    """Bytes of the weights, and the number of products in each format."""

    bytes: int
    products: dict[str, int]


class NothingSpecialized(UserError):
    """Raised when no product has weights that the kernels can read."""


def specialize(folder: Path, out: Path, execution: str = "sparse") -> SpecializedSizes:
    """Write a copy of an OpenVINO deployment that runs on our kernels to ``out``.

    The copy loads on every machine with this package, through ``openvino_extension()``. Its weights
    are packed for this machine's vector length. A machine with another length repacks them as it
    loads them.

    :raises UserError: if the folder is not an OpenVINO deployment or is specialized already, if the
        kernels are missing, or if ``out`` exists.
    :raises NothingSpecialized: if no product has INT4 or INT8 weights.
    """
    if runtime_of(folder) != "openvino":
        raise UserError(
            f"{folder}: is for {runtime_of(folder)}; only OpenVINO deployments can be specialized"
        )
    execution = resolve_execution(execution)
    require_kernels()
    check_files(folder)
    made = rewrite_deployment(folder, execution)
    if made is None:
        raise NothingSpecialized(f"{folder}: has no product with INT4 or INT8 weights")
    weights = folder / WEIGHT_FILES["openvino"]
    packed = packed_file(folder)
    left_out = [folder / GRAPHS["openvino"], packed or weights, folder / PROVENANCE]
    with copy_deployment(folder, out, left_out) as partial:
        (partial / GRAPHS["openvino"]).write_bytes(made.text)
        made.weights.tofile(partial / weights.name)
        rewrite_card(partial)
        if origin := read_seal(folder):
            write_seal(partial, {k: v for k, v in origin.items() if k != "files"})
    forms = list(made.forms.values())
    return {
        "bytes": len(made.weights),
        "products": {form: forms.count(form) for form in sorted(set(forms))},
    }
