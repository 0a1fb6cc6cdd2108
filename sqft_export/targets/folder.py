"""Names of the files in a deployment folder, whoever writes or reads it; needs no runtime."""

from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.textfiles import read_json

GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx", "gguf": "model.gguf"}
# A GGUF file is graph and weights.
WEIGHT_FILES = GRAPHS | {"openvino": "openvino_model.bin", "onnx": "model.onnx.data"}
SUFFIX = ".sqft"  # of a packed weight file, after the name of the dense one
GENAI_CONFIG = "genai_config.json"  # of ONNX Runtime GenAI
ADAPTER_FOLDER = "adapter"  # folder inside a deployment whose adapter is not merged


CUSTOM_LIBRARY = "custom_ops_library"


def check_genai_config(folder: Path) -> None:
    """Refuse a ``genai_config.json`` that has code of its folder run, or reads outside it.

    :raises UserError: naming the entry.
    """
    file = folder / GENAI_CONFIG
    if not file.is_file():
        raise UserError(f"{file}: is missing")
    for path, value in _entries(read_json(file)):
        if path.endswith(f".{CUSTOM_LIBRARY}") and value:
            raise UserError(
                f"{file}: {path}: {value!r} is a library that would be run; where you trust it, "
                "pass trust_custom_ops=True"
            )
        if path.endswith(".filename") and Path(str(value)).name != value:
            raise UserError(f"{file}: {path}: found {value!r}; a file of the folder is expected")


def _entries(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [e for key, value in node.items() for e in _entries(value, f"{path}.{key}")]
    if isinstance(node, list):
        return [e for value in node for e in _entries(value, path)]
    return [(path, node)]


def _has_graph(folder: Path, runtime: str) -> bool:
    graph = folder / GRAPHS[runtime]
    packed = graph.with_name(graph.name + SUFFIX)
    return graph.is_file() or (GRAPHS[runtime] == WEIGHT_FILES[runtime] and packed.is_file())


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
    has_graph = any(_has_graph(folder, runtime) for runtime in GRAPHS)
    if not has_graph and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
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
                raise UserError(f"{file}: {name}: found {found!r}; a number is expected")
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
