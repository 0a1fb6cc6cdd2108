"""ONNX: a graph of standard or fused operators, with codes in MatMulNBits nodes.

``fused`` is the graph of ONNX Runtime GenAI's builder (``fused.py``). ``standard`` is traced by
torch (``standard.py``). Both store weights in the layout of ``weights.py``.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.recipe.schema import Export
from sqft_export.targets.folder import GRAPHS, WEIGHT_FILES
from sqft_export.targets.onnx.reading import (
    FACT_PREFIX,
    compressed_kernels,
    metadata,
    read_back,
    read_floats,
)
from sqft_export.targets.onnx.session import open_session

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
        model.metadata_props.add(key=f"{FACT_PREFIX}{key}", value=value)
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
