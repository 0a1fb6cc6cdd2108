"""The graph that ONNX Runtime's users expect, by the GenAI model builder, with our weights.

The builder makes GroupQueryAttention with rotary embedding in it, the key-value cache in and out,
and ``genai_config.json``. It is given a model whose matrices are empty; each of its products then
gets the codes of the merged model as ``com.microsoft::MatMulNBits``, or the floats it multiplies
with. It joins q, k and v into one product and takes gate and up apart where they are one Linear;
rows are joined and split in the same order.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from sqft_export.model.architecture import transformers_config
from sqft_export.model.companions import copy_companions, float_config, write_config
from sqft_export.model.contexts import deployed_config, partial_rotary, window_layers
from sqft_export.model.families import Family, builder_class
from sqft_export.model.skeleton import skeleton
from sqft_export.targets.folder import GENAI_CONFIG
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

# GroupQueryAttention on CPU rotates only a multiple of so many columns of a head.
FUSED_ROTARY_STEP = 16
EMBEDDING_NODE = "/model/embed_tokens/Gather"
JOINED = ("q_proj", "k_proj", "v_proj")
SIZED_CACHE = "sliding_window_cache"  # attribute of GroupQueryAttention


def build(weights: Weights, folder: Path, data: ExternalData) -> onnx.ModelProto:
    """The graph, its weights written to ``data``; ``genai_config.json`` and tokenizer too."""
    checkpoint = weights.checkpoint
    configs, built = folder / "configs", folder / "built"
    copy_companions(checkpoint.folder, configs)
    config = deployed_config(transformers_config(checkpoint.config, checkpoint.where).to_dict())
    write_config(configs, float_config(config, "float32"))
    built.mkdir()
    model = _without_weights(weights, configs, built, builder_class(checkpoint.family, config))
    _place_products(model.graph, weights, data)
    _place_embedding(model.graph, weights, data)
    document = json.loads((built / GENAI_CONFIG).read_text())
    decoder = document["model"]["decoder"]
    was_sized = _window(model.graph, window_layers(config))
    if was_sized:
        decoder.pop("sliding_window", None)
    rotary = int(decoder["head_size"] * partial_rotary(config))
    rotates_outside = rotary % FUSED_ROTARY_STEP != 0
    if rotates_outside:
        _rotary_outside(model, decoder, rotary)
    if was_sized or rotates_outside:
        (built / GENAI_CONFIG).write_text(json.dumps(document, indent=4) + "\n")
    shutil.copytree(built, folder, dirs_exist_ok=True)  # several chat templates are in a folder
    for transient in (configs, built, folder / "cache"):
        shutil.rmtree(transient, ignore_errors=True)
    return model


def _without_weights(
    weights: Weights, configs: Path, built: Path, class_name: str
) -> onnx.ModelProto:
    """The builder's graph of an empty model; initializers of matrices are left out of it."""
    from onnxruntime_genai.models import builder

    arguments = ("", str(configs), str(built), "fp32", "cpu", str(built.parent / "cache"))
    options = builder.parse_extra_options(*arguments, [])
    options.pop("_effective_builder_config")
    details = options.pop("hf_details")
    empty = skeleton(weights.checkpoint)

    class Graph(getattr(builder, class_name)):  # type: ignore[misc]
        def load_weights(self, input_path):
            return empty

    config, extra = details["hf_config"], details["extra_kwargs"]
    if rope := getattr(config, "rope_parameters", None):
        rope["type"] = rope["rope_type"]  # where the class of longrope looks
    graph = Graph(config, ir.DataType.FLOAT, ir.DataType.FLOAT, "cpu", arguments[-1], options)
    graph.make_model(str(configs))
    graph.make_genai_config(config, extra, str(built))
    graph.save_processing(details["hf_name"], extra, str(built))
    graph.model.graph.sort()
    matrices = {
        node.inputs[i].name
        for node in graph.model.graph
        for i in range(2)
        if node.op_type in ("MatMul", "Gather", "Transpose") and len(node.inputs) > i
    }
    for name, value in list(graph.model.graph.initializers.items()):
        if name in matrices and value.shape is not None and len(value.shape) == 2:
            graph.model.graph.initializers.pop(name)
    return ir.to_proto(graph.model)


