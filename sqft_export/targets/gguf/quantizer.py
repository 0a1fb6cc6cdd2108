"""llama.cpp's own quantizer, in this process, with an importance matrix.

It makes the files that users of llama.cpp know, such as Q4_K_M. A report compares with them.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.errors import UserError
from sqft_export.libraries.cyllama import importance_entries, set_importance
from sqft_export.machine.host import installed
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.loaders import silence_llama_cpp
from sqft_export.targets.folder import GRAPHS

if TYPE_CHECKING:
    from gguf import ReaderTensor

# File type -> its number in llama.cpp (``enum llama_ftype``).
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q3_K_M": 12, "Q4_K_M": 15}
SUPER_BLOCK = 256  # inputs per block of a K-quant
NO_MATRIX = "without an importance matrix: this version of cyllama can't take one"


def quantize_gguf(
    source: Path, folder: Path, file_type: str, matrix: dict[str, np.ndarray], threads: int
) -> list[str]:
    """Write a copy of a float deployment that llama.cpp's quantizer has quantized.

    :param source: GGUF folder with float weights.
    :param file_type: key of ``FILE_TYPES``.
    :param matrix: tensor name -> mean squared input, float32 ``[in]``.
    :return: notes for the table: fallback types, and a missing importance matrix.
    :raises UserError: if llama.cpp refuses the file.
    """
    file = GRAPHS["gguf"]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(file))
    run = _quantize_with_cyllama if installed("cyllama") else _quantize_with_llama_cpp
    notes = run(source / file, folder / file, FILE_TYPES[file_type], matrix, threads)
    return notes + fallback_notes(folder / file)


def _quantize_with_cyllama(
    source: Path, made: Path, number: int, matrix: dict[str, np.ndarray], threads: int
) -> list[str]:
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = number, threads
    entries = importance_entries(matrix)
    notes = [] if set_importance(params, entries) else [NO_MATRIX]
    try:
        llama_cpp.model_quantize(str(source), str(made), params)
    except RuntimeError as error:
        raise UserError(f"{source}: llama.cpp can't quantize it: {error}") from error
    return notes


def _quantize_with_llama_cpp(
    source: Path, made: Path, number: int, matrix: dict[str, np.ndarray], threads: int
) -> list[str]:
    import ctypes

    import llama_cpp

    silence_llama_cpp(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, threads
    entries = importance_entries(matrix)
    params.imatrix = ctypes.addressof(entries)
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(made).encode(), ctypes.byref(params)
    )
    if status:
        raise UserError(f"{source}: llama.cpp can't quantize it: status {status}")
    return []


def fallback_notes(file: Path) -> list[str]:
    """Return a note if a file with K-quants stores other matrices in other types.

    A block of a K-quant has 256 inputs. A matrix whose inputs 256 does not divide has another type.

    >>> fallback_notes(file)
    ['60 of 210 matrices are not K-quants, because 256 does not divide their inputs: 60 Q5_0']
    """
    matrices = [t for t in read_gguf(file).tensors if t.name.startswith("blk.") and _is_matrix(t)]
    other = [t for t in matrices if int(t.shape[0]) % SUPER_BLOCK]
    names = {t.tensor_type.name for t in matrices}
    if not other or not any(name.endswith("_K") for name in names):
        return []
    kinds = Counter(t.tensor_type.name for t in other)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [
        f"{len(other)} of {len(matrices)} matrices are not K-quants, because {SUPER_BLOCK} does "
        f"not divide their inputs: {listed}"
    ]


def _is_matrix(tensor: "ReaderTensor") -> bool:
    return len(tensor.shape) > 1 and tensor.name.endswith(".weight") and "norm" not in tensor.name
