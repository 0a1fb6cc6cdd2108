"""Names of the files in a deployment folder, whoever writes or reads it; needs no runtime."""

from pathlib import Path

from sqft_export.errors import UserError

GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
WEIGHT_FILES = {"openvino": "openvino_model.bin", "onnx": "model.onnx.data"}
GENAI_CONFIG = "genai_config.json"  # of ONNX Runtime GenAI
ADAPTER_FOLDER = "adapter"  # folder inside a deployment whose adapter is not merged


def runtime_of(folder: Path) -> str:
    """Which runtime a deployment is for.

    :raises UserError: if the folder is no deployment.
    """
    found = [name for name, graph in GRAPHS.items() if (folder / graph).is_file()]
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
    has_graph = any((folder / graph).is_file() for graph in GRAPHS.values())
    if not has_graph and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "torch"
    return runtime_of(folder)


def graph_and_weights(folder: Path) -> tuple[Path, Path]:
    """The graph of a deployment and its dense weight file, which need not be there.

    :raises UserError: if the folder is no deployment.
    """
    runtime = runtime_of(folder)
    return folder / GRAPHS[runtime], folder / WEIGHT_FILES[runtime]
