"""Python interface of the compiled kernels: find them, pack and unpack matrices, multiply.

The library comes from the installed package, never from a deployment.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sqft_export.compiled import built_library
from sqft_export.errors import DamagedError
from sqft_export.machine.host import allowed_processors
from sqft_export.numerics.codes import QuantizedWeight, from_arrays

FORMATS = ("dense", "mask", "pairs")
HUGE_PAGE = 2**21


class MatrixHeader(ctypes.Structure):
    """``SqftMatrix`` of matrix.h, which describes the fields."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        *(
            (name, ctypes.c_uint32)
            for name in (
                *("version", "format", "bits", "lanes", "asymmetric", "rows", "inputs"),
                *("stored_group", "group", "span", "groups", "tiles", "resident"),
            )
        ),
        *(
            (name, ctypes.c_uint64)
            for name in ("group_bytes", "offsets", "narrow", "fixed", "kept", "bytes")
        ),
    )


class _Kernels(ctypes.Structure):
    """``SqftKernels`` of matrix.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("lanes", ctypes.c_uint32),
        ("here", ctypes.c_void_p),
        ("round", ctypes.c_void_p),
        ("one", ctypes.c_void_p),
        ("many", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Kernels:
    """The kernels of one instruction set.

    name: avx512-amx, avx512, avx2-vnni, avx2, neon or plain. lanes: rows per vector.
    """

    name: str
    lanes: int

    @property
    def any_mask_pays(self) -> bool:
        """True if these kernels expand unstructured masks about as fast as memory is read."""
        return self.name in ("avx512-amx", "avx512")


def open_library(file: Path) -> ctypes.CDLL:
    """Load a library that was built from this folder's sources."""
    library = ctypes.CDLL(str(file))
    library.sqft_kernels.restype = ctypes.POINTER(_Kernels)
    return library


@functools.cache
def kernel_library() -> ctypes.CDLL | None:
    """Return the library built with the package; None if there was no compiler."""
    file = built_library(Path(__file__).parent, "_kernels")
    return open_library(file) if file else None


def _require_library(library: ctypes.CDLL | None) -> ctypes.CDLL:
    """Return the library; None stands for the one that was built with the package."""
    found = library or kernel_library()
    assert found is not None, "the kernels were not built"
    return found


def find_kernels(name: str | None = None, library: ctypes.CDLL | None = None) -> Kernels | None:
    """Return the fastest kernels that this processor supports, or those with a name.

    None if the processor does not support them, or the library was not built.
    """
    library = library or kernel_library()
    found = library.sqft_kernels(name.encode() if name else None) if library else None
    return Kernels(found[0].name.decode(), found[0].lanes) if found else None


@dataclass(frozen=True)
class Matrix:
    """The bytes of a quantized weight in a runtime's file, which are packed without a copy.

    codes: uint8 ``[bytes]``, row major; for 4 bits two codes per byte, the lower nibble first.
    flip: XOR mask that makes codes unsigned: ``2^(bits-1)`` for signed codes, else 0.
    zero: uint8 ``[rows, groups]``; None if symmetric: the zero point is then ``2^(bits-1)``.
    scale: float16 ``[rows, groups]``.
    """

    bits: int
    rows: int
    inputs: int
    codes: np.ndarray
    flip: int
    zero: np.ndarray | None
    scale: np.ndarray

    @property
    def group(self) -> int:
        """Inputs per scale."""
        return self.inputs // self.scale.shape[1]


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@dataclass(frozen=True)
class KeptCounts:
    """The kept codes of a matrix.

    counts: uint32 ``[rows]``, codes that differ from their zero point.
    pairs: whether the mask is 2:4: at most 2 kept codes in 4 adjacent inputs.
    """

    counts: np.ndarray
    pairs: bool


def count_kept(matrix: Matrix, library: ctypes.CDLL | None = None) -> KeptCounts:
    """Count the kept codes of each row."""
    kept = np.empty(matrix.rows, np.uint32)
    pairs = _require_library(library).sqft_count(
        *(_pointer(matrix.codes), matrix.bits, matrix.flip, _pointer(matrix.zero)),
        *(matrix.rows, matrix.inputs, matrix.group, _pointer(kept)),
    )
    return KeptCounts(kept, bool(pairs))


def plan_matrix(
    matrix: Matrix, form: str, lanes: int, kept: np.ndarray, library: ctypes.CDLL | None = None
) -> MatrixHeader | None:
    """Return the header of a matrix packed in a format; ``header.bytes`` is the packed size.

    :param form: dense, mask or pairs.
    :param kept: ``KeptCounts.counts`` of the matrix.
    :return: None if the kernels do not support the shape.
    """
    header = MatrixHeader(
        format=FORMATS.index(form),
        bits=matrix.bits,
        lanes=lanes,
        asymmetric=matrix.zero is not None,
        rows=matrix.rows,
        inputs=matrix.inputs,
        stored_group=matrix.group,
    )
    library = _require_library(library)
    return None if library.sqft_plan(ctypes.byref(header), _pointer(kept)) else header


