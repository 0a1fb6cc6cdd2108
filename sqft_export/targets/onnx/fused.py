"""The graph of ONNX Runtime GenAI's model builder, with the weights of the merged model.

The builder writes GroupQueryAttention with rotary embedding, the key-value cache as inputs and
outputs, and ``genai_config.json``. It gets a model with empty matrices. Each product then gets its
codes as ``com.microsoft::MatMulNBits``, or its float weights. The builder concatenates q, k and v
into one product, and splits a Linear that has both gate and up. Rows follow the same order.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from sqft_export.libraries.onnxruntime_genai import build_graph
from sqft_export.model.architecture import transformers_config
from sqft_export.model.companions import copy_companions, float_config, write_config
from sqft_export.model.config import ModelConfig
from sqft_export.model.contexts import deployed_config, partial_rotary, window_layers
from sqft_export.model.families import Family, builder_class
from sqft_export.model.skeleton import skeleton
from sqft_export.targets.folder import GENAI_CONFIG
from sqft_export.targets.genai_config import BuiltDecoder
from sqft_export.targets.onnx.weights import (
    ExternalData,
    Rows,
    Weights,
    head_rows,
    matmul_nbits,
    parts_name,
    quantize_gather,
    set_nodes,
)

# Columns. GroupQueryAttention on the CPU rotates only a multiple of this number per head.
FUSED_ROTARY_STEP = 16
EMBEDDING_NODE = "/model/embed_tokens/Gather"
QKV = ("q_proj", "k_proj", "v_proj")
SIZED_CACHE = "sliding_window_cache"  # attribute of GroupQueryAttention


def build(weights: Weights, folder: Path, data: ExternalData) -> onnx.ModelProto:
    """Return the graph. Write weights to ``data``, GenAI config and tokenizer to ``folder``."""
    checkpoint = weights.checkpoint
    configs, built = folder / "configs", folder / "built"
    copy_companions(checkpoint.folder, configs)
    config = deployed_config(transformers_config(checkpoint.config, checkpoint.where).to_dict())
    write_config(configs, float_config(config, "float32"))
    built.mkdir()
    model = _build_empty(weights, configs, built, builder_class(checkpoint.family, config))
    _place_products(model.graph, weights, data)
    _place_embedding(model.graph, weights, data)
    document = json.loads((built / GENAI_CONFIG).read_text())
    decoder = document["model"]["decoder"]
    document["model"]["type"] = checkpoint.family.genai_type or document["model"]["type"]
    _set_windows(model.graph, _attention_windows(config, checkpoint.family))
    # With this entry GenAI allocates a cache of twice the window and fails on longer texts. The
    # operators apply the window themselves.
    decoder.pop("sliding_window", None)
    rotary = int(decoder["head_size"] * partial_rotary(config))
    is_inside = all(i.name != "position_ids" for i in model.graph.input)
    if rotary % FUSED_ROTARY_STEP and is_inside:
        _move_rotary_out(model, decoder, rotary)
    if document != json.loads((built / GENAI_CONFIG).read_text()):
        (built / GENAI_CONFIG).write_text(json.dumps(document, indent=4) + "\n")
    shutil.copytree(built, folder, dirs_exist_ok=True)  # several chat templates are a subfolder
    for transient in (configs, built, folder / "cache"):
        shutil.rmtree(transient, ignore_errors=True)
    return model


def _build_empty(weights: Weights, configs: Path, built: Path, class_name: str) -> onnx.ModelProto:
    """Return the builder's graph of an empty model, without initializers of matrices."""
    empty = skeleton(weights.checkpoint)
    model = build_graph(class_name, empty, configs, built, built.parent / "cache")
    readers = [node for node in model.graph if node.op_type in ("MatMul", "Gather", "Transpose")]
    matrices = {value.name for node in readers for value in node.inputs[:2] if value is not None}
    for name, value in list(model.graph.initializers.items()):
        if name in matrices and value.shape is not None and len(value.shape) == 2:
            model.graph.initializers.pop(name)
    return ir.to_proto(model)


def _place_products(graph: onnx.GraphProto, weights: Weights, data: ExternalData) -> None:
    """Give every matrix product its codes or its float weights."""
    nodes = []
    for node in graph.node:
        parts = parts_of(node.name, weights) if node.op_type == "MatMul" else []
        if not parts:
            nodes.append(node)
        elif not all(part.linear in weights.quantized for part in parts):
            node.input[1] = data.add(graph, f"{parts_name(parts)}.weight", weights.floats(parts).T)
            nodes.append(node)
        else:
            nodes += _quantized_products(graph, weights, data, node, parts)
    set_nodes(graph, nodes)


