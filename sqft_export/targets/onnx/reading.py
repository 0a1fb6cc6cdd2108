"""Read codes, floats, facts and kernels of a deployment for ONNX Runtime or the web."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.targets.folder import graph_and_weights
from sqft_export.targets.onnx.session import CPU_PROVIDER

if TYPE_CHECKING:
    from onnx import ModelProto

FACT_PREFIX = "sqft_export."


def _load_graph(folder: Path) -> "ModelProto":
    import onnx

    return onnx.load(graph_and_weights(folder)[0], load_external_data=False)


def read_back(folder: Path) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, one at a time.

    Codes are uint8 ``[out, in]``, scales float32 and zero points uint8 ``[out, groups]``.
    """
    from sqft_export.targets.onnx.weights import read_quantized_weights

    return read_quantized_weights(_load_graph(folder), folder)


def read_floats(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of float constants, float32.

    The name of a matrix ``[out, in]`` is its module. Other constants have the name of their
    initializer.
    """
    from sqft_export.targets.onnx.weights import read_float_weights

    return read_float_weights(_load_graph(folder), folder)


def metadata(folder: Path) -> dict[str, str]:
    """Return the model facts that the graph stores."""
    stored = _load_graph(folder).metadata_props
    found = {p.key: p.value for p in stored if p.key.startswith(FACT_PREFIX)}
    return {key.removeprefix(FACT_PREFIX): value for key, value in found.items()}


def compressed_kernels(folder: Path, scratch: Path) -> set[str]:
    """Return the modules that read codes in the graph that ONNX Runtime optimizes for the CPU.

    :param scratch: folder for the optimized graph.
    """
    import onnx

    from sqft_export.targets.onnx.weights import product_parts

    graph, _ = graph_and_weights(folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=scratch) as copy:
        optimized = Path(copy) / graph.name
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{graph.name}.data"
        )
        ort.InferenceSession(str(graph), options, providers=[CPU_PROVIDER])
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    found = set()
    for node in nodes:
        if node.op_type == "MatMulNBits":
            found |= {part.linear for part in product_parts(node)}
        elif node.op_type == "GatherBlockQuantized":
            found.add(node.input[0].removesuffix(".B"))
    return found
