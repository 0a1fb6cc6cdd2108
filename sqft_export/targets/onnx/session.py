"""A decoder graph in ONNX Runtime, as deployed or in float32 throughout."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from sqft_export.errors import UserError
from sqft_export.packed.loaders import load_onnx
from sqft_export.targets import Session, last_columns, positions_of
from sqft_export.targets.devices import find_device
from sqft_export.targets.folder import ADAPTER_FOLDER, GENAI_CONFIG, GRAPHS
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_ONNX_BYTES, read_bounded

ADAPTER_FILE = "adapter.onnx_adapter"
FUSED = b"GroupQueryAttention"
CPU_PROVIDER = "CPUExecutionProvider"
HEADS = ("MatMulNBits", "MatMul", "Gemm")
WANTED = "wanted_logits"
CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ROOM = 64  # tokens that a cache is given room for at first; then twice as many, and so on
EXACT_ACCURACY = 1  # float32 activations; as deployed they are int8


def decoder_of(folder: Path) -> dict[str, Any]:
    """What ``genai_config.json`` says of the decoder.

    :raises UserError: if it says nothing.
    """
    model = read_json(folder / GENAI_CONFIG).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    for name in ("num_key_value_heads", "head_size"):
        if not isinstance(decoder, dict) or not isinstance(decoder.get(name), int):
            raise UserError(f"{folder / GENAI_CONFIG}: model.decoder.{name}: a number is expected")
    assert isinstance(decoder, dict)
    return decoder


def set_accuracy(graph: Any, level: int) -> None:
    """The same accuracy level on every MatMulNBits."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level


