"""ONNX: the ONNX Runtime GenAI builder's float graph, our codes as its MatMulNBits.

The builder makes the graph that ONNX Runtime's users expect (fused GroupQueryAttention with
rotary embedding, key-value cache in and out, ``genai_config.json``). Each decoder MatMul is then
replaced by ``com.microsoft::MatMulNBits`` with the codes of the merged model:

    B            uint8 [out, blocks, block_size * bits / 8]   low nibble first
    scales       float32 [out, blocks]                        the float16 scales, widened
    zero_points  uint8 [out, ceil(blocks * bits / 8)]         left out where symmetric

The builder joins q, k and v into one product; their rows are joined in the same order.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from sqft_export.numerics.nibbles import pack_nibbles, unpack_nibbles
from sqft_export.targets import ADAPTER, read_adapter

MODEL = "model.onnx"
DATA = "model.onnx.data"
ADAPTER_FILE = "adapter.onnx_adapter"
CONFIG = "genai_config.json"
# Activations in int8, as the builder's own default on CPU. `exact` sessions use float32.
DEPLOYED_ACCURACY, EXACT_ACCURACY = 4, 1
# GroupQueryAttention on CPU rotates only heads whose size is a multiple of this.
FUSED_ROTARY_STEP = 16
EMBEDDING_NODE = "/model/embed_tokens/Gather"
JOINED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")}


def export(merged: Path, folder: Path) -> None:
    """Write the deployment folder of a merged model: graph, external data, GenAI config."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    from sqft_export.checkpoint import Checkpoint
    from sqft_export.compressed import quantized_names, read_quantized, write_float_checkpoint

    checkpoint = Checkpoint(merged)
    floats, built = folder / "floats", folder / "built"
    write_float_checkpoint(checkpoint, floats)
    arguments = ("", str(floats), str(built), "fp32", "cpu", str(folder / "cache"))
    create_model(*arguments, **parse_extra_options(*arguments, []))
    model = onnx.load(built / MODEL)
    layers = {name: read_quantized(checkpoint, name) for name in quantized_names(checkpoint)}
    family = checkpoint.family
    if checkpoint.tied and family.embedding in layers:
        layers[family.head] = layers[family.embedding]
    _quantize_products(model.graph, layers)
    if family.embedding in layers:
        head = family.head if checkpoint.tied else None
        _quantize_gather(model.graph, family.embedding, *layers[family.embedding], head)
    decoder = json.loads((built / CONFIG).read_text())
    if decoder["model"]["decoder"]["head_size"] % FUSED_ROTARY_STEP:
        _rotary_apart(model, decoder["model"]["decoder"])
        (built / CONFIG).write_text(json.dumps(decoder, indent=4) + "\n")
    onnx.save(
        model,
        folder / MODEL,
        save_as_external_data=True,
        location=DATA,
        size_threshold=1024,
    )
    for file in built.iterdir():
        if file.name not in (MODEL, DATA):
            shutil.copyfile(file, folder / file.name)
    for transient in (floats, built, folder / "cache"):
        shutil.rmtree(transient, ignore_errors=True)


