"""Run a decoder graph in ONNX Runtime, in its default mode or with float32 activations."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import onnxruntime as ort

from sqft_export.errors import UserError
from sqft_export.packed.loaders import load_onnx
from sqft_export.targets import RECURRENT_STATE, Session, last_columns, positions_of
from sqft_export.targets.devices import find_device
from sqft_export.targets.faults import names_device_faults
from sqft_export.targets.folder import ADAPTER_FOLDER, GENAI_CONFIG, graph_and_weights
from sqft_export.targets.genai_config import DecoderConfig
from sqft_export.targets.webgpu import WEBGPU_PROVIDER, add_webgpu
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_ONNX_BYTES, read_bounded

if TYPE_CHECKING:
    from onnx import GraphProto

ADAPTER_FILE = "adapter.onnx_adapter"
FUSED_OPERATOR = b"GroupQueryAttention"
CPU_PROVIDER = "CPUExecutionProvider"
LOGIT_OPERATORS = ("MatMulNBits", "MatMul", "Gemm")
WANTED_INPUT = "wanted_logits"
CACHE_DTYPES: dict[str, type[np.floating]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
POSITION_PARTS = 3
FIRST_SPARE_TOKENS = 64  # initial spare capacity of a cache; it doubles each time it is used up
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
FLOAT32_ACCURACY = 1  # accuracy level of float32 activations; the default mode uses int8


def decoder_of(folder: Path) -> DecoderConfig:
    """Return the decoder section of ``genai_config.json``.

    :raises UserError: if it is missing or has no head count or head size.
    """
    model = read_json(folder / GENAI_CONFIG).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    for name in ("num_key_value_heads", "head_size"):
        if not isinstance(decoder, dict) or not isinstance(decoder.get(name), int):
            raise UserError(f"{folder / GENAI_CONFIG}: model.decoder.{name}: a number is expected")
    return cast(DecoderConfig, decoder)


def set_accuracy(graph: "GraphProto", level: int) -> None:
    """Set the accuracy level of every MatMulNBits."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level


def _add_wanted_input(graph: "GraphProto") -> None:
    """Add an input: the columns that need logits per row, int64 ``[batch, n, 1]``."""
    from onnx import TensorProto, helper

    makers = {name: node for node in graph.node for name in node.output}
    head, visited = makers.get("logits"), set[str]()
    while head is not None and head.op_type not in LOGIT_OPERATORS:
        source = head.input[0] if head.input else ""
        head = None if source in visited else makers.get(source)
        visited.add(source)
    if head is None:
        raise UserError(f"the graph does not compute logits by any of {', '.join(LOGIT_OPERATORS)}")
    wanted = f"{head.input[0]}/wanted"
    gather = helper.make_node("GatherND", [head.input[0], WANTED_INPUT], [wanted], batch_dims=1)
    head.input[0] = wanted
    graph.node.insert(list(graph.node).index(head), gather)
    shape = ["batch_size", WANTED_INPUT, 1]
    graph.input.append(helper.make_tensor_value_info(WANTED_INPUT, TensorProto.INT64, shape))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = WANTED_INPUT


def _edit_graph(exact: bool, graph: bytes) -> bytes:
    """Return the graph with a ``wanted_logits`` input, and float32 activations if ``exact``."""
    import onnx

    model = onnx.load_from_string(graph)
    _add_wanted_input(model.graph)
    if exact:
        set_accuracy(model.graph, FLOAT32_ACCURACY)
    return model.SerializeToString()


def _split_by_length(lengths: np.ndarray, pass_tokens: int) -> list[np.ndarray]:
    """Split a batch into parts of similar lengths, longest first.

    The padding of a part takes no longer than one more pass.

    :param lengths: tokens per row, int64 ``[batch]``.
    :param pass_tokens: padding tokens that take as long as one more pass.
    :return: rows of each part.
    """
    parts: list[list[int]] = []
    longest = padding = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        padding += longest - lengths[row]
        if not parts or padding > pass_tokens:
            parts, longest, padding = [*parts, []], lengths[row], 0
        parts[-1].append(row)
    return [np.array(part) for part in parts]