def pack_matrix(
    header: MatrixHeader,
    matrix: Matrix,
    kept: np.ndarray,
    out: np.ndarray,
    library: ctypes.CDLL | None = None,
) -> None:
    """Pack a matrix into ``out``.

    :param header: from :func:`plan_matrix`.
    :param out: uint8 ``[header.bytes]``, aligned to 64 bytes.
    """
    library = _require_library(library)
    out[: ctypes.sizeof(MatrixHeader)] = np.frombuffer(bytes(header), np.uint8)
    library.sqft_place(_pointer(out), _pointer(kept))
    pieces = np.linspace(0, header.tiles, 4 * allowed_processors() + 1).astype(int)

    def part(first: int, last: int) -> None:
        library.sqft_pack(
            *(_pointer(out), _pointer(matrix.codes), matrix.flip, _pointer(matrix.zero)),
            *(_pointer(matrix.scale), ctypes.c_size_t(first), ctypes.c_size_t(last)),
        )

    with ThreadPoolExecutor(allowed_processors()) as pool:
        for _ in pool.map(part, pieces[:-1], pieces[1:]):
            pass
    library.sqft_seal(_pointer(out))


def _copy_header(blob: np.ndarray) -> MatrixHeader:
    return MatrixHeader.from_buffer_copy(blob[: ctypes.sizeof(MatrixHeader)].tobytes())


def read_header(blob: np.ndarray, name: str, library: ctypes.CDLL | None = None) -> MatrixHeader:
    """Return the header of a packed matrix.

    :raises DamagedError: if the header is invalid or refers to bytes outside ``blob``.
    """
    size = ctypes.c_size_t(blob.nbytes)
    if _require_library(library).sqft_check(_pointer(blob), size):
        raise DamagedError(f"{name}: its weights are not in the format that these kernels read")
    return _copy_header(blob)


def unpack_matrix(
    blob: np.ndarray, name: str, library: ctypes.CDLL | None = None
) -> QuantizedWeight[np.ndarray]:
    """Return the weight that :func:`pack_matrix` packed.

    :raises DamagedError: if the packed matrix is damaged.
    """
    header = read_header(blob, name, library)
    codes = np.empty((header.rows, header.inputs), np.uint8)
    groups = header.inputs // header.stored_group
    zero = np.empty((header.rows, groups), np.uint8)
    scale = np.empty((header.rows, groups), np.float16)
    library = _require_library(library)
    library.sqft_unpack(_pointer(blob), _pointer(codes), _pointer(zero), _pointer(scale))
    return from_arrays(codes, scale, zero, header.bits)


def use_huge_pages(array: np.ndarray) -> None:
    """Request huge pages for memory that was not written yet, if the system has them.

    With pages of 4 KiB, half of the kernels' speed-up is lost.
    """
    first = -array.ctypes.data % HUGE_PAGE
    length = (array.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if length > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        address = ctypes.c_void_p(array.ctypes.data + first)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def allocate_aligned(size: int, to: int = HUGE_PAGE) -> np.ndarray:
    """Allocate a uint8 array aligned to ``to`` bytes, in huge pages.

    Pages that are never written take no memory.
    """
    memory = np.empty(size + to, np.uint8)
    start = -memory.ctypes.data % to
    array = memory[start : start + size]
    use_huge_pages(array)
    return array


def multiply(
    blob: np.ndarray,
    x: np.ndarray,
    mode: str = "auto",
    kernels: str | None = None,
    library: ctypes.CDLL | None = None,
) -> np.ndarray:
    """Multiply a packed matrix with activations on one thread; return float32 ``[tokens, rows]``.

    :param blob: written by :func:`pack_matrix` or checked by :func:`read_header`.
    :param x: float32 ``[tokens, inputs]``.
    :param mode: one: token by token; many: all at once; exact: without rounding activations; auto:
        one for a single token, else many, as in a runtime.
    :param kernels: name of an instruction set; None selects the fastest.
    :raises MemoryError: if scratch memory can't be allocated.
    """
    library = _require_library(library)
    tokens, rows = len(x), _copy_header(blob).rows
    y = np.empty((tokens, rows), np.float32)
    modes = {"auto": 0, "one": 1, "many": 2, "exact": 3}
    run: Callable[..., int] = library.sqft_multiply
    x = np.ascontiguousarray(x, np.float32)
    name = kernels.encode() if kernels else None
    if run(name, _pointer(blob), _pointer(x), ctypes.c_size_t(tokens), _pointer(y), modes[mode]):
        raise MemoryError
    return y