def _ask_for_logits(graph: Any) -> None:
    """An input more: of which tokens of every row logits are wanted, int64 ``[batch, n, 1]``."""
    from onnx import TensorProto, helper

    makers = {name: node for node in graph.node for name in node.output}
    head, passed = makers.get("logits"), set[str]()
    while head is not None and head.op_type not in HEADS:
        source = head.input[0] if head.input else ""
        head = None if source in passed else makers.get(source)
        passed.add(source)
    if head is None:
        raise UserError(f"the graph makes no logits by any of {', '.join(HEADS)}")
    wanted = f"{head.input[0]}/wanted"
    gather = helper.make_node("GatherND", [head.input[0], WANTED], [wanted], batch_dims=1)
    head.input[0] = wanted
    graph.node.insert(list(graph.node).index(head), gather)
    shape = ["batch_size", WANTED, 1]
    graph.input.append(helper.make_tensor_value_info(WANTED, TensorProto.INT64, shape))
    logits = next(output for output in graph.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = WANTED


def _edited(exact: bool, graph: bytes) -> bytes:
    import onnx

    model = onnx.load_from_string(graph)
    _ask_for_logits(model.graph)
    if exact:
        set_accuracy(model.graph, EXACT_ACCURACY)
    return model.SerializeToString()


def _of_like_lengths(lengths: np.ndarray, pass_tokens: int) -> list[np.ndarray]:
    """Rows in parts, the longest first; what fills a part up takes no longer than one more pass.

    :param lengths: int64 ``[batch]``.
    """
    parts: list[list[int]] = []
    longest = spare = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        spare += longest - lengths[row]
        if not parts or spare > pass_tokens:
            parts, longest, spare = [*parts, []], lengths[row], 0
        parts[-1].append(row)
    return [np.array(part) for part in parts]


class OnnxSession(Session):
    """A decoder graph with its cache as inputs and outputs, kept in the runtime's memory.

    The fused attention fills up on the right: prompts go in parts of like lengths, whose caches are
    joined. It writes to a cache that has room where it lies. Several tokens after a cache it takes
    for one row alone: those of more rows go one after the other.

    :param load: the graph in the runtime; told to, with ``wanted_logits``.
    :param asked: with them from the start; else as deployed, with logits of every token, until
        those of some alone are asked for.
    """

    all_logits = False
    fills_up = True
    pass_tokens = 8

    def __init__(
        self,
        load: Callable[[bool], Any],
        decoder: dict[str, Any],
        fused: bool,
        asked: bool,
        adapter: Any = None,
    ):
        self.load, self.session, self.asked = load, load(asked), asked
        self.decoder, self.adapter = decoder, adapter
        self.options = ort.RunOptions()
        if adapter is not None:
            self.options.add_active_adapter(adapter)
        inputs = [i.name for i in self.session.get_inputs()]
        self.cache_dtype = cache_dtype(self.session)
        self.wants_positions = "position_ids" in inputs
        self.caches = [name for name in inputs if name.startswith("past_")]
        self.presents = [re.sub("^past_key_values", "present", name) for name in self.caches]
        self.padding = "right" if fused else "left"
        on_cpu = self.session.get_providers()[0] == CPU_PROVIDER
        self.in_place = fused and on_cpu and adapter is None  # bound outputs take no adapter
        self.vocabulary = next(
            output.shape[2] for output in self.session.get_outputs() if output.name == "logits"
        )
        self.reset()

    def reset(self) -> None:
        self.past: list[Any] | None = None
        self.rows: np.ndarray | None = None  # of the cache, that go on
        self.length, self.room = 0, ROOM

    def _room_for(self, batch: int, tokens: int) -> np.ndarray:
        """Zeros for the keys or the values of a layer: ``[batch, heads, tokens, head_size]``."""
        heads, size = self.decoder["num_key_value_heads"], self.decoder["head_size"]
        return np.zeros((batch, heads, tokens, size), self.cache_dtype)

    def select(self, rows: np.ndarray) -> None:
        self.rows = rows if self.rows is None else self.rows[rows]

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        batch, length = ids.shape
        self.length += length
        if last and not self.asked:
            self.session = None  # not beside the other
            self.session, self.asked = self.load(True), True
        if mask is None:
            mask = np.ones((batch, self.length), np.int64)
        wanted = last_columns(mask[:, -length:], last)
        if self.padding == "right" and batch > 1:
            if not self.past and last:
                return self._in_parts(ids, mask, wanted)
            if self.past and length > 1:
                return self._token_by_token(ids, mask, wanted)
        return self._run(ids, mask, wanted)

    def likeliest(self, ids: np.ndarray) -> np.ndarray:
        """By the logits of every token, as where it is deployed."""
        return self.forward(ids)[:, -1].argmax(axis=-1).astype(np.int64)

    def _in_parts(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Prompts by their lengths, so that little of what fills them up is computed."""
        lengths = mask.sum(axis=1)
        parts = _of_like_lengths(lengths, self.pass_tokens)
        if len(parts) == 1:
            return self._run(ids, mask, wanted)
        capacity = ids.shape[1] + (self.room if self.in_place else 0)
        whole = [self._room_for(len(ids), capacity) for _ in self.caches]
        logits = np.empty((*wanted.shape, self.vocabulary), np.float32)
        for rows in parts:
            longest, self.past = lengths[rows].max(), None
            logits[rows] = self._run(ids[rows, :longest], mask[rows, :longest], wanted[rows])
            assert self.past is not None
            for joined, part in zip(whole, self.past, strict=True):
                joined[rows, :, :longest] = part.numpy()
        self.past = [ort.OrtValue.ortvalue_from_numpy(joined) for joined in whole]
        return logits

    def _token_by_token(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """What fills a row up is written behind its last token, where the next one will be."""
        before = self.length - ids.shape[1]
        logits = np.empty((*wanted.shape, self.vocabulary), np.float32)
        for column in range(ids.shape[1]):
            seen = mask[:, : before + column + 1].copy()
            seen[:, -1] = 1
            step = self._run(ids[:, [column]], seen, np.zeros((len(ids), 1), np.int64))
            at = np.nonzero(wanted == column)
            logits[at] = step[at[0], 0]
        return logits

    def _run(self, ids: np.ndarray, mask: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self.asked:
            arrays[WANTED] = wanted[..., None]
        if self.wants_positions:
            arrays["position_ids"] = positions_of(mask, length)
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
        }
        if self.past:
            self._make_ready(mask.shape[1] - length, mask.shape[1])
            if self.in_place:
                return self._run_in_place(feeds)
        past = self.past or [
            ort.OrtValue.ortvalue_from_numpy(self._room_for(batch, 0)) for _ in self.caches
        ]
        feeds |= dict(zip(self.caches, past, strict=True))
        logits, *self.past = self.session.run_with_ort_values(
            ["logits", *self.presents], feeds, self.options
        )
        return logits.numpy().astype(np.float32, copy=False)

    def _make_ready(self, cached: int, tokens: int) -> None:
        """Of the cache the rows that go on, with room for so many tokens where it is written to."""
        assert self.past is not None
        batch, _, capacity, _ = self.past[0].shape()
        if self.in_place and capacity < tokens:
            capacity, self.room = tokens + self.room, 2 * self.room
        elif self.rows is None:
            return
        rows = np.arange(batch) if self.rows is None else self.rows
        for index, cache in enumerate(self.past):  # one at a time: two whole caches take room
            copy = self._room_for(len(rows), capacity)
            copy[:, :, :cached] = cache.numpy()[rows, :, :cached]
            self.past[index] = ort.OrtValue.ortvalue_from_numpy(copy)
        self.rows = None

    def _run_in_place(self, feeds: dict[str, Any]) -> np.ndarray:
        assert self.past is not None
        binding = self.session.io_binding()
        binding.bind_output("logits")
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name, present, cache in zip(self.caches, self.presents, self.past, strict=True):
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(present, cache)
        self.session.run_with_iobinding(binding, self.options)
        return binding.get_outputs()[0].numpy().astype(np.float32, copy=False)


def cache_dtype(session: Any) -> Any:
    """The dtype of a graph's key-value cache.

    :raises UserError: naming the input, if numpy has no such type or there is no cache.
    """
    caches = [i for i in session.get_inputs() if i.name.startswith("past_")]
    if not caches:
        raise UserError("the graph has no past_key_values inputs; sessions need a key-value cache")
    if caches[0].type not in CACHE_DTYPES:
        raise UserError(
            f"{caches[0].name} is {caches[0].type}; allowed are {', '.join(CACHE_DTYPES)}"
        )
    return CACHE_DTYPES[caches[0].type]


def has_half_cache(session: Any) -> bool:
    """Whether the key-value cache of a graph is float16."""
    inputs = session.get_inputs()
    return any(i.name.startswith("past_") and i.type == "tensor(float16)" for i in inputs)


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> OnnxSession:
    """An ONNX folder on a device.

    :param exact: float32 activations in every MatMulNBits; else as deployed.
    :param threads: of the CPU.
    :raises UserError: if the device is not here.
    """
    provider = CPU_PROVIDER if device == "cpu" else find_device("onnx", device).name

    def load(wanted_logits: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        edit = partial(_edited, exact) if wanted_logits else None
        session = load_onnx(folder, options, [provider], edit)
        if provider == CPU_PROVIDER and has_half_cache(session):
            # GenAI's builder names sizes wrongly there: a reused buffer would be too small.
            options.enable_mem_reuse = False
            session = load_onnx(folder, options, [provider], edit)
        if session.get_providers()[0] != provider:  # the runtime goes on without, and logs it alone
            raise UserError(f"{folder}: {provider} could not be started; see ONNX Runtime's log")
        return session

    adapter = None
    if (file := folder / ADAPTER_FOLDER / ADAPTER_FILE).is_file():
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
    fused = FUSED in read_bounded(folder / GRAPHS["onnx"], MAX_ONNX_BYTES)
    # An exact one is edited in any case, and so asked from the start.
    return OnnxSession(load, decoder_of(folder), fused, exact, adapter)