def add_adapter(folder: Path, adapter: Path) -> None:
    """Give the graph inputs for low-rank updates, and write the adapter that fills them.

    ``<linear>.lora_A`` float32 ``[in, rank]`` and ``.lora_B`` ``[rank, out]`` are inputs with an
    empty default, so that the graph runs without an adapter too; ``adapter.onnx_adapter`` is what
    ONNX Runtime's ``LoraAdapter`` and GenAI's ``Adapters`` load.
    """
    model = onnx.load(folder / MODEL, load_external_data=False)
    graph, updates, nodes = model.graph, read_adapter(adapter), []
    parameters: dict[str, np.ndarray] = {}
    joined_rows = _head_rows(json.loads((folder / CONFIG).read_text())["model"]["decoder"])
    for node in graph.node:
        nodes.append(node)
        names = _linears_of(node.name, _AnyLinear()) if node.op_type.startswith("MatMul") else []
        if not any(name in updates for name in names):
            continue
        output, parts = node.output[0], []
        node.output[0] = f"{output}/base"
        for name, rows in zip(names, joined_rows if len(names) > 1 else [0], strict=True):
            # One that has no adapter but is joined with some that have gets one of rank 0.
            inputs = len(next(updates[n][0].T for n in names if n in updates))
            nothing = np.zeros((0, inputs), np.float32), np.zeros((rows, 0), np.float32)
            lora_a, lora_b = updates.get(name, nothing)
            pair = {f"{name}.lora_A": lora_a.T, f"{name}.lora_B": lora_b.T}
            parameters |= {key: np.ascontiguousarray(array) for key, array in pair.items()}
            key_a, key_b = pair
            _add_optional_input(graph, key_a, [len(lora_a.T), "rank"], [len(lora_a.T), 0])
            _add_optional_input(graph, key_b, ["rank", len(lora_b)], [0, len(lora_b)])
            low, part = f"{output}/{name}/low", f"{output}/{name}/update"
            nodes.append(helper.make_node("MatMul", [node.input[0], key_a], [low]))
            nodes.append(helper.make_node("MatMul", [low, key_b], [part]))
            parts.append(part)
        if len(parts) > 1:
            nodes.append(helper.make_node("Concat", parts, [f"{output}/update"], axis=-1))
            parts = [f"{output}/update"]
        nodes.append(helper.make_node("Add", [f"{output}/base", *parts], [output]))
    _set_nodes(graph, nodes)
    onnx.save(model, folder / MODEL)
    (folder / ADAPTER).mkdir()
    stored = ort.AdapterFormat()
    stored.set_adapter_version(1)
    stored.set_model_version(1)
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in parameters.items()}
    stored.set_parameters(values)
    stored.export_adapter(str(folder / ADAPTER / ADAPTER_FILE))


def _add_optional_input(graph: Any, name: str, shape: list[int | str], default: list[int]) -> None:
    graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    graph.initializer.append(numpy_helper.from_array(np.zeros(default, np.float32), name))


class _AnyLinear:
    """Stands for the Linears of a graph that nothing else lists: every name but the joined one."""

    def __contains__(self, name: object) -> bool:
        return not str(name).endswith("qkv_proj")


def _rotary_apart(model: Any, decoder: dict[str, Any]) -> None:
    """Rotate queries and keys before each GroupQueryAttention instead of in it.

    Adds ``position_ids`` to the graph's inputs and to the GenAI config.
    """
    graph, sizes = model.graph, _head_rows(decoder)
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
                    )
                )
            inputs = [f"{q}/rotated", f"{k}/rotated", v, *node.input[3:7]]
            del node.input[:]
            node.input.extend(inputs)
            next(a for a in node.attribute if a.name == "do_rotary").i = 0
        nodes.append(node)
    _set_nodes(graph, nodes)


def _head_rows(decoder: dict[str, Any]) -> list[int]:
    """Rows of the joined q, k and v."""
    keys = decoder["num_key_value_heads"] * decoder["head_size"]
    return [decoder["num_attention_heads"] * decoder["head_size"], keys, keys]


def _quantize_products(graph: Any, layers: dict[str, Any]) -> None:
    """Every MatMul with a weight that has codes becomes MatMulNBits."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        names = _linears_of(node.name, layers) if node.op_type == "MatMul" else []
        if not names:
            nodes.append(node)
            continue
        graph.initializer.remove(initializers.pop(node.input[1]))
        if len({(g.bits, g.group_size, g.symmetric) for _, g in (layers[n] for n in names)}) == 1:
            nodes.append(_matmul_nbits(graph, node, names, layers, node.output[0]))
            continue
        # One product can't mix kinds of grid: each Linear gets its own, then they are joined.
        parts = [f"{node.output[0]}/{name}" for name in names]
        for name, part in zip(names, parts, strict=True):
            nodes.append(_matmul_nbits(graph, node, [name], layers, part))
        nodes.append(helper.make_node("Concat", parts, [node.output[0]], axis=-1))
    _set_nodes(graph, nodes)


def _set_nodes(graph: Any, nodes: list[Any]) -> None:
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(fresh)


def _linears_of(node: str, layers: Container[str]) -> list[str]:
    """The Linears whose product a builder node is, as ``/model/layers.0/attn/o_proj/MatMul``."""
    path = (
        node.strip("/").removesuffix("/MatMul").replace("/", ".").replace(".attn.", ".self_attn.")
    )
    if path in layers:
        return [path]
    for joined, parts in JOINED.items():
        if path.endswith(joined):
            names = [path.removesuffix("qkv_proj") + part for part in parts]
            return names if all(name in layers for name in names) else []
    return []


def block_size(inputs: int, group_size: int) -> int:
    """MatMulNBits' block: the group, or for one group a row the next power of two from 16 up."""
    if group_size < inputs or (group_size >= 16 and group_size & (group_size - 1) == 0):
        return group_size
    return max(16, 1 << (inputs - 1).bit_length())


