"""OpenVINO: trace the graph once, then replace its weight constants by quantized codes.

The runtime's pattern for compressed weights is used. Its CPU plugin keeps them compressed:

    Constant(i4|u4|i8|u8) -> Convert(f16) -> [Subtract(zero point)] -> Multiply(scale f16)
        -> Reshape [out, in] -> Convert(f32) -> MatMul

A symmetric code ``q`` is stored signed, as ``q - 2^(bits-1)``. Zero is then 0, and no zero point is
needed (NNCF's INT4_SYM). An asymmetric code is stored unsigned, with zero points.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from sqft_export.adapters.files import read_low_rank
from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.ir import LOOKUP, OPERATOR
from sqft_export.kernels.library import unpack_matrix
from sqft_export.model.memory import release_memory
from sqft_export.numerics.codes import QuantizedWeight, from_arrays
from sqft_export.numerics.nibbles import pack_nibbles, unpack_nibbles
from sqft_export.packed.loaders import load_openvino
from sqft_export.recipe.schema import Export
from sqft_export.targets import RECURRENT_STATE, Session, positions_of
from sqft_export.targets.devices import find_device
from sqft_export.targets.faults import names_device_faults
from sqft_export.targets.folder import ADAPTER_FOLDER, GRAPHS
from sqft_export.targets.tokenizers import write_openvino_tokenizers
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    import torch

    from sqft_export.model.checkpoint import Checkpoint

MODEL = GRAPHS["openvino"]
# Operation names: a Linear without bias, a Linear with a fused bias, an embedding.
KERNELS = ("aten::linear/MatMul", "aten::linear/Add", "aten::embedding/Gather")
ADAPTER_FILE = "adapter_model.safetensors"
LAST_TOKENS_INPUT = "last_tokens"
# float32 settings. The defaults round activations to int8 and bfloat16, and the cache to 8 bits.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


def export(
    merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
) -> None:
    """Write the deployment folder of a merged model: IR, tokenizer IR, configs.

    :param merged: Hugging Face folder, in the GPTQ layout or with float weights.
    """
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.storage import model_facts

    checkpoint = Checkpoint(merged)
    facts = facts or model_facts(checkpoint)  # read before the graph takes memory
    traced = folder / "traced"
    _trace(checkpoint, traced)
    graph = ov.Core().read_model(traced / MODEL)
    _place_weights(graph, checkpoint)
    for key, value in facts.items():
        graph.set_rt_info(value, ["sqft_export", key])
    ov.save_model(graph, folder / MODEL, compress_to_fp16=False)
    for file in traced.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    del graph
    write_openvino_tokenizers(merged, folder)
    shutil.rmtree(traced)


def _trace(checkpoint: "Checkpoint", folder: Path) -> None:
    """Write the graph, with empty matrices: by optimum-intel, or as a hybrid's."""
    if checkpoint.family.recurrent:
        from sqft_export.targets.hybrid_graph import trace_hybrid

        trace_hybrid(checkpoint, folder / MODEL)
        return
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig

    from sqft_export.libraries.optimum import TASK, without_version_limit
    from sqft_export.model.companions import write_config
    from sqft_export.model.families import FAMILIES
    from sqft_export.model.skeleton import skeleton

    model_type, model = checkpoint.config["model_type"], skeleton(checkpoint)
    if described := checkpoint.family.openvino_config:
        model.config.model_type = described
    if checkpoint.family.experts and getattr(model.config, "head_dim", None) is None:
        # Qwen3 MoE's class derives it; optimum's reads it.
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    # Our tests run the pinned version, and ``verify`` compares every graph with torch.
    with without_version_limit(model_type) if model_type in FAMILIES else nullcontext():
        export_from_model(
            model,
            folder,
            task=TASK,
            ov_config=OVConfig(dtype="fp32"),
            stateful=True,
        )
    config = read_json(folder / "config.json")
    if config["model_type"] != model_type:
        write_config(folder, config | {"model_type": model_type})


def _place_weights(graph: ov.Model, checkpoint: "Checkpoint") -> None:
    """Replace the traced weight constants by the codes and matrices of the merged model."""
    from sqft_export.model.storage import quantized_names, read_quantized

    quantized = set(quantized_names(checkpoint))
    for name, constant in _weight_constants(graph).items():
        if name in quantized:
            _place_codes(constant, name, read_quantized(checkpoint, name).numpy())
        elif len(constant.get_output_shape(0)) == 2:
            _place_floats(constant, name, checkpoint.tensor(f"{name}.weight"))
        release_memory()


