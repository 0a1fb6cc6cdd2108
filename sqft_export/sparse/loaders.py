"""Load a deployment whose weights are packed: inflated in memory, then handed to the runtime.

The runtime sees the graph of the dense folder and the bytes of its weights: the same kernels, the
same results. A dense folder loads too.
"""

from pathlib import Path
from typing import Any

from sqft_export.sparse.container import PackedFile
from sqft_export.sparse.folders import graph_and_weights, packed_file


def _openvino_weights(file: Path) -> Any:
    """Dense weights in an ``openvino.Tensor`` of its own memory, which a model then shares."""
    import openvino as ov

    with PackedFile(file) as packed:
        tensor = ov.Tensor(ov.Type.u8, ov.Shape([packed.header.size]))
        packed.inflate(tensor.data)
    return tensor


def load_openvino(folder: str | Path, core: Any = None) -> Any:
    """An ``openvino.Model``, ready to be compiled.

    :param core: an ``openvino.Core``; None for a new one.
    :raises UserError: if the weights are damaged.
    """
    import openvino as ov

    folder = Path(folder)
    graph, _ = graph_and_weights(folder)
    core = core or ov.Core()
    packed = packed_file(folder)
    if packed is None:
        return core.read_model(graph)
    return core.read_model(graph.read_bytes(), _openvino_weights(packed))


def load_openvino_genai(folder: str | Path, device: str = "CPU", **properties: Any) -> Any:
    """An ``openvino_genai.LLMPipeline``.

    :param properties: of the device, as ``LLMPipeline`` takes them.
    :raises UserError: if the weights are damaged.
    """
    import openvino_genai

    folder = Path(folder)
    graph, _ = graph_and_weights(folder)
    packed = packed_file(folder)
    if packed is None:
        return openvino_genai.LLMPipeline(str(folder), device, **properties)
    generation = folder / "generation_config.json"
    config = openvino_genai.GenerationConfig()
    if generation.is_file():
        config = openvino_genai.GenerationConfig(str(generation))
    weights = _openvino_weights(packed)
    tokenizer = openvino_genai.Tokenizer(str(folder))
    return openvino_genai.LLMPipeline(
        graph.read_text(), weights, tokenizer, device, config, **properties
    )


def load_onnx(folder: str | Path, options: Any = None, providers: Any = None) -> Any:
    """An ``onnxruntime.InferenceSession``.

    :param options: ``SessionOptions``; None for the defaults.
    :raises UserError: if the weights are damaged.
    """
    import onnxruntime as ort

    folder = Path(folder)
    graph, weights = graph_and_weights(folder)
    options = options or ort.SessionOptions()
    if file := packed_file(folder):
        with PackedFile(file) as packed:
            dense, initializers = packed.inflate(), packed.header.initializers
        if initializers:  # used where they lie; the runtime copies a file in memory
            options.add_external_initializers(
                [one.name for one in initializers],
                [
                    ort.OrtValue.ortvalue_from_numpy(
                        dense[one.at : one.at + one.bytes].view(one.type).reshape(one.dims)
                    )
                    for one in initializers
                ],
            )
        else:
            options.add_external_initializers_from_files_in_memory(
                [weights.name], [dense], [len(dense)]
            )
    return ort.InferenceSession(
        str(graph), options, providers=providers or ["CPUExecutionProvider"]
    )
