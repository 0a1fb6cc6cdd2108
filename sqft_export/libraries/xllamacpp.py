"""Private parts of xllamacpp: the C functions of the llama.cpp that its extension module contains.

xllamacpp documents a server only, but its wheels show all functions of llama.cpp, so that our
kernels can run in it. The parameter structures differ between versions. The fields that we set are
found by their default values.
"""

import ctypes
import functools
import struct
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

DISTRIBUTION = "xllamacpp"
PRIVATE = ("xllamacpp.xllamacpp:Server",)
_STRUCTURE_BYTES = 512  # more than llama.cpp's parameters have
# Defaults of adjacent fields, as llama.cpp sets them.
_CELLS = struct.pack("4I", 512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max
_THREADS = struct.pack("2i", 4, 4)  # n_threads, n_threads_batch
_CHOSEN_BY_LLAMA_CPP = struct.pack("4i", -1, -1, -1, -1)  # the last one: flash_attn_type
_CACHE_TYPES = struct.pack("2i", 1, 1)  # type_k, type_v: float16
_CONTEXT_FLAGS = bytes([0, 1, 1, 1, 1, 0])  # the last one: kv_unified
_POINTERS = struct.calcsize("2P")  # before n_gpu_layers
_MODEL_FLAGS = bytes([0, 0, 1, 0])  # the last one: no_host

_Fields = list[tuple[str, int, type]]  # name, offset, type


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_POINTER, _NUMBER, _FLAG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
# Function -> type of the result, and types of the arguments. None: no result.
_FUNCTIONS: dict[str, tuple[type | None, ...]] = {
    "llama_backend_init": (None,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p),
    "llama_model_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_NUMBER, _POINTER),
    "llama_tokenize": (
        *(_NUMBER, _POINTER, ctypes.c_char_p, _NUMBER, ctypes.POINTER(_NUMBER), _NUMBER),
        *(_FLAG, _FLAG),
    ),
    "llama_init_from_model": (_POINTER, _POINTER),
    "llama_free": (None, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, _FLAG),
    "llama_memory_seq_cp": (None, _POINTER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    "llama_memory_seq_rm": (_FLAG, _POINTER, _NUMBER, _NUMBER, _NUMBER),
    "llama_batch_init": (_Batch, _NUMBER, _NUMBER, _NUMBER),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_NUMBER, _POINTER, _Batch),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), _POINTER, _NUMBER),
    "llama_log_set": (None, _POINTER, _POINTER),
    "llama_print_system_info": (ctypes.c_char_p,),
}


def extension_module() -> Path | None:
    """Return the file of xllamacpp's extension module; None if it is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))), None)


@functools.cache
def llama_functions() -> SimpleNamespace | None:
    """Return an object with llama.cpp's functions, under the names of ``llama_cpp``'s module.

    :return: None if xllamacpp is not installed, hides a function, or has unknown parameters.
    """
    file = extension_module()
    if file is None:
        return None
    library = ctypes.CDLL(str(file))
    if not all(hasattr(library, name) for name in _FUNCTIONS):
        return None
    model = _structure(_model_fields(_defaults(library, "model")))
    context = _structure(_context_fields(_defaults(library, "context")))
    if model is None or context is None:
        return None
    found = SimpleNamespace(llama_token=_NUMBER)
    for name, (result, *arguments) in _FUNCTIONS.items():
        setattr(found, name, _declared(library, name, result, arguments))
    found.llama_model_load_from_file.argtypes += [model]
    found.llama_init_from_model.argtypes += [context]
    for name, kind in (("model", model), ("context", context)):
        function = f"llama_{name}_default_params"
        setattr(found, function, _declared(library, function, kind, []))
    return found


def _declared(
    library: ctypes.CDLL, name: str, result: type | None, arguments: list
) -> "ctypes._NamedFuncPointer":
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _defaults(library: ctypes.CDLL, name: str) -> bytes:
    """Return the bytes of the default parameters of a model or a context."""

    class Bytes(ctypes.Structure):
        _fields_ = [("content", ctypes.c_uint8 * _STRUCTURE_BYTES)]

    # The caller's memory may be larger than the structure that is written into it.
    return bytes(_declared(library, f"llama_{name}_default_params", Bytes, [])().content)


def _model_fields(defaults: bytes) -> _Fields:
    """Return the fields of ``llama_model_params`` that we set; none if they are not found."""
    flags = defaults.find(_MODEL_FLAGS, 2 * _POINTERS)
    if defaults[_POINTERS : _POINTERS + 4] != struct.pack("i", -1) or flags < 0:
        return []
    return [
        ("n_gpu_layers", _POINTERS, _NUMBER),
        ("no_host", flags + len(_MODEL_FLAGS) - 1, _FLAG),
    ]


def _context_fields(defaults: bytes) -> _Fields:
    """Return the fields of ``llama_context_params`` that we set; none if they are not found."""
    places, at = [], 0
    for mark in (_CELLS, _THREADS, _CHOSEN_BY_LLAMA_CPP, _CACHE_TYPES, _CONTEXT_FLAGS):
        at = defaults.find(mark, at)
        if at < 0:
            return []
        places.append(at)
        at += len(mark)
    cells, threads, chosen, types, flags = places
    if cells or any(place % 4 for place in places):
        return []
    names = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
    return [
        *((name, 4 * index, _NUMBER) for index, name in enumerate(names)),
        ("n_threads", threads, _NUMBER),
        ("n_threads_batch", threads + 4, _NUMBER),
        ("flash_attn_type", chosen + 12, _NUMBER),
        ("type_k", types, _NUMBER),
        ("type_v", types + 4, _NUMBER),
        ("kv_unified", flags + len(_CONTEXT_FLAGS) - 1, _FLAG),
    ]


def _structure(fields: _Fields) -> type[ctypes.Structure] | None:
    """Return a structure with fields at their offsets, and room after them; None without fields.

    It is passed by value. A function reads only as many bytes as its own structure has.
    """
    if not fields:
        return None
    listed, end = list[tuple[str, type]](), 0
    for name, offset, kind in sorted(fields, key=lambda field: field[1]):
        if offset > end:
            listed.append((f"_until_{name}", ctypes.c_uint8 * (offset - end)))
        listed.append((name, kind))
        end = offset + ctypes.sizeof(kind)
    listed.append(("_rest", ctypes.c_uint8 * (_STRUCTURE_BYTES - end)))
    return type("Parameters", (ctypes.Structure,), {"_fields_": listed})
