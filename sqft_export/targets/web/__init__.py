"""Web pages: the folder that Transformers.js loads, with graph and codes of the ONNX target.

graph    the graph with its external data under the names that Transformers.js expects
config   ``config.json``, ``generation_config.json`` and tokenizer

The page itself is in the package ``web``. On this machine, ONNX Runtime runs the same file.
"""

import tempfile
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.recipe.schema import Export
from sqft_export.targets import onnx
from sqft_export.targets.folder import ADAPTER_FOLDER, GRAPHS
from sqft_export.targets.onnx.reading import (
    compressed_kernels,
    metadata,
    read_back,
    read_floats,
)
from sqft_export.targets.onnx.session import OnnxSession, open_decoder
from sqft_export.targets.web.config import read_decoder_sizes, write_browser_configs
from sqft_export.targets.web.graph import write_graph

__all__ = [
    "add_adapter",
    "compressed_kernels",
    "convert_onnx",
    "export",
    "metadata",
    "open_session",
    "read_back",
    "read_floats",
]

MODEL = GRAPHS["web"]
NO_ADAPTER = "Transformers.js applies no adapter; adapt.pipeline: qa-sparsepeft merges it"


def export(
    merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
) -> None:
    """Write the model folder of a page: graph, external data, configs, tokenizer.

    :param merged: Hugging Face folder, in the GPTQ layout or with float weights.
    """
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder.parent) as scratch:
        onnx.export(merged, Path(scratch), options, facts)
        convert_onnx(Path(scratch), folder)


def convert_onnx(deployment: Path, folder: Path) -> None:
    """Write the model folder of a page from an ONNX deployment; the weights stay the same bytes.

    :raises UserError: if the deployment lacks a file or has an unmerged adapter, or a tensor is
        too large for a browser.
    """
    if (deployment / ADAPTER_FOLDER).is_dir():
        raise UserError(f"{deployment}: has an unmerged adapter; {NO_ADAPTER}")
    graph = folder / MODEL
    graph.parent.mkdir()
    written = write_graph(deployment, graph.parent)
    write_browser_configs(deployment, folder, written)


def add_adapter(folder: Path, adapter: Path) -> None:
    """Refuse an unmerged adapter.

    :raises UserError: always; ``plan`` refuses such a recipe before any work.
    """
    raise UserError(f"{folder}: {NO_ADAPTER}")


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> OnnxSession:
    """Load the page's file into ONNX Runtime on this machine.

    :param exact: float32 activations in every MatMulNBits; else the accuracy level of the file.
    """
    return open_decoder(folder, read_decoder_sizes(folder), exact, threads, device)