def _place_products(graph: Any, weights: Weights, data: ExternalData) -> None:
    """Every product of a matrix gets its codes, or its floats as they are."""
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
    graph: Any, weights: Weights, data: ExternalData, node: Any, parts: list[Rows]
) -> list[Any]:
    x, output = node.input[0], node.output[0]
    if len({weights.kind(part) for part in parts}) == 1:
        return [matmul_nbits(data, graph, weights, parts, x, output, node.name)]
    # One product can't mix kinds of grid: each Linear gets its own, then they are joined.
    outputs = [f"{output}/{part}" for part in parts]
    return [
        *(
            matmul_nbits(data, graph, weights, [part], x, out, f"{node.name}/{part}")
            for part, out in zip(parts, outputs, strict=True)
        ),
        helper.make_node("Concat", outputs, [output], axis=-1),
    ]


def parts_of(node: str, weights: Weights) -> list[Rows]:
    """What a builder's product multiplies with, as ``/model/layers.0/attn/o_proj/MatMul``."""
    family = weights.checkpoint.family
    path = (
        node.strip("/").removesuffix("/MatMul").replace("/", ".").replace(".attn.", ".self_attn.")
    )
    if path in weights.linears:
        return [Rows(path)]
    if path.endswith("self_attn.qkv_proj"):
        return [Rows(path.removesuffix("qkv_proj") + one) for one in JOINED]
    return _part_of_joined(path, family, weights)


def _part_of_joined(path: str, family: Family, weights: Weights) -> list[Rows]:
    for whole, names in family.joined.items():
        for index, name in enumerate(names):
            if path.endswith(name):
                linear = path.removesuffix(name) + whole
                rows = weights.checkpoint.linears[linear][0] // len(names)
                return [Rows(linear, index * rows, (index + 1) * rows)]
    return []


def _place_embedding(graph: Any, weights: Weights, data: ExternalData) -> None:
    family = weights.checkpoint.family
    node = next(n for n in graph.node if n.name == EMBEDDING_NODE)
    # The builder ties by turning the head's matrix round.
    turned = [n for n in graph.node if list(n.output) == [node.input[0]]]
    if family.embedding in weights.quantized:
        for one in turned:
            graph.node.remove(one)
        head = family.head if weights.checkpoint.tied else None
        quantize_gather(data, graph, weights, node, family.embedding, head)
    elif turned:
        turned[0].input[0] = f"{family.head}.weight"
    else:
        name = f"{family.embedding}.weight"
        node.input[0] = data.add(graph, name, weights.floats([Rows(family.embedding)]))


def _window(graph: Any, windows: list[int]) -> bool:
    """Set the sliding window of every attention, which the builder leaves out of Mistral.

    The builder marks windowed layers of Qwen for a cache of the window's size. That cache exists in
    ONNX Runtime GenAI alone, so it is turned off.

    :param windows: of every layer; 0 for full attention.
    :return: whether such a cache was turned off.
    """
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    was_sized = False
    for node, window in zip(attention, windows, strict=True):
        attributes = [a for a in node.attribute if a.name != SIZED_CACHE]
        was_sized = was_sized or len(attributes) < len(node.attribute)
        for attribute in attributes:
            if attribute.name == "local_window_size":
                attribute.i = window or -1
        kept = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
    return was_sized


def _rotary_outside(model: Any, decoder: dict[str, Any], rotary: int) -> None:
    """Rotate queries and keys before each GroupQueryAttention instead of in it.

    Adds ``position_ids`` to the graph's inputs and to the GenAI config.

    :param rotary: columns of a head that are rotated.
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
