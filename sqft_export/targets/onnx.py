"""ONNX: a graph of standard or fused operators with our codes as its MatMulNBits.

``fused`` is the ONNX Runtime GenAI builder's graph (``onnx_fused.py``), ``standard`` torch's
(``onnx_standard.py``); either stores its weights as ``onnx_weights.py`` says.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sqft_export.errors import UserError
from sqft_export.recipe import Export
from sqft_export.sparse.loaders import load_onnx
from sqft_export.targets import ADAPTER, positions_of, read_adapter
from sqft_export.targets.devices import present

MODEL = "model.onnx"
DATA = "model.onnx.data"
ADAPTER_FILE = "adapter.onnx_adapter"
CONFIG = "genai_config.json"
CPU_PROVIDER = "CPUExecutionProvider"
EXACT_ACCURACY = 1  # float32 activations; as deployed they are int8
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")


def export(merged: Path, folder: Path, options: Export) -> None:
    """Write the deployment folder of a merged model: graph, external data, GenAI config."""
    import onnx

    from sqft_export.compressed import describe
    from sqft_export.targets import onnx_fused, onnx_standard
    from sqft_export.targets.onnx_weights import ExternalData, Weights

    weights = Weights(merged)
    built = weights.checkpoint.family.builder is not None
    fused = built if options.onnx_graph == "auto" else options.onnx_graph == "fused"
    graph = onnx_fused if fused else onnx_standard
    with ExternalData(folder / DATA) as data:
        model = graph.build(weights, folder, data)
    for key, value in describe(weights.checkpoint).items():
        model.metadata_props.add(key=f"sqft_export.{key}", value=value)
    onnx.save(model, folder / MODEL)
    for pattern in TOKENIZER:
        for file in merged.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def add_adapter(folder: Path, adapter: Path) -> None:
    """Give the graph inputs for low-rank updates, and write the adapter that fills them.

    ``<linear>.lora_A`` float32 ``[in, rank]`` and ``.lora_B`` ``[rank, out]`` are inputs with an
    empty default, so that the graph runs without an adapter too; ``adapter.onnx_adapter`` is what
    ONNX Runtime's ``LoraAdapter`` and GenAI's ``Adapters`` load.
    """
    import onnx
    from onnx import helper

    from sqft_export.targets.onnx_weights import Part, product_parts, set_nodes

    model = onnx.load(folder / MODEL, load_external_data=False)
    graph, updates, nodes = model.graph, read_adapter(adapter), []
    parameters: dict[str, np.ndarray] = {}
    rows_of = dict(zip("qkv", head_rows(_decoder_of(folder)), strict=True))

    def pair(part: Part, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        if part.linear in updates:
            lora_a, lora_b = updates[part.linear]
            return lora_a.T, lora_b[part.rows].T
        # One that has no adapter but is joined with some that have gets one of rank 0.
        rows = rows_of[part.linear.rsplit(".", 1)[1][0]]
        return np.zeros((inputs, 0), np.float32), np.zeros((0, rows), np.float32)

    for node in graph.node:
        nodes.append(node)
        parts = product_parts(node)
        adapted = [part for part in parts if part.linear in updates]
        if not adapted:
            continue
        output, added = node.output[0], []
        node.output[0] = f"{output}/base"
        inputs = updates[adapted[0].linear][0].shape[1]
        for part in parts:
            keys = f"{part}.lora_A", f"{part}.lora_B"
            for key, array in zip(keys, pair(part, inputs), strict=True):
                parameters[key] = np.ascontiguousarray(array)
            outputs = parameters[keys[1]].shape[1]
            _add_optional_input(graph, keys[0], [inputs, "rank"], [inputs, 0])
            _add_optional_input(graph, keys[1], ["rank", outputs], [0, outputs])
            low, update = f"{output}/{part}/low", f"{output}/{part}/update"
            nodes.append(helper.make_node("MatMul", [node.input[0], keys[0]], [low]))
            nodes.append(helper.make_node("MatMul", [low, keys[1]], [update]))
            added.append(update)
        if len(added) > 1:
            nodes.append(helper.make_node("Concat", added, [f"{output}/update"], axis=-1))
            added = [f"{output}/update"]
        nodes.append(helper.make_node("Add", [f"{output}/base", *added], [output]))
    set_nodes(graph, nodes)
    onnx.save(model, folder / MODEL)
    (folder / ADAPTER).mkdir()
    stored = ort.AdapterFormat()
    stored.set_adapter_version(1)
    stored.set_model_version(1)
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in parameters.items()}
    stored.set_parameters(values)
    stored.export_adapter(str(folder / ADAPTER / ADAPTER_FILE))


def _decoder_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())["model"]["decoder"]


def head_rows(decoder: dict[str, Any]) -> list[int]:
    """Rows of q, k and v."""
    keys = decoder["num_key_value_heads"] * decoder["head_size"]
    return [decoder["num_attention_heads"] * decoder["head_size"], keys, keys]


def _add_optional_input(graph: Any, name: str, shape: list[int | str], default: list[int]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    graph.initializer.append(numpy_helper.from_array(np.zeros(default, np.float32), name))


def read_back(folder: Path) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """By module: codes uint8 ``[out, in]``, scale float32 and zero point uint8 ``[out, groups]``.

    Read from the written file, one at a time.
    """
    import onnx

    from sqft_export.targets.onnx_weights import read_packed

    return read_packed(onnx.load(folder / MODEL, load_external_data=False), folder)


def metadata(folder: Path) -> dict[str, str]:
    """What the graph says of the model it was made from."""
    import onnx

    model = onnx.load(folder / MODEL, load_external_data=False)
    prefix = "sqft_export."
    found = {p.key: p.value for p in model.metadata_props if p.key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def compressed_kernels(folder: Path) -> set[str]:
    """The Linears that are MatMulNBits in the graph as ONNX Runtime optimizes it for the CPU."""
    import onnx

    from sqft_export.targets.onnx_weights import product_parts

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / MODEL
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


def _with_accuracy(folder: Path, level: int) -> bytes:
    """The graph, its weights still outside, with another accuracy level on every MatMulNBits."""
    import onnx

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

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        batch, length = ids.shape
        self.length += length
        if mask is None:
            mask = np.ones((batch, self.length), np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self.wants_positions:
            arrays["position_ids"] = positions_of(mask, length)
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        past = self.past or self._empty_cache(batch)
        feeds |= dict(zip(self.caches, past, strict=True))
        logits, *self.past = self.session.run_with_ort_values(
            ["logits", *self.presents], feeds, self.options
        )
        return logits.numpy()


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> OnnxSession:
    """An ONNX folder on a device.

    :param exact: float32 activations in every MatMulNBits; else as deployed.
    :param threads: of the CPU.
    :raises UserError: if the device is not here.
    """
    provider = CPU_PROVIDER if device == "cpu" else present("onnx", device).name
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if exact:
        model = _with_accuracy(folder, EXACT_ACCURACY)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        session = ort.InferenceSession(model, options, providers=[provider])
    else:
        session = load_onnx(folder, options, [provider])
    if session.get_providers()[0] != provider:  # the runtime goes on without, telling a log alone
        raise UserError(f"{folder}: {provider} could not be started; see ONNX Runtime's log")
    adapter = None
    if (file := folder / ADAPTER / ADAPTER_FILE).is_file():
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
    return OnnxSession(session, _decoder_of(folder), adapter)
