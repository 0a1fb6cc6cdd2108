"""Trace a graph of standard operators from the Hugging Face model by torch.

The graph passes the full ``onnx.checker``, and OpenVINO reads it. Every Linear is traced as one
node: ``MatMulNBits`` if it is quantized, else ``MatMul``. Its weights are written directly to the
data file. torch never loads them.
"""

import inspect
import json
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from sqft_export.model.config import ModelConfig
from sqft_export.model.contexts import UNLIMITED_CONTEXT, cache_sizes, context_length, named_config
from sqft_export.model.skeleton import PLAIN_ATTENTION, empty_matrix, skeleton
from sqft_export.targets.folder import GENAI_CONFIG
from sqft_export.targets.onnx.weights import (
    DEPLOYED_ACCURACY,
    ExternalData,
    Rows,
    Weights,
    block_arrays,
    block_size,
    quantize_gather,
)

OPSET = 21
GENAI_TYPE = "decoder"  # GenAI's type for any decoder that is described by its inputs and outputs
INPUTS = ("input_ids", "attention_mask", "position_ids")
TokenField = Literal["bos_token_id", "eos_token_id", "pad_token_id"]
TokenIds = int | list[int] | None


class _Product(nn.Module):
    """A placeholder for a Linear. Its weights are empty and named after the Linear.

    :param number: differs per product, because the exporter stores equal constants once.
    """

    def __init__(self, name: str, linear: nn.Linear, weights: Weights, number: int):
        super().__init__()
        self.outputs = linear.out_features
        self.bias = linear.bias
        if name not in weights.quantized:
            self.operator, self.attributes = "MatMul", None
            self.register_buffer("weight", empty_matrix(linear.in_features, self.outputs, number))
            return
        bits, group_size, symmetric = weights.kind(Rows(name))
        size = block_size(linear.in_features, group_size)
        blocks = -(-linear.in_features // size)
        self.operator = "com.microsoft::MatMulNBits"
        self.attributes = {"K": linear.in_features, "N": self.outputs, "bits": bits}
        self.attributes |= {"block_size": size, "accuracy_level": DEPLOYED_ACCURACY}
        codes = empty_matrix(self.outputs, blocks * size * bits // 8, number, np.uint8)
        self.register_buffer("B", codes.reshape(self.outputs, blocks, -1))
        self.register_buffer("scales", empty_matrix(self.outputs, blocks, number))
        if not symmetric:
            width = -(-blocks * bits // 8)
            self.register_buffer("zero_points", empty_matrix(self.outputs, width, number, np.uint8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.onnx.ops.symbolic(
            self.operator,
            (x, *self.buffers()),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.outputs),
            version=None if self.attributes is None else 1,
        )
        return y if self.bias is None else y + self.bias


class _Decoder(nn.Module):
    """The model with its cache as plain input and output tensors."""

    def __init__(self, model: nn.Module, positions: bool):
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, input_ids, attention_mask, position_ids, past):
        found = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past),
            use_cache=True,
            **found,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def build(weights: Weights, folder: Path, data: ExternalData) -> onnx.ModelProto:
    """Return the graph. Write weights to ``data`` and ``genai_config.json`` to ``folder``."""
    model = skeleton(weights.checkpoint, attention=PLAIN_ATTENTION)
    is_router = weights.checkpoint.family.is_router
    for number, (name, module) in enumerate(list(model.named_modules()), start=1):
        if is_router(name):  # may compute more than a product; marked as products are
            outputs, inputs = module.weight.shape
            marked = empty_matrix(outputs, inputs, number)
            module.weight = nn.Parameter(marked, requires_grad=False)
        elif isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _Product(name, module, weights, number))
    decoder = _decoder_config(model.config)
    proto = _trace(model)
    _place(proto.graph, weights, data)
    _write_config(weights.checkpoint.config, model, decoder, proto, folder)
    return proto


def _decoder_config(config: PretrainedConfig) -> dict[str, int]:
    """Return the sizes of the decoder by GenAI's names."""
    caches = cache_sizes(named_config(config))
    return {
        "head_size": caches[0][1],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(caches),  # GenAI makes a cache for each
        "num_key_value_heads": caches[0][0],
    }


def _cache_names(layers: int, kind: str) -> list[str]:
    """Return the names of the cache tensors, keys and values per layer."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _trace(model: nn.Module) -> onnx.ModelProto:
    """Return the graph by torch's exporter, without initializers of matrices."""
    batch, length, cached = 2, 3, 4
    shapes = [
        (batch, heads, cached, size) for heads, size in cache_sizes(named_config(model.config))
    ]
    past = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    arguments = (
        torch.ones(batch, length, dtype=torch.int64),
        torch.ones(batch, cached + length, dtype=torch.int64),
        torch.arange(cached, cached + length).repeat(batch, 1),
        past,
    )
    dynamic = torch.export.Dim.DYNAMIC
    tokens, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    positions = "position_ids" in inspect.signature(model.forward).parameters
    program = torch.onnx.export(
        _Decoder(model, positions).eval(),
        arguments,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=(tokens, tokens, tokens, [(cache, cache) for _ in past]),
        input_names=[*INPUTS, *_cache_names(len(past), "past_key_values")],
        output_names=["logits", *_cache_names(len(past), "present")],
    )
    assert program is not None
    initializers = program.model.graph.initializers
    for name, value in list(initializers.items()):
        if name.startswith("model.") and value.shape is not None and len(value.shape) >= 2:
            initializers.pop(name)
    return ir.to_proto(program.model)


def _place(graph: onnx.GraphProto, weights: Weights, data: ExternalData) -> None:
    """Write the weights of all products and embeddings, and connect them to the traced nodes."""
    wanted = {name for node in graph.node for name in node.input}
    gathers = {node.input[0]: node for node in graph.node if node.op_type == "Gather"}
    # Matrices whose rows are outputs: embeddings, and routers of experts, which are no Linears.
    kept = gathers.keys() | {node.input[1] for node in graph.node if _is_transposed_product(node)}
    for name in sorted(weights.linears):
        traced = f"model.{name}"
        if f"{traced}.B" in wanted:
            arrays, _ = block_arrays([weights.quantized_rows(Rows(name))])
            for key, array in arrays.items():
                _rename(graph, f"{traced}.{key}", data.add(graph, f"{name}.{key}", array))
        elif f"{traced}.weight" in gathers and name in weights.quantized:
            quantize_gather(data, graph, weights, gathers[f"{traced}.weight"], name, None)
        elif f"{traced}.weight" in wanted:
            floats = weights.floats([Rows(name)])
            array = floats if f"{traced}.weight" in kept else floats.T
            _rename(graph, f"{traced}.weight", data.add(graph, f"{name}.weight", array))


def _is_transposed_product(node: onnx.NodeProto) -> bool:
    """Return whether a node multiplies with the transposed second matrix."""
    return node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a node input everywhere in the graph."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def _write_config(
    config: ModelConfig,
    model: PreTrainedModel,
    decoder: dict[str, int],
    proto: onnx.ModelProto,
    folder: Path,
) -> None:
    """Write ``genai_config.json`` with the input and output names of the graph."""
    generation = model.generation_config

    def token(name: TokenField) -> TokenIds:
        found = getattr(generation, name, None)
        return config.get(name) if found is None else found

    context = context_length(config) or UNLIMITED_CONTEXT
    model_section = {
        "bos_token_id": _first_token(token("bos_token_id"), token("eos_token_id")),
        "context_length": context,
        "decoder": _decoder_section(decoder, [i.name for i in proto.graph.input]),
        "eos_token_id": token("eos_token_id"),
        "pad_token_id": _first_token(token("pad_token_id"), token("eos_token_id")),
        "type": GENAI_TYPE,
        "vocab_size": config["vocab_size"],
    }
    search = {
        "do_sample": False,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
    }
    document = {"model": model_section, "search": search}
    (folder / GENAI_CONFIG).write_text(json.dumps(document, indent=4) + "\n")


def _decoder_section(decoder: dict[str, int], inputs: list[str]) -> dict[str, object]:
    """Return the decoder section of GenAI's config: sizes, and names of inputs and outputs."""
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        **decoder,
        "inputs": {
            **{name: name for name in INPUTS if name in inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _first_token(found: TokenIds, end: TokenIds) -> TokenIds:
    """Return a token, or the first end token if it is missing, since GenAI requires a number."""
    if found is not None:
        return found
    return end[0] if isinstance(end, list) else end
