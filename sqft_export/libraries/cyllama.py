"""Private parts of cyllama: the importance matrix of llama.cpp's quantizer.

``LlamaModelQuantizeParams`` wraps llama.cpp's ``llama_model_quantize_params``. Every field but
``imatrix`` can be set. That field is a pointer to an array of :class:`ImportanceEntry`, which ends
with an entry without a name. The pointer is written into the object. Its place follows from the
fields before it, which are found by their values.
"""

import ctypes
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams

DISTRIBUTION = "cyllama"
PRIVATE = (
    "cyllama.llama.llama_cpp:LlamaModelQuantizeParams",
    "cyllama.llama.llama_cpp:model_quantize",
)
_MARKS = (-20_251, 2, 14, 14)  # nthread, ftype, and the types of head and embedding, while searched
_FLAG_BYTES = 8  # six flags, padded to the alignment of a pointer


class ImportanceEntry(ctypes.Structure):
    """``llama_model_imatrix_data``: the importance of every input of a tensor."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


def importance_entries(matrix: dict[str, np.ndarray]) -> "ctypes.Array[ImportanceEntry]":
    """Return the array that llama.cpp reads; it points to the arrays of ``matrix``.

    :param matrix: tensor name -> importance of every input, contiguous float32 ``[in]``.
    """
    entries = (ImportanceEntry * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def set_importance(
    params: "LlamaModelQuantizeParams", entries: "ctypes.Array[ImportanceEntry]"
) -> bool:
    """Let ``params`` point to ``entries``, which must outlive their use.

    :return: False if this version of cyllama stores the fields in another order.
    """
    place = _importance_place(params)
    if place is None:
        return False
    ctypes.c_void_p.from_address(id(params) + place).value = ctypes.addressof(entries)
    return True


def _importance_place(params: "LlamaModelQuantizeParams") -> int | None:
    """Return the offset of the pointer in the object, or None if the fields are not found."""
    names = ("nthread", "ftype", "output_tensor_type", "token_embedding_type")
    before = [getattr(params, name) for name in names]
    for name, mark in zip(names, _MARKS, strict=True):
        setattr(params, name, mark)
    size = type(params).__basicsize__
    content = ctypes.string_at(id(params), size)
    for name, value in zip(names, before, strict=True):
        setattr(params, name, value)
    start = content.find(struct.pack("4i", *_MARKS))
    place = start + struct.calcsize("4i") + _FLAG_BYTES
    pointer = ctypes.sizeof(ctypes.c_void_p)
    fits = start >= 0 and place + pointer <= size
    return place if fits and not any(content[place : place + pointer]) else None
