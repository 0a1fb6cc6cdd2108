"""Runtimes a model is exported to and run on: openvino, onnx, gguf, torch."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from sqft_export.numerics.codes import Quantized
from sqft_export.recipe.schema import Export

# OpenVINO's converter and NNCF report their use over the network unless told not to; where the
# package that does so is missing, they go without. Nobody asked for network access here.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class Session(Protocol):
    """A loaded model with a key-value cache.

    padding: left or right, where prompts shorter than others of a batch are filled up.
    vocabulary: how many logits a token has.
    all_logits: those of every token are computed, however few are asked for.
    fills_up: what fills up rows that follow a cache is computed like their tokens.
    pass_tokens: so many take as long as another pass.
    most_rows: the largest batch that the cache holds.
    """

    padding: str
    vocabulary: int
    all_logits: bool
    fills_up: bool
    pass_tokens: int = 64
    most_rows: int = 2**31

    def reset(self) -> None:
        """Forget the cache."""

    def select(self, rows: np.ndarray) -> None:
        """Continue with these rows of the cache's batch, int64 ``[new batch]``: fewer, or some of
        them several times."""

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        """Continue the cache with int64 ``ids [batch, n]``: float32 logits ``[batch, n, vocab]``.

        The batch must stay the same between two resets, but for :meth:`select`.

        :param mask: int64 ``[batch, cached + n]``, 0 where a prompt is filled up.
        :param last: logits of so many last tokens of each row alone, what fills it up not counted;
            None: of all.
        """

    def likeliest(self, ids: np.ndarray) -> np.ndarray:
        """Continue the cache with ``ids``: the token that follows each row, int64 ``[batch]``."""
        return self.forward(ids, None, 1)[:, -1].argmax(axis=-1).astype(np.int64)


class Runner(Protocol):
    """What every target offers."""

    def open_session(
        self, folder: Path, exact: bool, threads: int | None, device: str = "cpu"
    ) -> Session:
        """A folder as a session.

        :param exact: float32 throughout, to compare with torch; else the runtime's defaults.
        :param threads: of the CPU; None: the runtime's choice.
        :param device: cpu, gpu or npu.
        :raises UserError: if the device is not here.
        """


class Target(Runner, Protocol):
    """What a target that models are exported to offers as well."""

    def export(
        self, merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
    ) -> None:
        """Write the deployment folder of a merged model.

        :param merged: Hugging Face folder, packed in the GPTQ layout or plain.
        :param facts: what the deployment says of it (``model.storage.model_facts``); None: they are
            read from the folder.
        """

    def add_adapter(self, folder: Path, adapter: Path) -> None:
        """Put an adapter that is not merged into a deployment.

        :param adapter: in peft's format.
        """

    def read_back(self, folder: Path) -> Iterator[tuple[str, Quantized]]:
        """Every quantized weight by module, read from the written file, one at a time."""

    def read_floats(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Every float constant of the written file, one at a time, float32: a matrix by its module
        ``[out, in]``, others by the name of their tensor where the graph has one, else by an empty
        name."""

    def metadata(self, folder: Path) -> dict[str, str]:
        """What the graph says of the model it was made from."""

    def compressed_kernels(self, folder: Path, scratch: Path) -> set[str]:
        """Modules whose kernel reads 4- or 8-bit weights once the runtime has optimized the
        graph for the CPU.

        :param scratch: folder for an optimized copy.
        """


def positions_of(mask: np.ndarray, length: int) -> np.ndarray:
    """int64 ``[batch, length]``: positions of the last ``length`` tokens, filling not counted."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:]


def last_columns(mask: np.ndarray, last: int | None) -> np.ndarray:
    """int64 ``[batch, last]``: where the last tokens of every row are.

    :param mask: int64 ``[batch, n]``, 0 where it is filled up, on either side.
    :param last: None: all columns, filled up or not.
    """
    if not last:
        return np.tile(np.arange(mask.shape[1]), (len(mask), 1))
    ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return np.maximum(ends[:, None] + np.arange(-last, 0), 0)


def runner(name: str) -> Runner:
    return cast(Runner, importlib.import_module(f"{__name__}.{name}"))


def target(name: str) -> Target:
    return cast(Target, importlib.import_module(f"{__name__}.{name}"))


if TYPE_CHECKING:  # mypy holds every module to its protocol
    from sqft_export.targets import gguf, onnx, openvino, torch

    _TARGETS: tuple[Target, ...] = (gguf, onnx, openvino)
    _RUNNERS: tuple[Runner, ...] = (torch,)
