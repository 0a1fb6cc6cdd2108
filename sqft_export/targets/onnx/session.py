"""A decoder graph in ONNX Runtime, as deployed or in float32 throughout."""

import re
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

ADAPTER_FILE = "adapter.onnx_adapter"
FUSED = b"GroupQueryAttention"
CPU_PROVIDER = "CPUExecutionProvider"
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


def with_accuracy(folder: Path, level: int) -> bytes:
    """The graph, its weights still outside, with another accuracy level on every MatMulNBits."""
    import onnx

    model = onnx.load(folder / GRAPHS["onnx"], load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = level
    return model.SerializeToString()


class OnnxSession(Session):
    """A decoder graph with its cache as inputs and outputs, kept in the runtime's memory.

    The fused attention fills up on the right, and takes several tokens after a cache for one row
    alone: those of more rows go one after the other.
    """

    all_logits = True
    fills_up = True

    def __init__(self, session: Any, decoder: dict[str, Any], fused: bool, adapter: Any = None):
        self.session, self.decoder, self.adapter = session, decoder, adapter
        self.options = ort.RunOptions()
        if adapter is not None:
            self.options.add_active_adapter(adapter)
        inputs = [i.name for i in session.get_inputs()]
        self.wants_positions = "position_ids" in inputs
        self.caches = [name for name in inputs if name.startswith("past_")]
        self.presents = [re.sub("^past_key_values", "present", name) for name in self.caches]
        self.padding = "right" if fused else "left"
        self.vocabulary = next(o.shape[2] for o in session.get_outputs() if o.name == "logits")
        self.reset()

    def reset(self) -> None:
        self.past: list[Any] | None = None
        self.length = 0

    def _empty_cache(self, batch: int) -> list[Any]:
        shape = (batch, self.decoder["num_key_value_heads"], 0, self.decoder["head_size"])
        return [ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for _ in self.caches]

    def select(self, rows: np.ndarray) -> None:
        assert self.past is not None
        self.past = [
            ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cache.numpy()[rows]))
            for cache in self.past
        ]

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        batch, length = ids.shape
        self.length += length
        if mask is None:
            mask = np.ones((batch, self.length), np.int64)
        if self.padding == "right" and self.past and length > 1 and batch > 1:
            logits = self._token_by_token(ids, mask)
        else:
            logits = self._run(ids, mask)
        if not last:
            return logits
        # By whole rows: taken along an axis, every number would be looked up.
        return logits[np.arange(batch)[:, None], last_columns(mask[:, -length:], last)]

    def _token_by_token(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """What fills a row up is written behind its last token, where the next one will be."""
        before, steps = self.length - ids.shape[1], []
        for column in range(ids.shape[1]):
            seen = mask[:, : before + column + 1].copy()
            seen[:, -1] = 1
            steps.append(self._run(ids[:, [column]], seen))
        return np.concatenate(steps, axis=1)

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        batch, length = ids.shape
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
    provider = CPU_PROVIDER if device == "cpu" else find_device("onnx", device).name
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if exact:
        model = with_accuracy(folder, EXACT_ACCURACY)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        session = ort.InferenceSession(model, options, providers=[provider])
    else:
        session = load_onnx(folder, options, [provider])
    if session.get_providers()[0] != provider:  # the runtime goes on without, telling a log alone
        raise UserError(f"{folder}: {provider} could not be started; see ONNX Runtime's log")
    adapter = None
    if (file := folder / ADAPTER_FOLDER / ADAPTER_FILE).is_file():
        adapter = ort.LoraAdapter()
        adapter.Load(str(file))
    fused = FUSED in (folder / GRAPHS["onnx"]).read_bytes()
    return OnnxSession(session, decoder_of(folder), fused, adapter)