class OnnxSession(Session):
    """A session of a decoder graph whose cache is inputs and outputs, in the runtime's memory.

    The fused attention (GroupQueryAttention) has three constraints:

    - It pads on the right. Prompts run in parts of similar lengths, whose caches are joined.
    - It writes in place to a cache with spare capacity.
    - It continues a cache by several tokens for one row only. Several rows continue token by token.

    A recurrent layer keeps a state of fixed size, which padding would change. Prompts of a model
    with such layers run in parts of equal lengths.

    :param load: loads the graph into the runtime; ``load(True)`` adds the ``wanted_logits`` input.
    :param selects_logits: load with this input at once. Otherwise the graph is unchanged and
        computes all logits, until a caller requests only some; it is then loaded again.
    """

    all_logits = False
    computes_padding = True
    pass_tokens = 8

    def __init__(
        self,
        load: Callable[[bool], ort.InferenceSession],
        decoder: DecoderConfig,
        fused: bool,
        selects_logits: bool,
        adapter: ort.LoraAdapter | None = None,
    ):
        self.load, self.session = load, load(selects_logits)
        self.selects_logits = selects_logits
        self.decoder, self.adapter = decoder, adapter
        self.options = ort.RunOptions()
        if adapter is not None:
            self.options.add_active_adapter(adapter)
        self.shapes = {i.name: i.shape for i in self.session.get_inputs()}
        self.cache_dtype = cache_dtype(self.session)
        self.wants_positions = "position_ids" in self.shapes
        # A model for pictures has time, height and width, which are equal for text.
        self.three_positions = self.shapes.get("position_ids", [0])[0] == POSITION_PARTS
        self.caches = [one.name for one in cache_inputs(self.session)]
        self.presents = [re.sub("^past(_key_values)?", "present", name) for name in self.caches]
        self.states = {
            name: tuple(self.shapes[name][1:])
            for name in self.caches
            if name.startswith(RECURRENT_STATE)
        }
        self.padding = "right" if fused else "left"
        provider = self.session.get_providers()[0]
        self.device = "cpu" if provider == CPU_PROVIDER else provider
        self.in_place = (
            fused and self.device == "cpu" and adapter is None
        )  # bound outputs exclude adapters
        self.vocabulary = next(
            output.shape[2] for output in self.session.get_outputs() if output.name == "logits"
        )
        self.reset()

    def reset(self) -> None:
        self.past: list[ort.OrtValue] | None = None
        self.rows: np.ndarray | None = None  # rows of the cache to continue
        self.length, self.spare = 0, FIRST_SPARE_TOKENS

    def _empty_cache(self, name: str, batch: int, tokens: int) -> np.ndarray:
        """Return zeros for an input: a state, or keys or values of a layer.

        Keys and values are ``[batch, heads, tokens, head_size]``. ``genai_config.json`` has the
        sizes that the shape of the input leaves open.
        """
        if name in self.states:
            return np.zeros((batch, *self.states[name]), self.cache_dtype)
        _, heads, _, size = self.shapes[name]
        heads = heads if isinstance(heads, int) else self.decoder["num_key_value_heads"]
        size = size if isinstance(size, int) else self.decoder["head_size"]
        return np.zeros((batch, heads, tokens, size), self.cache_dtype)

    def select(self, rows: np.ndarray) -> None:
        self.rows = rows if self.rows is None else self.rows[rows]

    @names_device_faults
    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        batch, length = ids.shape
        self.length += length
        if last and not self.selects_logits:
            self.session = None  # free its memory before the second load
            self.session, self.selects_logits = self.load(True), True
        if mask is None:
            mask = np.ones((batch, self.length), np.int64)
        wanted = last_columns(mask[:, -length:], last)
        if self.padding == "right" and batch > 1:
            if not self.past and (last or self.states):
                return self._run_in_parts(ids, mask, wanted)
            if self.past and length > 1:
                return self._run_columns(ids, mask, wanted)
        return self._run(ids, mask, wanted)

    def argmax_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return the argmax token per row from all logits, as users of the deployment get it."""
        return self.forward(ids)[:, -1].argmax(axis=-1).astype(np.int64)

    def _run_in_parts(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Run prompts in parts of similar lengths, so that little padding is computed.

        Logits of columns that are not computed are zeros.
        """
        lengths = mask.sum(axis=1)
        parts = _split_by_length(lengths, 0 if self.states else self.pass_tokens)
        if len(parts) == 1:
            return self._run(ids, mask, wanted)
        capacity = ids.shape[1] + (self.spare if self.in_place else 0)
        whole = [self._empty_cache(name, len(ids), capacity) for name in self.caches]
        logits = np.zeros((*wanted.shape, self.vocabulary), np.float32)
        for rows in parts:
            longest, self.past = lengths[rows].max(), None
            columns = np.minimum(wanted[rows], longest - 1)
            computed = self._run(ids[rows, :longest], mask[rows, :longest], columns)
            logits[rows, : computed.shape[1]] = computed
            assert self.past is not None
            for name, joined, part in zip(self.caches, whole, self.past, strict=True):
                part_columns = slice(None) if name in self.states else slice(longest)
                joined[rows, :, part_columns] = part.numpy()
        self.past = [ort.OrtValue.ortvalue_from_numpy(joined) for joined in whole]
        return logits

    def _run_columns(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Continue several rows, one column at a time.

        Padding is written to the cache after the last token of a row. The next token overwrites it.
        """
        cached = self.length - ids.shape[1]
        logits = np.empty((*wanted.shape, self.vocabulary), np.float32)
        for column in range(ids.shape[1]):
            seen = mask[:, : cached + column + 1].copy()
            seen[:, -1] = 1
            step = self._run(ids[:, [column]], seen, np.zeros((len(ids), 1), np.int64))
            selected = np.nonzero(wanted == column)
            logits[selected] = step[selected[0], 0]
        return logits

    def _run(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Run the graph once and keep its cache; return the logits of the wanted columns."""
        batch, length = ids.shape
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self.selects_logits:
            arrays[WANTED_INPUT] = wanted[..., None]
        if self.wants_positions:
            positions = positions_of(mask, length)
            parts = (POSITION_PARTS, 1, 1) if self.three_positions else (1, 1)
            arrays["position_ids"] = np.tile(positions, parts)
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        if self.past:
            self._prepare_cache(mask.shape[1] - length, mask.shape[1])
            if self.in_place:
                return self._run_in_place(feeds)
        past = self.past or [
            ort.OrtValue.ortvalue_from_numpy(self._empty_cache(name, batch, 0))
            for name in self.caches
        ]
        feeds |= dict(zip(self.caches, past, strict=True))
        logits, *self.past = self.session.run_with_ort_values(
            ["logits", *self.presents], feeds, self.options
        )
        return logits.numpy().astype(np.float32, copy=False)

    def _prepare_cache(self, cached: int, tokens: int) -> None:
        """Copy the selected rows of the cache, with more capacity if it is written in place.

        :param cached: tokens in the cache.
        :param tokens: tokens that it must hold.
        """
        assert self.past is not None
        keys = next(n for n, name in enumerate(self.caches) if name not in self.states)
        batch, _, capacity, _ = self.past[keys].shape()
        if self.in_place and capacity < tokens:
            capacity, self.spare = tokens + self.spare, 2 * self.spare
        elif self.rows is None:
            return
        rows = np.arange(batch) if self.rows is None else self.rows
        for index, cache in enumerate(self.past):  # one tensor at a time, to save memory
            name = self.caches[index]
            copy = self._empty_cache(name, len(rows), capacity)
            columns = slice(None) if name in self.states else slice(cached)
            copy[:, :, columns] = cache.numpy()[rows, :, columns]
            self.past[index] = ort.OrtValue.ortvalue_from_numpy(copy)
        self.rows = None

    def _run_in_place(self, feeds: dict[str, ort.OrtValue]) -> np.ndarray:
        """Run the graph with each tensor of keys and values bound as both input and output."""
        assert self.past is not None
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name, present, cache in zip(self.caches, self.presents, self.past, strict=True):
            binding.bind_ortvalue_input(name, cache)
            if name in self.states:
                binding.bind_output(present)
            else:
                binding.bind_ortvalue_output(present, cache)
        self.session.run_with_iobinding(binding, self.options)
        logits, *presents = binding.get_outputs()
        for index, name in enumerate(self.caches):
            if name in self.states:  # the binding owns its outputs, so that they are copied
                copy = ort.OrtValue.ortvalue_from_numpy(presents[index].numpy().copy())
                self.past[index] = copy
        return logits.numpy().astype(np.float32, copy=False)


def cache_inputs(session: ort.InferenceSession) -> list[ort.NodeArg]:
    """Return the inputs of the cache: keys and values, and states of recurrent layers."""
    starts = ("past_", RECURRENT_STATE)
    return [i for i in session.get_inputs() if i.name.startswith(starts)]


def placement_text(session: ort.InferenceSession, folder: Path) -> str:
    """Return how many nodes of a deployment's graph stay on the CPU, and their kinds.

    ONNX Runtime records the nodes on the CPU; built-in providers do not record theirs.
    """
    import onnx

    nodes = onnx.load(graph_and_weights(folder)[0], load_external_data=False).graph.node
    graphs = session.get_provider_graph_assignment_info()
    left = Counter(
        node.op_type
        for graph in graphs
        if graph.ep_name == CPU_PROVIDER
        for node in graph.get_nodes()
    )
    kinds = ", ".join(f"{kind} {count}" for kind, count in left.most_common())
    return f"{session.get_providers()[0]}; {left.total()} of {len(nodes)} nodes stay on the CPU" + (
        f" ({kinds})" if kinds else ""
    )


def cache_dtype(session: ort.InferenceSession) -> type[np.floating]:
    """Return the dtype of a graph's key-value cache.

    :raises UserError: if the graph has no cache, or its type is not float32 or float16.
    """
    caches = cache_inputs(session)
    if not caches:
        raise UserError("the graph has no past_key_values inputs; sessions need a key-value cache")
    if caches[0].type not in CACHE_DTYPES:
        raise UserError(
            f"{caches[0].name} is {caches[0].type}; allowed are {', '.join(CACHE_DTYPES)}"
        )
    return CACHE_DTYPES[caches[0].type]


def has_half_cache(session: ort.InferenceSession) -> bool:
    """Return whether the key-value cache of a graph is float16."""
    inputs = session.get_inputs()
    return any(i.name.startswith("past_") and i.type == "tensor(float16)" for i in inputs)


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> OnnxSession:
    """Load an ONNX folder into a session.

    :param exact: float32 activations in every MatMulNBits; else the accuracy level of the file.
    :param threads: CPU threads.
    :raises UserError: if the device is unavailable.
    """
    return open_decoder(folder, decoder_of(folder), exact, threads, device)


def _session_options(provider: str, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if provider != CPU_PROVIDER:
        options.add_session_config_entry(RECORD_PLACEMENT, "1")
    if provider == WEBGPU_PROVIDER:
        add_webgpu(options)
    return options


def open_decoder(
    folder: Path, decoder: DecoderConfig, exact: bool, threads: int | None, device: str
) -> OnnxSession:
    """Load the decoder graph of a deployment for ONNX Runtime or the web into a session.

    :param decoder: sizes of the key-value cache.
    """
    provider = CPU_PROVIDER if device == "cpu" else find_device("onnx", device).name

    def load(wanted_logits: bool) -> ort.InferenceSession:
        options = _session_options(provider, threads)
        edit = partial(_edit_graph, exact) if wanted_logits else None
        session = load_onnx(folder, options, [provider], edit)
        if provider == CPU_PROVIDER and has_half_cache(session):
            # GenAI's builder names sizes of such a graph wrongly; reused buffers are too small.
            options.enable_mem_reuse = False
            session = load_onnx(folder, options, [provider], edit)
        # ONNX Runtime falls back to another provider and only logs it.
        if (found := session.get_providers()[0]) != provider:
            raise UserError(
                f"{folder}: {provider} could not be started, ONNX Runtime took {found}; is the "
                "driver of the GPU installed? --device cpu runs it on the CPU"
            )
        return session

    adapter = None
    if (file := folder / ADAPTER_FOLDER / ADAPTER_FILE).is_file():
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
    fused = FUSED_OPERATOR in read_bounded(graph_and_weights(folder)[0], MAX_ONNX_BYTES)
    # An exact session edits the graph anyway, so it selects logits from the start.
    session = OnnxSession(load, decoder, fused, exact, adapter)
    if provider != CPU_PROVIDER:
        session.placement = placement_text(session.session, folder)
    return session
