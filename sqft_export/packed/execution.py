"""A deployment whose products run on our kernels: straight from mask and kept codes, or dense.

auto    of every product the fastest kernel here, measured once (kernels/choice.py), unless
        SQFT_EXPORT_EXECUTION names one of the others
sparse  the format that zeros make smallest
dense   our dense format
stock   the runtime's own kernels; weights are inflated for them
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK, Chooser, Remembered, Shape, pinned_execution
from sqft_export.kernels.extension import kernels_used, why_not
from sqft_export.kernels.ir import Read, matrix_of, read_graph
from sqft_export.kernels.library import count_kept
from sqft_export.kernels.rewrite import Rewritten, rewrite
from sqft_export.packed.container import PackedFile
from sqft_export.packed.folders import copy_of, dense_size, map_weights, packed_file
from sqft_export.packed.seal import PROVENANCE, read_seal, write_seal
from sqft_export.packed.streaming import check_whole
from sqft_export.packed.usage import rewrite_card
from sqft_export.targets.folder import GRAPHS, WEIGHT_FILES, check_files, runtime_of

Execution = Literal["auto", "sparse", "dense", "stock"]


def checked_execution(execution: str) -> str:
    """The kernels to run on: in place of ``auto`` those that the environment pins, if any.

    :raises UserError: if there are no such kernels.
    """
    if execution not in get_args(Execution):
        raise UserError(
            f"execution: found {execution!r}; allowed are {', '.join(get_args(Execution))}"
        )
    return (pinned_execution() or execution) if execution == "auto" else execution


def execution_here(execution: str) -> str:
    """The same, or ``stock`` with a line of notice where the kernels are missing."""
    execution = checked_execution(execution)
    if execution == STOCK:
        return STOCK
    if missing := why_not():
        print(f"notice: no sparse execution here, on dense kernels: {missing}", file=sys.stderr)
        return STOCK
    return execution


@contextmanager
def weights_of(folder: Path) -> Iterator[Read]:
    """Bytes of the dense weight file of an OpenVINO deployment, packed or plain."""
    packed = packed_file(folder)
    if packed is not None:
        with PackedFile(packed) as opened:
            check_whole(opened)
            yield opened.read
        return
    file = folder / WEIGHT_FILES["openvino"]
    content = map_weights(file)

    def read(at: int, size: int) -> np.ndarray:
        if at < 0 or at + size > len(content):
            raise UserError(f"{file}: has {len(content)} bytes; the graph asks for {at + size}")
        return content[at : at + size]

    yield read


def rewritten(
    folder: Path, execution: str, allocate: Callable[[int], np.ndarray] | None = None
) -> Rewritten | None:
    """An OpenVINO deployment with its products on our kernels; None where none would be.

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
    choose: Any = lambda *_: execution  # noqa: E731
    if execution == "auto":
        choose = Chooser(sum(product.codes.size for product in products))
    graph.check_places(dense_size(folder))
    with weights_of(folder) as read:
        made = rewrite(graph, read, choose, kernels_used(), allocate)
    return made if set(made.forms.values()) != {STOCK} else None


def kernels_of(folder: Path) -> dict[str, tuple[str, float | None]]:
    """The kernel of every product by module, and how many times as fast as the runtime's own it
    was found to be here; of a folder that is not specialized what was chosen before, if it was.

    :raises UserError: if the deployment can't be read.
    """
    graph = read_graph(folder / GRAPHS["openvino"])
    found: dict[str, tuple[str, float | None]] = {}
    graph.check_places(dense_size(folder))
    with weights_of(folder) as read:
        for name, form in graph.specialized(read):
            found[name] = (form, None)
        if why_not():
            return found
        memory = Remembered()
        for product in graph.products():
            matrix = matrix_of(product, read)
            if matrix and (known := memory.get(Shape.of(matrix, count_kept(matrix)))):
                found[product.module] = (known.form, known.gain())
    return found


class NothingSpecialized(UserError):
    """No product has weights that the kernels read."""


def specialize(folder: Path, out: Path, execution: str = "sparse") -> dict[str, Any]:
    """Write ``out``, a copy of an OpenVINO deployment that runs on our kernels.

    It loads wherever the package is, with ``openvino_extension()``; its weights are laid out for
    this machine's vectors, and are put in another's order there as they are loaded.

    :return: bytes of the weights, and number of products in each format.
    :raises UserError: if the folder is no OpenVINO deployment, has no compressed product or is
        specialized already, if the kernels are missing, or ``out`` exists.
    """
    if runtime_of(folder) != "openvino":
        raise UserError(f"{folder}: is for {runtime_of(folder)}; OpenVINO deployments run on them")
    execution = checked_execution(execution)
    kernels_used()
    check_files(folder)
    made = rewritten(folder, execution)
    if made is None:
        raise NothingSpecialized(
            f"{folder}: has no product with INT4 or INT8 weights to run on them"
        )
    weights = folder / WEIGHT_FILES["openvino"]
    packed = packed_file(folder)
    left_out = [folder / GRAPHS["openvino"], packed or weights, folder / PROVENANCE]
    with copy_of(folder, out, left_out) as partial:
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