def _packed_rows(values: np.ndarray, bits: int) -> np.ndarray:
    return values if bits == 8 else pack_nibbles(values)


def _block_arrays(layers: list[tuple[Any, Any]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Codes, scales and zero points as blocks, and the sizes, of Linears that share their input."""
    bits, inputs = layers[0][1].bits, layers[0][0].shape[1]
    size = block_size(inputs, layers[0][1].group_size)
    codes = np.concatenate([codes.numpy() for codes, _ in layers])
    scales = np.concatenate([grid.scale.numpy() for _, grid in layers]).astype(np.float32)
    zeros = np.concatenate([grid.zero_point.numpy() for _, grid in layers])
    outputs, blocks = scales.shape
    padded = np.repeat(zeros, size, axis=1)  # what a short last block is filled with: zeros
    padded[:, :inputs] = codes
    arrays = {
        "B": _packed_rows(padded.reshape(outputs, blocks, size), bits),
        "scales": scales,
    }
    if not all(grid.symmetric for _, grid in layers):
        arrays["zero_points"] = _packed_rows(zeros, bits)
    return arrays, {"K": inputs, "N": outputs, "bits": bits, "block_size": size}


def _add(graph: Any, prefix: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """Store arrays as initializers; returns their names."""
    names = [f"{prefix}.{part}" for part in arrays]
    for name, array in zip(names, arrays.values(), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return names


def _matmul_nbits(
    graph: Any, node: Any, names: list[str], layers: dict[str, Any], output: str
) -> Any:
    """The product of ``node`` with the codes of the named Linears, their rows joined."""
    arrays, sizes = _block_arrays([layers[name] for name in names])
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], *_add(graph, ",".join(names), arrays)],
        [output],
        name=node.name if output == node.output[0] else f"{node.name}/{names[0]}",
        domain="com.microsoft",
        accuracy_level=DEPLOYED_ACCURACY,
        **sizes,
    )


def _quantize_gather(graph: Any, embedding: str, codes: Any, grid: Any, head: str | None) -> None:
    """The embedding's Gather reads codes: GatherBlockQuantized, one block a row.

    :param head: module whose MatMulNBits already holds the same codes, None where it is apart.
    """
    node = next(n for n in graph.node if n.name == EMBEDDING_NODE)
    rows, columns = codes.shape
    size = block_size(columns, grid.group_size)
    scale, zero = grid.scale.numpy().astype(np.float32), grid.zero_point.numpy()
    arrays = {"scales": scale, "zero_points": zero}
    for stored in [t for t in graph.initializer if t.name == node.input[0]]:
        graph.initializer.remove(stored)
    # The builder ties by turning the head's matrix round.
    for turned in [n for n in graph.node if list(n.output) == [node.input[0]]]:
        graph.node.remove(turned)
    if head and size == columns:
        shape = numpy_helper.from_array(np.array([rows, columns], np.int64), f"{embedding}.shape")
        graph.initializer.append(shape)
        reshape = helper.make_node("Reshape", [f"{head}.B", shape.name], [f"{embedding}.B"])
        graph.node.insert(0, reshape)
    else:
        arrays["B"] = codes.numpy()
    _add(graph, embedding, arrays)
    new = helper.make_node(
        "GatherBlockQuantized",
        [f"{embedding}.B", node.input[1], f"{embedding}.scales", f"{embedding}.zero_points"],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        bits=grid.bits,
        gather_axis=0,
        quantize_axis=1,
        block_size=size,
    )
    node.CopyFrom(new)


def read_back(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Codes uint8 ``[out, in]``, scale float32 and zero point uint8 ``[out, groups]`` by Linear.

    Read from the written file, for ``verify``.
    """
    model = onnx.load(folder / MODEL)
    tensors = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":
            scale, zero = (numpy_helper.to_array(tensors[node.input[i]]) for i in (2, 3))
            shared = [n.input[0] for n in model.graph.node if list(n.output) == [node.input[0]]]
            codes = numpy_helper.to_array(tensors[(shared or node.input)[0]])
            name = node.input[0].removesuffix(".B")
            found[name] = (codes.reshape(len(scale), -1), scale, zero)
        if node.op_type != "MatMulNBits":
            continue
        size = {a.name: a.i for a in node.attribute}
        scales = numpy_helper.to_array(tensors[node.input[2]])
        scales = scales.reshape(size["N"], -1)
        packed = numpy_helper.to_array(tensors[node.input[1]])
        four = size["bits"] == 4
        codes = unpack_nibbles(packed, size["block_size"]) if four else packed
        codes = codes.reshape(size["N"], -1)[:, : size["K"]]
        if len(node.input) > 3:
            stored = numpy_helper.to_array(tensors[node.input[3]]).reshape(size["N"], -1)
            zeros = unpack_nibbles(stored, scales.shape[1]) if four else stored
        else:
            zeros = np.full(scales.shape, 2 ** (size["bits"] - 1), np.uint8)
        names = node.input[1].removesuffix(".B").split(",")
        found.update(_split_rows(folder, names, codes, scales, zeros))
    return found


def _split_rows(folder: Path, names: list[str], *joined: np.ndarray) -> dict[str, Any]:
    """Rows of joined Linears handed back to each; q has more of them than k and v."""
    if len(names) == 1:
        return {names[0]: joined}
    decoder = json.loads((folder / CONFIG).read_text())["model"]["decoder"]
    ends = np.cumsum(_head_rows(decoder))
    parts = [np.split(array, ends[:-1]) for array in joined]
    return {name: tuple(part[i] for part in parts) for i, name in enumerate(names)}


def compressed_kernels(folder: Path) -> set[str]:
    """The Linears that are MatMulNBits in the graph as ONNX Runtime optimizes it for the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / MODEL
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", DATA
        )
        ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized, load_external_data=False).graph
    found = set()
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            weight = node.input[1 if node.op_type == "MatMulNBits" else 0]
            found |= set(weight.removesuffix(".B").split(","))
    return found


def _with_accuracy(folder: Path, level: int) -> bytes:
    """The graph, its weights still outside, with another accuracy level on every MatMulNBits."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    return model.SerializeToString()


class OnnxSession:
    """A decoder graph with its cache as inputs and outputs, kept in the runtime's memory."""

    def __init__(self, session: Any, decoder: dict[str, Any], adapter: Any = None):
        self.session, self.decoder, self.adapter = session, decoder, adapter
        self.options = ort.RunOptions()
        if adapter is not None:
            self.options.add_active_adapter(adapter)
        inputs = [i.name for i in session.get_inputs()]
        self.wants_positions = "position_ids" in inputs
        self.caches = [name for name in inputs if name.startswith("past_")]
        self.presents = [re.sub("^past_key_values", "present", name) for name in self.caches]
        self.reset()

    def reset(self) -> None:
        self.past: list[Any] | None = None
        self.length = 0

    def _empty_cache(self, batch: int) -> list[Any]:
        shape = (batch, self.decoder["num_key_value_heads"], 0, self.decoder["head_size"])
        return [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self.caches]

    def forward(self, ids: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
        self.length += length
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids)),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(
                np.ones((batch, self.length), np.int64)
            ),
        }
        if self.wants_positions:
            positions = np.tile(np.arange(self.length - length, self.length), (batch, 1))
            feeds["position_ids"] = ort.OrtValue.ortvalue_from_numpy(positions)
        past = self.past or self._empty_cache(batch)
        feeds |= dict(zip(self.caches, past, strict=True))
        logits, *self.past = self.session.run_with_ort_values(
            ["logits", *self.presents], feeds, self.options
        )
        return logits.numpy()


def open_session(folder: Path, exact: bool, threads: int | None) -> OnnxSession:
    """An ONNX folder on the CPU.

    :param exact: float32 activations in every MatMulNBits; else as deployed.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    model: Any = str(folder / MODEL)
    if exact:
        model = _with_accuracy(folder, EXACT_ACCURACY)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    config = json.loads((folder / CONFIG).read_text())
    adapter = None
    if (file := folder / ADAPTER / ADAPTER_FILE).is_file():
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
    return OnnxSession(session, config["model"]["decoder"], adapter)
