"""Names of the files in a deployment folder, whoever writes or reads it; needs no runtime."""

import os
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.textfiles import read_json
from sqft_export.untrusted import (
    MAX_IR_BYTES,
    MAX_JSON_BYTES,
    MAX_ONNX_BYTES,
    fault_of_file,
    files_inside,
)

GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx", "gguf": "model.gguf"}
# A GGUF file is graph and weights.
WEIGHT_FILES = GRAPHS | {"openvino": "openvino_model.bin", "onnx": "model.onnx.data"}
SUFFIX = ".sqft"  # of a packed weight file, after the name of the dense one
GENAI_CONFIG = "genai_config.json"  # of ONNX Runtime GenAI
ADAPTER_FOLDER = "adapter"  # folder inside a deployment whose adapter is not merged
# Bytes at most of files that a program reads whole; weights are mapped or streamed.
LARGEST_READ_WHOLE = {
    **dict.fromkeys((".json", ".jinja", ".txt", ".model"), MAX_JSON_BYTES),
    ".xml": MAX_IR_BYTES,
    ".onnx": MAX_ONNX_BYTES,
}


def check_files(folder: Path) -> None:
    """Refuse a deployment that a runtime can't open safely; runtimes open any path they find.

    :raises UserError: naming an entry that is a link out of the folder or no regular file, or a
        file that is read whole and is too large for that.
    """
    for file in files_inside(folder):
        limit, size = LARGEST_READ_WHOLE.get(file.suffix), file.stat().st_size
        if limit is not None and size > limit:
            raise UserError(f"{file}: has {size:,} bytes; at most {limit:,} are read")


def _has_graph(folder: Path, runtime: str) -> bool:
    """Whether the graph's name is there; anything but a regular file under it is refused.

    :raises UserError: if it is a pipe, a device or a link to nothing.
    """
    graph = folder / GRAPHS[runtime]
    names = [graph]
    if GRAPHS[runtime] == WEIGHT_FILES[runtime]:
        names.append(graph.with_name(graph.name + SUFFIX))
    there = [file for file in names if os.path.lexists(file)]
    for file in there:
        if fault := fault_of_file(file):
            raise UserError(f"{file}: {fault}")
    return bool(there)


def is_deployment(folder: Path) -> bool:
    """Whether a folder has a graph of any runtime in it, packed or not."""
    return any(_has_graph(folder, runtime) for runtime in GRAPHS)


def runtime_of(folder: Path) -> str:
    """Which runtime a deployment is for.

    :raises UserError: if the folder is no deployment.
    """
    found = [name for name, graph in GRAPHS.items() if _has_graph(folder, name)]
    if len(found) != 1:
        raise UserError(
            f"{folder}: not a deployment; found {' and '.join(found) or 'no graph'}, expected "
            f"one of {', '.join(GRAPHS.values())}"
        )
    return found[0]


def kind_of(folder: Path) -> str:
    """The same; torch for a Hugging Face folder.

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
    """The graph of a deployment and its dense weight file, which need not be there.

    :raises UserError: if the folder is no deployment.
    """
    runtime = runtime_of(folder)
    return folder / GRAPHS[runtime], folder / WEIGHT_FILES[runtime]


def number_in_config(folder: Path, *names: str) -> int | None:
    """A number from the configs of a deployment: the first of ``names`` that one of them has."""
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
    """The most tokens that a model is for; None where no config says so.

    :raises UserError: if what a config says is no number.
    """
    return number_in_config(folder, "max_position_embeddings", "context_length")


def vocabulary_of(folder: Path) -> int:
    """Number of tokens.

    :raises UserError: if no config says it.
    """
    found = number_in_config(folder, "vocab_size")
    if found is None:
        raise UserError(f"{folder}: neither config.json nor {GENAI_CONFIG} says vocab_size")
    return found
