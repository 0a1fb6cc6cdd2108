"""Trace a hybrid decoder to OpenVINO, with the states of its layers as variables of the graph.

optimum-intel's export configs of these models need other versions of transformers. The model is
therefore converted directly. Its forward gets the states as inputs and returns the new ones;
OpenVINO then turns each such pair into a variable.
"""

import inspect
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.frontend.pytorch import ConversionExtension, ModuleExtension
from openvino.passes import MakeStateful, Manager
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sqft_export.libraries.optimum import convert_delta_rule
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import float_config, write_config
from sqft_export.model.families import FULL_ATTENTION
from sqft_export.model.recurrent import DeltaSteps
from sqft_export.model.skeleton import skeleton

INPUTS = ("input_ids", "attention_mask", "position_ids")
BEAM_INPUT = "beam_idx"
_DELTA_OPERATION = "DeltaSteps"
_EXAMPLE_ROWS, _EXAMPLE_TOKENS, _EXAMPLE_CACHED = 2, 3, 4
# Kind of a layer -> its states: field of :class:`_LayerStates`, name in the graph with the layer.
_STATES = {
    FULL_ATTENTION: {"keys": "past_key_values.%d.key", "values": "past_key_values.%d.value"},
    "conv": {"conv_states": "past.%d.conv"},
    "linear_attention": {
        "conv_states": "past.%d.conv",
        "recurrent_states": "past.%d.recurrent",
    },
}


class _State(NamedTuple):
    """A state of a layer: its name in the graph and its shape; 0 for the number of tokens."""

    layer: int
    part: str
    name: str
    shape: tuple[int, ...]


@dataclass
class _LayerStates:
    """The states of one layer; which of them exist depends on the kind of the layer."""

    keys: Tensor | None = None
    values: Tensor | None = None
    conv_states: Tensor | None = None
    recurrent_states: Tensor | None = None


class _GraphCache:
    """A cache whose states are inputs of a graph; they are replaced by its outputs."""

    def __init__(self, layers: list[_LayerStates]):
        self.layers = layers

    def has_previous_state(self, layer_idx: int) -> bool:
        return self.layers[layer_idx].conv_states is not None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``[batch, heads, length, size]``."""
        layer = self.layers[layer_idx]
        assert layer.keys is not None and layer.values is not None
        layer.keys = torch.cat([layer.keys, keys], dim=2)
        layer.values = torch.cat([layer.values, values], dim=2)
        return layer.keys, layer.values

    def update_conv_state(self, conv_states: Tensor, layer_idx: int) -> Tensor:
        """Replace a convolution's state; the graph holds one column less than transformers."""
        self.layers[layer_idx].conv_states = conv_states[..., 1:]
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int) -> Tensor:
        """Replace the matrix of a recurrent layer."""
        self.layers[layer_idx].recurrent_states = recurrent_states
        return recurrent_states


def trace_hybrid(checkpoint: Checkpoint, file: Path) -> None:
    """Write the stateful graph of a hybrid with empty matrices, and its configs.

    :param file: the IR to write.
    """
    file.parent.mkdir()
    write_config(file.parent, float_config(checkpoint.config))
    if (generation := checkpoint.folder / "generation_config.json").is_file():
        shutil.copyfile(generation, file.parent / generation.name)
    model = skeleton(checkpoint)
    states = list(_states_of(model.config))
    model.forward = partial(_forward, model, states)
    names = [*INPUTS, *(f"state_{number}" for number in range(len(states)))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    model.forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])
    loop = [
        ModuleExtension(DeltaSteps, _DELTA_OPERATION),
        ConversionExtension(_DELTA_OPERATION, convert_delta_rule),
    ]
    with torch.no_grad():
        graph = ov.convert_model(model, example_input=_example_inputs(states), extension=loop)
    _name_ports(graph, states)
    _make_stateful(graph, states)
    ov.save_model(graph, file, compress_to_fp16=False)


def _states_of(config: PretrainedConfig) -> Iterator[_State]:
    """Yield the states of every layer in order."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = (config.num_key_value_heads, 0, size)
    for layer, kind in enumerate(config.layer_types):
        shapes = {"keys": attention, "values": attention} | _recurrent_shapes(config, kind)
        for part, name in _STATES[kind].items():
            yield _State(layer, part, name % layer, shapes[part])


def _recurrent_shapes(config: PretrainedConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the states of a recurrent layer, without the batch."""
    if kind == "conv":
        return {"conv_states": (config.hidden_size, config.conv_L_cache - 1)}
    if kind == FULL_ATTENTION:
        return {}
    heads = config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    channels = 2 * keys + heads * config.linear_value_head_dim
    return {
        "conv_states": (channels, config.linear_conv_kernel_dim - 1),
        "recurrent_states": (heads, config.linear_key_head_dim, config.linear_value_head_dim),
    }


