"""Private parts of ONNX Runtime GenAI: the classes of its model builder."""

from pathlib import Path

import onnx_ir as ir
from torch import nn

DISTRIBUTION = "onnxruntime-genai"
_BUILDER = "onnxruntime_genai.models.builder"
PRIVATE = (
    f"{_BUILDER}:parse_extra_options",
    *(f"{_BUILDER}:LlamaModel.{method}" for method in ("load_weights", "make_model")),
    *(f"{_BUILDER}:LlamaModel.{method}" for method in ("make_genai_config", "save_processing")),
)


def build_graph(
    class_name: str, model: nn.Module, configs: Path, out: Path, cache: Path
) -> ir.Model:
    """Return the builder's float32 graph of a model in memory, sorted.

    :param class_name: class of the builder.
    :param configs: folder with ``config.json`` and tokenizer.
    :param out: folder for ``genai_config.json`` and tokenizer.
    :param cache: folder for the builder's temporary files.
    """
    from onnxruntime_genai.models import builder
    from onnxruntime_genai.models.builders import qwen

    arguments = ("", str(configs), str(out), "fp32", "cpu", str(cache))
    options = builder.parse_extra_options(*arguments, [])
    options.pop("_effective_builder_config")
    details = options.pop("hf_details")

    # The decoder of Qwen3.5 is only a part of the classes in ``builder``.
    base = getattr(builder, class_name, None) or getattr(qwen, class_name)

    class Graph(base):  # type: ignore[misc, valid-type]
        def load_weights(self, input_path):
            return model

    config, extra = details["hf_config"], details["extra_kwargs"]
    if rope := getattr(config, "rope_parameters", None):
        rope["type"] = rope["rope_type"]  # the builder's longrope class reads this key
    graph = Graph(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", str(cache), options)
    graph.make_model(str(configs))
    graph.make_genai_config(config, extra, str(out))
    graph.save_processing(details["hf_name"], extra, str(out))
    graph.model.graph.sort()
    return graph.model
