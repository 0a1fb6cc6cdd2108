"""Write an ONNX graph with its external data under the names that Transformers.js expects.

Transformers.js 4.3 downloads ``model_q4.onnx`` and, if its config announces ``n`` parts, the files
``model_q4.onnx_data``, ``model_q4.onnx_data_1``, ... (``getExternalDataChunkNames`` in its
``model-loader.js``). A browser holds each file in one buffer of less than 2 GiB.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.errors import UserError
from sqft_export.targets.folder import GRAPHS, MAX_PARTS, graph_and_weights

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

BROWSER_GRAPH = Path(GRAPHS["web"]).name
PART_BYTES = 2_000_000_000  # largest part


@dataclass(frozen=True)
class GraphFiles:
    """What was written.

    parts: number of files with external data.
    cache_type: ``float32`` or ``float16``, the type of the key-value cache.
    """

    parts: int
    cache_type: str


@dataclass(frozen=True)
class _Span:
    """Bytes of one tensor in the external data."""

    tensor: "TensorProto"
    start: int
    length: int


def write_graph(deployment: Path, folder: Path, part_bytes: int = PART_BYTES) -> GraphFiles:
    """Write graph and external data of an ONNX deployment; codes and scales stay the same bytes.

    :param part_bytes: largest size of a part, in bytes.
    :raises UserError: if one tensor is larger than a part.
    """
    import onnx

    graph, weights = graph_and_weights(deployment)
    model = onnx.load(graph, load_external_data=False)
    spans = sorted(map(_span, _external(model)), key=lambda span: span.start)
    parts = _split(spans, part_bytes, deployment)
    for number, part in enumerate(parts):
        _write_part(weights, folder / part_name(number), part)
    onnx.save(model, folder / BROWSER_GRAPH)
    return GraphFiles(len(parts), _cache_type(model))


def part_name(number: int) -> str:
    """Return the file name of a part of the external data."""
    return f"{BROWSER_GRAPH}_data" + (f"_{number}" if number else "")


def _external(model: "ModelProto") -> "list[TensorProto]":
    return [tensor for tensor in model.graph.initializer if tensor.external_data]


def _span(tensor: "TensorProto") -> _Span:
    found = {entry.key: entry.value for entry in tensor.external_data}
    return _Span(tensor, int(found.get("offset", 0)), int(found["length"]))


def _split(spans: list[_Span], part_bytes: int, deployment: Path) -> list[list[_Span]]:
    """Split tensors, in file order, into parts."""
    parts: list[list[_Span]] = []
    for span in spans:
        if span.length > part_bytes:
            raise UserError(
                f"{deployment}: {span.tensor.name} has {span.length:,} bytes; a browser holds at "
                f"most {part_bytes:,} in one buffer; export a smaller model or fewer bits"
            )
        if not parts or span.start + span.length - parts[-1][0].start > part_bytes:
            parts.append([])
        parts[-1].append(span)
    if len(parts) > MAX_PARTS:
        raise UserError(
            f"{deployment}: its weights need {len(parts)} parts of {part_bytes:,} bytes; a page "
            f"loads at most {MAX_PARTS}"
        )
    return parts


def _write_part(weights: Path, file: Path, part: list[_Span]) -> None:
    """Copy the tensors of a part, and refer to them in the graph."""
    first, end = part[0].start, part[-1].start + part[-1].length
    np.memmap(weights, np.uint8, "r")[first:end].tofile(file)
    for span in part:
        del span.tensor.external_data[:]
        where = {"location": file.name, "offset": span.start - first, "length": span.length}
        for key, value in where.items():
            span.tensor.external_data.add(key=key, value=str(value))


def _cache_type(model: "ModelProto") -> str:
    """Return the type of the key-value cache that the graph takes."""
    from onnx import TensorProto

    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    return names[caches[0].type.tensor_type.elem_type]