def _example_inputs(states: list[_State]) -> tuple[Tensor, ...]:
    rows, tokens, cached = _EXAMPLE_ROWS, _EXAMPLE_TOKENS, _EXAMPLE_CACHED
    shapes = [[cached if size == 0 else size for size in state.shape] for state in states]
    return (
        torch.ones(rows, tokens, dtype=torch.int64),
        torch.ones(rows, cached + tokens, dtype=torch.int64),
        torch.arange(cached, cached + tokens).repeat(rows, 1),
        *(torch.zeros(rows, *shape) for shape in shapes),
    )


def _forward(
    model: PreTrainedModel,
    states: list[_State],
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Return the logits and the new states."""
    decoder = model.base_model
    cache = _GraphCache([_LayerStates() for _ in decoder.layers])
    for state, tensor in zip(states, tensors, strict=True):
        setattr(cache.layers[state.layer], state.part, tensor)
    hidden = decoder.embed_tokens(input_ids)
    visible = _causal_mask(attention_mask, input_ids.shape[1])
    rotary = _first_module(decoder, "rotary_emb", "pos_emb")(hidden, position_ids)
    for layer, kind in zip(decoder.layers, model.config.layer_types, strict=True):
        hidden = layer(
            hidden,
            position_embeddings=rotary,
            attention_mask=visible if kind == FULL_ATTENTION else attention_mask,
            past_key_values=cache,
        )
    logits = model.lm_head(_first_module(decoder, "embedding_norm", "norm")(hidden))
    return (logits, *(getattr(cache.layers[one.layer], one.part) for one in states))


def _first_module(decoder: nn.Module, *names: str) -> nn.Module:
    """Return the module under the first of some names; model classes name it differently."""
    return decoder.get_submodule(next(name for name in names if hasattr(decoder, name)))


def _causal_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Return what is added to scores, float32 ``[batch, 1, length, cached + length]``.

    :param attention_mask: int64 ``[batch, cached + length]``, 0 at padding.
    """
    columns = torch.arange(attention_mask.shape[1])
    rows = columns[-length:, None]
    visible = (columns <= rows) & attention_mask[:, None, None, :].bool()
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(1).masked_fill(~visible, hidden)


def _name_ports(graph: ov.Model, states: list[_State]) -> None:
    """Name inputs and outputs, and let batch and number of tokens be dynamic."""
    outputs = ["logits", *(_output_name(state) for state in states)]
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    shapes = [[-1, -1] for _ in INPUTS] + [[-1, *(s or -1 for s in one.shape)] for one in states]
    inputs = [*INPUTS, *(state.name for state in states)]
    for port, name, shape in zip(graph.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    graph.validate_nodes_and_infer_types()


def _output_name(state: _State) -> str:
    return state.name.replace("past_key_values", "present").replace("past.", "present.")


def _make_stateful(graph: ov.Model, states: list[_State]) -> None:
    """Turn states into variables that begin as zeros, and add ``beam_idx``, which selects rows."""
    rows = ops.parameter([-1], np.int32, name=BEAM_INPUT)
    rows.output(0).get_tensor().set_names({BEAM_INPUT})
    graph.add_parameters([rows])
    for state in states:
        port = graph.input(state.name)
        consumers = port.get_target_inputs()
        selected = ops.gather(port, rows, ops.constant(np.int64(0)))
        for consumer in consumers:
            consumer.replace_source_output(selected.output(0))
    graph.validate_nodes_and_infer_types()
    passes = Manager()
    passes.register_pass(MakeStateful({one.name: _output_name(one) for one in states}))
    passes.run_passes(graph)
    ids = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch = ops.gather(ids, ops.constant([0]), ops.constant(0))
    for node in [one for one in graph.get_ops() if one.get_type_name() == "ReadValue"]:
        sizes = [dim.min_length for dim in node.get_output_partial_shape(0)][1:]
        shape = ops.concat([batch, ops.constant(np.array(sizes, np.int64))], axis=0)
        node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), shape)])
    graph.validate_nodes_and_infer_types()
