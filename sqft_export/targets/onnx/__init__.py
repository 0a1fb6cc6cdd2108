"""ONNX: a graph of standard or fused operators, with codes in MatMulNBits nodes.

``fused`` is the graph of ONNX Runtime GenAI's builder (``fused.py``). ``standard`` is traced by
torch (``standard.py``). Both store weights in the layout of ``weights.py``.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.recipe.schema import Export
from sqft_export.targets.folder import GRAPHS, WEIGHT_FILES
from sqft_export.targets.onnx.session import CPU_PROVIDER, open_session

if TYPE_CHECKING:
    from onnx import GraphProto

__all__ = [
    "add_adapter",
    "compressed_kernels",
    "export",
    "metadata",
    "open_session",
    "read_back",
    "read_floats",
]

MODEL, DATA = GRAPHS["onnx"], WEIGHT_FILES["onnx"]
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
)


def export(
    merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
) -> None:
    """Write the deployment folder of a merged model: graph, external data, GenAI config.

    :param merged: Hugging Face folder, in the GPTQ layout or with float weights.
    """
    import onnx

    from sqft_export.model.architecture import transformers_config
    from sqft_export.model.contexts import cache_sizes, deployed_config, named_config
    from sqft_export.model.families import builder_lacks
    from sqft_export.model.storage import model_facts
    from sqft_export.targets.onnx import fused, standard
    from sqft_export.targets.onnx.weights import ExternalData, Weights

    weights = Weights(merged)
    checkpoint = weights.checkpoint
    config = named_config(transformers_config(checkpoint.config, checkpoint.where))
    built = builder_lacks(checkpoint.family, deployed_config(config)) is None
    is_fused = built if options.onnx_graph == "auto" else options.onnx_graph == "fused"
    build = fused.build if is_fused else standard.build
    with ExternalData(folder / DATA) as data:
        model = build(weights, folder, data)
    _fix_cache_sizes(model.graph, cache_sizes(config))
    for key, value in (facts or model_facts(weights.checkpoint)).items():
        model.metadata_props.add(key=f"sqft_export.{key}", value=value)
    onnx.save(model, folder / MODEL)
    for pattern in TOKENIZER_FILES:
        for file in merged.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _fix_cache_sizes(graph: "GraphProto", sizes: list[tuple[int, int]]) -> None:
    """Write head count and head size into the cache shapes, so that a reader can make a cache.

    :param sizes: heads and head size of each layer.
    """
    for value in (*graph.input, *graph.output):
        if value.name.endswith((".key", ".value")):
            dims = value.type.tensor_type.shape.dim
            layer = int(value.name.split(".")[1])
            dims[1].dim_value, dims[3].dim_value = sizes[layer]


def add_adapter(folder: Path, adapter: Path) -> None:
    """Add an unmerged adapter to the deployment; see ``adapter.py``."""
    from sqft_export.targets.onnx import adapter as files

    files.add_adapter(folder, adapter)


def read_back(folder: Path) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, one at a time, from the written file.

    Codes are uint8 ``[out, in]``, scales float32 and zero points uint8 ``[out, groups]``.
    """
    import onnx

    from sqft_export.targets.onnx.weights import read_quantized_weights

    return read_quantized_weights(onnx.load(folder / MODEL, load_external_data=False), folder)


def read_floats(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of float constants, float32.

    The name of a matrix ``[out, in]`` is its module. Other constants have the name of their
    initializer.
    """
    import onnx

    from sqft_export.targets.onnx.weights import read_float_weights

    return read_float_weights(onnx.load(folder / MODEL, load_external_data=False), folder)


def metadata(folder: Path) -> dict[str, str]:
    """Return the model facts that the graph stores."""
    import onnx

    model = onnx.load(folder / MODEL, load_external_data=False)
    prefix = "sqft_export."
    found = {p.key: p.value for p in model.metadata_props if p.key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def compressed_kernels(folder: Path, scratch: Path) -> set[str]:
    """Return the modules that read codes in the graph that ONNX Runtime optimizes for the CPU."""
    import onnx

    from sqft_export.targets.onnx.weights import product_parts

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=scratch) as copy:
        optimized = Path(copy) / MODEL
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", DATA
        )
        ort.InferenceSession(str(folder / MODEL), options, providers=[CPU_PROVIDER])
        graph = onnx.load(optimized, load_external_data=False).graph
    found = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            found |= {part.linear for part in product_parts(node)}
        elif node.op_type == "GatherBlockQuantized":
            found.add(node.input[0].removesuffix(".B"))
    return found
