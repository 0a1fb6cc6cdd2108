"""Files of a deployment folder and the numbers in its configs. Needs no runtime."""

import os
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.textfiles import read_json
from sqft_export.untrusted import (
    MAX_IR_BYTES,
    MAX_JSON_BYTES,
    MAX_ONNX_BYTES,
    entries_of,
    fault_of_file,
    files_inside,
)

GRAPHS = {
    "openvino": "openvino_model.xml",
    "onnx": "model.onnx",
    "gguf": "model.gguf",
    "web": "onnx/model_q4.onnx",
}
# A GGUF file holds both graph and weights. A web folder may have more parts of its weights.
WEIGHT_FILES = GRAPHS | {
    "openvino": "openvino_model.bin",
    "onnx": "model.onnx.data",
    "web": "onnx/model_q4.onnx_data",
}
SUFFIX = ".sqft"  # appended to the name of the dense weight file
GENAI_CONFIG = "genai_config.json"  # written for ONNX Runtime GenAI
ADAPTER_FOLDER = "adapter"  # subfolder of a deployment, with its unmerged adapter
# Size limit, in bytes, of files that a program loads completely; other files: MAX_JSON_BYTES.
MAX_LOADED_BYTES = {".xml": MAX_IR_BYTES, ".onnx": MAX_ONNX_BYTES}
MAX_PARTS = 64  # of the weights of a web folder
# Weights are mapped or streamed.
UNLIMITED_SUFFIXES = (
    *(".bin", ".data", ".gguf", SUFFIX, ".safetensors", ".onnx_adapter", ".onnx_data"),
    *(f".onnx_data_{number}" for number in range(1, MAX_PARTS)),
)
# Some runtimes crash if a folder has the name of a file that they read.
FILE_SUFFIXES = (*MAX_LOADED_BYTES, *UNLIMITED_SUFFIXES, ".json", ".jinja", ".txt", ".model")


def check_files(folder: Path) -> None:
    """Refuse a deployment that is unsafe to open. Runtimes open any path that they find.

    :raises UserError: if an entry links out of the folder or is not a regular file, if a folder has
        the name of a file, or if a file that is loaded completely is too large.
    """
    files = files_inside(folder)
    for place in {path if path.is_dir() else path.parent for path in entries_of(folder)}:
        if place != folder and place.suffix in FILE_SUFFIXES:
            raise UserError(f"{one_line(place)}: {fault_of_file(place)}")
    for file in files:
        limit, size = MAX_LOADED_BYTES.get(file.suffix, MAX_JSON_BYTES), file.stat().st_size
        if file.suffix not in UNLIMITED_SUFFIXES and size > limit:
            raise UserError(f"{file}: has {size:,} bytes; at most {limit:,} are read")


def _has_graph(folder: Path, runtime: str) -> bool:
    """Return whether the folder has the graph file of a runtime, dense or packed.

    :raises UserError: if that file is a pipe, a device or a broken link.
    """
    graph = folder / GRAPHS[runtime]
    names = [graph]
    if GRAPHS[runtime] == WEIGHT_FILES[runtime]:
        names.append(graph.with_name(graph.name + SUFFIX))
    present = [file for file in names if os.path.lexists(file)]
    for file in present:
        if fault := fault_of_file(file):
            raise UserError(f"{file}: {fault}")
    return bool(present)


def is_deployment(folder: Path) -> bool:
    """Return whether a folder has a graph of any runtime, packed or not."""
    return any(_has_graph(folder, runtime) for runtime in GRAPHS)


def runtime_of(folder: Path) -> str:
    """Return the runtime of a deployment.

    :raises UserError: if the folder is not a deployment.
    """
    found = [name for name, graph in GRAPHS.items() if _has_graph(folder, name)]
    if len(found) != 1:
        raise UserError(
            f"{folder}: not a deployment; found {' and '.join(found) or 'no graph'}, expected "
            f"one of {', '.join(GRAPHS.values())}"
        )
    return found[0]


def kind_of(folder: Path) -> str:
    """Return the runtime of a deployment, or torch for a Hugging Face folder.

    :raises UserError: if the folder is neither.
    """
    if (
        not is_deployment(folder)
        and (folder / "config.json").is_file()
        and any(folder.glob("*.safetensors"))
    ):
        return "torch"
    return runtime_of(folder)


def graph_and_weights(folder: Path) -> tuple[Path, Path]:
    """Return the paths of the graph and the dense weight file, which may not exist.

    :raises UserError: if the folder is not a deployment.
    """
    runtime = runtime_of(folder)
    return folder / GRAPHS[runtime], folder / WEIGHT_FILES[runtime]


def number_in_config(folder: Path, *names: str) -> int | None:
    """Return the first of ``names`` that a config of the deployment has, or None.

    :raises UserError: if its value is not a non-negative integer.
    """
    files = [folder / f for f in ("generation_config.json", "config.json", GENAI_CONFIG)]
    for file in files:
        document = read_json(file) if file.is_file() else {}
        inner = document.get("model")
        for name in names:
            found = document.get(name, inner.get(name) if isinstance(inner, dict) else None)
            found = found[0] if isinstance(found, list) and found else found
            if found is not None and (type(found) is not int or found < 0):
                shown = one_line(repr(found))
                raise UserError(f"{file}: {name}: found {shown}; a number is expected")
            if found is not None:
                return found
    return None


def context_of(folder: Path) -> int | None:
    """Return the context length in tokens; None if no config has it.

    :raises UserError: if the value is not a number.
    """
    fields = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
    return number_in_config(folder, *fields)


def vocabulary_of(folder: Path) -> int:
    """Return the number of tokens in the vocabulary.

    :raises UserError: if no config has it.
    """
    found = number_in_config(folder, "vocab_size")
    if found is None:
        raise UserError(f"{folder}: config.json and {GENAI_CONFIG} have no vocab_size")
    return found