def add_adapter(folder: Path, adapter: Path) -> None:
    """Write an adapter next to the IR, in the format of ``openvino_genai.Adapter``.

    GenAI does not read peft's config, so the scaling is multiplied into B.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for name, (lora_a, lora_b) in read_low_rank(adapter).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    (folder / ADAPTER_FOLDER).mkdir()
    save_file(tensors, folder / ADAPTER_FOLDER / ADAPTER_FILE)


def _apply_adapter(graph: ov.Model, file: Path) -> ov.Model:
    """Add the two low-rank products of each adapted Linear to the graph, as GenAI does."""
    from safetensors.numpy import load_file

    tensors = load_file(file)
    products = {node.get_friendly_name(): node for node in graph.get_ops()}
    for key, lora_a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = products[f"__module.{name}/aten::linear/MatMul"]
            lora_b = tensors[key.replace(".lora_A.", ".lora_B.")]
            consumers = product.output(0).get_target_inputs()
            low = ops.matmul(product.input_value(0), ops.constant(lora_a), False, True)
            total = ops.add(product, ops.matmul(low, ops.constant(lora_b), False, True))
            for consumer in consumers:
                consumer.replace_source_output(total.output(0))
    return graph


def _place_floats(constant: ov.Node, name: str, weight: "torch.Tensor") -> None:
    """Replace a constant by a float matrix in the dtype of the checkpoint. No value changes."""
    import torch

    if weight.dtype == torch.bfloat16:
        bits = weight.view(torch.int16).numpy()
        stored = ops.constant(ov.Tensor(bits, list(bits.shape), ov.Type.bf16), shared_memory=False)
    else:
        stored = ops.constant(weight.numpy())
    stored.set_friendly_name(f"{name}.weight")
    is_16_bit = weight.dtype != torch.float32
    _replace(constant, ops.convert(stored, "f32") if is_16_bit else stored)


def _replace(constant: ov.Node, node: ov.Node) -> None:
    """Connect every consumer of a constant to a node."""
    for consumer in constant.output(0).get_target_inputs():
        consumer.replace_source_output(node.output(0))


def _weight_constants(graph: ov.Model) -> dict[str, ov.Node]:
    """Return module -> the weight Constant in optimum's trace."""
    found = {}
    for node in graph.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name.endswith(".weight"):
            found[name.removeprefix("self.").removesuffix(".weight")] = node
    return found


def _integer_constant(values: np.ndarray, bits: int, signed: bool) -> ov.Node:
    """Return an OpenVINO Constant of 4- or 8-bit integers in the shape of ``values``.

    :param values: uint8 codes.
    :param signed: store ``code - 2^(bits-1)`` as a signed integer.
    """
    kind = {
        (4, True): ov.Type.i4,
        (4, False): ov.Type.u4,
        (8, True): ov.Type.i8,
        (8, False): ov.Type.u8,
    }[bits, signed]
    # For two's complement, the highest bit of a code is inverted.
    stored = values ^ (1 << (bits - 1)) if signed else values
    if bits == 8:
        stored = stored.view(np.int8) if signed else stored
        return ops.constant(np.ascontiguousarray(stored))
    packed = np.ascontiguousarray(pack_nibbles(stored.reshape(1, -1))[0])
    return ops.constant(ov.Tensor(packed, list(values.shape), kind), shared_memory=False)