def _quantized_products(
    graph: onnx.GraphProto,
    weights: Weights,
    data: ExternalData,
    node: onnx.NodeProto,
    parts: list[Rows],
) -> list[onnx.NodeProto]:
    """Return the nodes that multiply with the codes of some parts, in place of ``node``."""
    x, output = node.input[0], node.output[0]
    if len({weights.kind(part) for part in parts}) == 1:
        return [matmul_nbits(data, graph, weights, parts, x, output, node.name)]
    # One MatMulNBits has one kind of grid. Each Linear gets a separate node; Concat joins outputs.
    outputs = [f"{output}/{part}" for part in parts]
    return [
        *(
            matmul_nbits(data, graph, weights, [part], x, out, f"{node.name}/{part}")
            for part, out in zip(parts, outputs, strict=True)
        ),
        helper.make_node("Concat", outputs, [output], axis=-1),
    ]


def parts_of(node: str, weights: Weights) -> list[Rows]:
    """Return the rows of a product by its name, such as ``/model/layers.0/attn/o_proj/MatMul``."""
    family = weights.checkpoint.family
    path = (
        node.strip("/").removesuffix("/MatMul").replace("/", ".").replace(".attn.", ".self_attn.")
    )
    if path in weights.linears:
        return [Rows(path)]
    if path.endswith("self_attn.qkv_proj"):
        return [Rows(path.removesuffix("qkv_proj") + one) for one in QKV]
    return _part_of_joined(path, family, weights)


def _part_of_joined(path: str, family: Family, weights: Weights) -> list[Rows]:
    """Return the rows of a product that is one part of a Linear, such as gate of gate and up."""
    found = ((w, names, n) for w, names in family.joined.items() for n in names if path.endswith(n))
    for whole, names, name in found:
        linear = path.removesuffix(name) + whole
        if len(names) == 1:
            return [Rows(linear)]
        rows, index = weights.checkpoint.linears[linear][0] // len(names), names.index(name)
        return [Rows(linear, index * rows, (index + 1) * rows)]
    return []


def _place_embedding(graph: onnx.GraphProto, weights: Weights, data: ExternalData) -> None:
    """Give the embedding its codes or its float weights."""
    family = weights.checkpoint.family
    node = next(n for n in graph.node if n.name == EMBEDDING_NODE)
    # For tied weights the builder transposes the matrix of the head.
    transposes = [n for n in graph.node if list(n.output) == [node.input[0]]]
    if family.embedding in weights.quantized:
        for transpose in transposes:
            graph.node.remove(transpose)
        head = family.head if weights.checkpoint.tied else None
        quantize_gather(data, graph, weights, node, family.embedding, head)
    elif transposes:
        transposes[0].input[0] = f"{family.head}.weight"
    else:
        name = f"{family.embedding}.weight"
        node.input[0] = data.add(graph, name, weights.floats([Rows(family.embedding)]))


def _attention_windows(config: ModelConfig, family: Family) -> list[int]:
    """Return the sliding window of every layer with attention; 0 for full attention."""
    windows = window_layers(config)
    kinds = config.get("layer_types") or [""] * len(windows)
    both = zip(windows, kinds, strict=True)
    return [window for window, kind in both if kind not in family.recurrent]


def _set_windows(graph: onnx.GraphProto, windows: list[int]) -> None:
    """Set the sliding window of every attention. The builder sets none for Mistral.

    The builder marks windowed layers of Qwen for a cache of the window's size. Only ONNX Runtime
    GenAI has such a cache, so the mark is removed.

    :param windows: tokens per layer; 0 for full attention.
    """
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    for node, window in zip(attention, windows, strict=True):
        attributes = [a for a in node.attribute if a.name != SIZED_CACHE]
        for attribute in attributes:
            if attribute.name == "local_window_size":
                attribute.i = window or -1
        kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)


def _move_rotary_out(model: onnx.ModelProto, decoder: BuiltDecoder, rotary: int) -> None:
    """Rotate queries and keys before each GroupQueryAttention instead of inside it.

    Adds ``position_ids`` to the graph's inputs and to the GenAI config.

    :param rotary: rotated columns per head.
    """
    partial = {} if rotary == decoder["head_size"] else {"rotary_embedding_dim": rotary}
    graph, sizes = model.graph, head_rows(decoder)
    heads = decoder["num_attention_heads"], decoder["num_key_value_heads"]
    ids = next(i for i in graph.input if i.name == "input_ids")
    positions = onnx.ValueInfoProto()
    positions.CopyFrom(ids)
    positions.name = "position_ids"
    graph.input.append(positions)
    decoder["inputs"]["position_ids"] = "position_ids"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), "qkv_rows"))
    nodes = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            q, k, v = (f"{node.name}/{part}" for part in "qkv")
            nodes.append(helper.make_node("Split", [node.input[0], "qkv_rows"], [q, k, v], axis=-1))
            for part, count in zip((q, k), heads, strict=True):
                nodes.append(
                    helper.make_node(
                        "RotaryEmbedding",
                        [part, "position_ids", node.input[7], node.input[8]],
                        [f"{part}/rotated"],
                        domain="com.microsoft",
                        num_heads=count,
                        **partial,
                    )
                )
            inputs = [f"{q}/rotated", f"{k}/rotated", v, *node.input[3:7]]
            del node.input[:]
            node.input.extend(inputs)
            next(a for a in node.attribute if a.name == "do_rotary").i = 0
        nodes.append(node)
    set_nodes(graph, nodes)