def _place_codes(constant: ov.Node, name: str, quantized: QuantizedWeight[np.ndarray]) -> None:
    """Replace a constant by a quantized weight, whose scales are float16."""
    outputs, inputs = quantized.codes.shape
    groups, bits = quantized.scale.shape[1], quantized.bits
    shape = [outputs, inputs] if groups == 1 else [outputs, groups, inputs // groups]
    scale_shape = [outputs, 1] if groups == 1 else [outputs, groups, 1]
    signed = quantized.grid.symmetric
    weight = _integer_constant(quantized.codes.reshape(shape), bits, signed)
    weight.set_friendly_name(f"{name}.weight")
    node = ops.convert(weight, "f16")
    if not signed:
        zero = _integer_constant(quantized.zero_point.reshape(scale_shape), bits, signed=False)
        zero.set_friendly_name(f"{name}.weight/zero_point")
        node = ops.subtract(node, ops.convert(zero, "f16"))
    factor = ops.constant(np.ascontiguousarray(quantized.scale.reshape(scale_shape)))
    factor.set_friendly_name(f"{name}.weight/scale")
    node = ops.multiply(node, factor)
    if groups > 1:
        node = ops.reshape(node, np.array([outputs, inputs], np.int64), special_zero=False)
    _replace(constant, ops.convert(node, "f32"))


def _codes_of(constant: ov.Node) -> np.ndarray:
    """Return the codes of a Constant of :func:`_integer_constant`, uint8 in its shape.

    The result is a copy, because the memory of the graph is freed with the graph.
    """
    kind, shape = constant.get_element_type(), list(constant.get_output_shape(0))
    inverted = {ov.Type.i8: 0x80, ov.Type.i4: 0x88}.get(kind, 0)
    stored = np.frombuffer(constant.get_tensor_view().data, np.uint8).reshape(1, -1) ^ inverted
    if kind in (ov.Type.i8, ov.Type.u8):
        return stored.reshape(shape)
    return unpack_nibbles(stored, int(np.prod(shape)))[0].reshape(shape)


def read_weights(graph: ov.Model) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, one at a time.

    The graph is from this package or from NNCF. Both name the scale and the zero point after the
    weight constant.
    """
    constants = {
        node.get_friendly_name(): node
        for node in graph.get_ops()
        if node.get_type_name() == "Constant"
    }
    for key, scale_node in constants.items():
        if not key.endswith(".weight/scale"):
            continue
        weight = constants[key.removesuffix("/scale")]
        scale = scale_node.data.reshape(weight.get_output_shape(0)[0], -1)
        codes = _codes_of(weight).reshape(scale.shape[0], -1)
        bits = 4 if weight.get_element_type() in (ov.Type.i4, ov.Type.u4) else 8
        zero_node = constants.get(key.removesuffix("scale") + "zero_point")
        if zero_node is None:
            zero = np.full(scale.shape, 2 ** (bits - 1), np.uint8)
        else:
            zero = _codes_of(zero_node).reshape(scale.shape)
        yield key.removesuffix(".weight/scale"), from_arrays(codes, scale.copy(), zero, bits)
    yield from _packed_weights(graph)


def _packed_weights(graph: ov.Model) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield the same for weights in the layout of this package's kernels."""
    for node in graph.get_ops():
        if node.get_type_name() == OPERATOR:
            constant = node.input_value(1).get_node()
            name = constant.get_friendly_name().removesuffix(".weight")
            yield name, unpack_matrix(constant.data, name)


def read_back(folder: Path) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
    """Yield module and quantized weight, scale float16, one at a time, from the written file."""
    yield from read_weights(load_openvino(folder, execution=STOCK))


def _floats_of(constant: ov.Node) -> np.ndarray:
    """Return the values of a float Constant, float32 in its shape."""
    if constant.get_element_type() != ov.Type.bf16:
        return constant.data.astype(np.float32)
    halves = np.frombuffer(constant.get_tensor_view().data, np.uint16).astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(list(constant.get_output_shape(0)))


def read_floats(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of float constants, float32.

    The name of a matrix ``[out, in]`` is its module. The name of a vector or scalar comes from the
    operation that uses it.
    """
    end = ".weight"
    for node in load_openvino(folder, execution=STOCK).get_ops():
        floats = (ov.Type.f32, ov.Type.f16, ov.Type.bf16)
        if node.get_type_name() != "Constant" or node.get_element_type() not in floats:
            continue
        name, values = node.get_friendly_name(), _floats_of(node)
        if name.endswith(end) and values.ndim == 2:
            yield name.removeprefix("self.").removesuffix(end), values
        elif not name.endswith(".weight/scale"):
            yield _vector_name(node), values


def _vector_name(constant: ov.Node) -> str:
    """Return ``<module>.weight`` for a factor, ``<module>.bias`` for a summand, else an empty name.

    The operation that uses the constant decides.
    """
    parts = {"Multiply": "weight", "Add": "bias"}
    for consumer in (port.get_node() for port in constant.output(0).get_target_inputs()):
        if consumer.get_type_name() == "Convert":
            return _vector_name(consumer)
        module, _, operation = consumer.get_friendly_name().partition("/")
        if consumer.get_type_name() in parts and operation.startswith("aten::"):
            return f"{module.removeprefix('__module.')}.{parts[consumer.get_type_name()]}"
    return ""


def metadata(folder: Path) -> dict[str, str]:
    """Return the model facts that the graph stores."""
    graph = load_openvino(folder, execution=STOCK)
    if not graph.has_rt_info(["sqft_export"]):
        return {}
    return {key: str(value) for key, value in graph.get_rt_info("sqft_export").value.items()}


def _add_last_tokens_input(graph: ov.Model) -> None:
    """Add an input: the number of last tokens that need logits. GenAI's pipelines need one."""
    product, visited = graph.output("logits").get_node().input_value(0).get_node(), set[str]()
    while product.get_type_name() not in ("MatMul", OPERATOR):
        if product.get_name() in visited or not product.inputs():
            raise UserError("the graph does not compute logits by a MatMul")
        visited.add(product.get_name())
        product = product.input_value(0).get_node()
    last = ops.parameter([1], np.int64, name=LAST_TOKENS_INPUT)
    last.output(0).set_names({LAST_TOKENS_INPUT})
    hidden, one = product.input_value(0), ops.constant(np.array([1]))
    end = ops.constant(np.array([np.iinfo(np.int64).max]))
    wanted = ops.slice(hidden, ops.negative(last), end, one, one)
    product.input(0).replace_source_output(wanted.output(0))
    graph.add_parameters([last])
    graph.validate_nodes_and_infer_types()


class OpenVinoSession(Session):
    """A session of a stateful IR. The runtime holds the cache."""

    padding = "left"
    computes_padding = True

    def __init__(self, compiled: ov.CompiledModel, device: str = "cpu"):
        self.compiled, self.device = compiled, device
        self.request = compiled.create_infer_request()
        self.names = {name for port in compiled.inputs for name in port.names}
        self.vocabulary = compiled.output("logits").get_partial_shape()[2].get_length()
        self.all_logits = LAST_TOKENS_INPUT not in self.names
        self.joins = not any(
            state.name.startswith(RECURRENT_STATE) for state in self.request.query_state()
        )
        self.reset()

    def reset(self) -> None:
        self.request.reset_state()
        self.past = 0
        self.rows: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> None:
        self.rows = rows if self.rows is None else self.rows[rows]

    @names_device_faults
    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        batch, length = ids.shape
        if mask is None:
            mask = np.ones((batch, self.past + length), np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions_of(mask, length),
            "beam_idx": (np.arange(batch) if self.rows is None else self.rows).astype(np.int32),
            LAST_TOKENS_INPUT: np.array([last or length]),
        }
        self.request.infer({k: v for k, v in inputs.items() if k in self.names})
        self.past, self.rows = self.past + length, None
        logits = self.request.get_tensor("logits").data[:, -(last or length) :]
        if not logits.size:  # with one processor the runtime does not raise errors of operators
            raise RuntimeError(
                "OpenVINO returned no logits: an operator failed; the weights may be damaged"
            )
        return logits.copy()


def _require_cache(graph: ov.Model, folder: Path) -> None:
    """Check that the graph keeps a key-value cache, without which a token sees no context.

    :raises UserError: if it keeps none.
    """
    if all(node.get_type_name() != "ReadValue" for node in graph.get_ops()):
        raise UserError(
            f"{folder / MODEL}: has no ReadValue and so no key-value cache, which a session needs; "
            "export it with: optimum-cli export openvino --task text-generation-with-past, "
            "without --disable-stateful"
        )


def open_session(
    folder: Path,
    exact: bool,
    threads: int | None,
    device: str = "cpu",
    execution: str = STOCK,
    properties: Mapping[str, str] | None = None,
) -> OpenVinoSession:
    """Load an OpenVINO folder into a session.

    :param exact: compute in float32, to compare with torch; else use the runtime's defaults.
    :param threads: CPU threads.
    :param execution: which kernels multiply, see ``packed/execution.py``.
    :param properties: settings in place of the runtime's defaults.
    :raises UserError: if the device is unavailable or the graph has no cache.
    """
    settings: dict[str, str | int] = {**(EXACT if exact else {}), **(properties or {})}
    if device != "cpu":
        find_device("openvino", device)
    elif threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    core, adapter = ov.Core(), folder / ADAPTER_FOLDER / ADAPTER_FILE
    graph = load_openvino(folder, core, execution)
    _require_cache(graph, folder)
    for node in graph.get_ops() if exact else ():
        if node.get_type_name() == OPERATOR:
            node.set_attribute("activations", "f32")
    if adapter.is_file():
        graph = _apply_adapter(graph, adapter)
    if device == "cpu":
        _add_last_tokens_input(graph)
    return OpenVinoSession(core.compile_model(graph, device.upper(), settings), device)


def compressed_kernels(folder: Path, scratch: Path) -> set[str]:
    """Return the Linears and embeddings whose kernel reads 4- or 8-bit weights.

    They are read from the compiled graph. The plugin converted all others to floats.
    """
    core = ov.Core()
    graph = load_openvino(folder, core, STOCK)
    kinds = OPERATOR, LOOKUP
    ours = [n.get_friendly_name() for n in graph.get_ops() if n.get_type_name() in kinds]
    compiled = core.compile_model(graph, "CPU")
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    origins = [
        origin.removeprefix("__module.").partition("/")
        for info in infos
        if info["runtimePrecision"].astype(str) in ("i4", "u4", "i8", "u8")
        for origin in info["originalLayersNames"].astype(str).split(",")
    ]
    origins += [name.removeprefix("__module.").partition("/") for name in ours]
    return {module for module, _, operation in origins if operation in KERNELS}
