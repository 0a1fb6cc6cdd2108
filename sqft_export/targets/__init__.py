"""Runtimes that models are exported to and run on: openvino, onnx, gguf, web, torch."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.recipe.schema import Export

RECURRENT_STATE = "past."  # start of a graph's names of states that are no keys or values


class Session(Protocol):
    """A loaded model with a key-value cache.

    padding: side of the padding, left or right.
    vocabulary: logits per token.
    all_logits: logits of every token are computed, even if fewer are requested.
    computes_padding: padding of rows that continue a cache costs as much as their tokens.
    pass_tokens: tokens whose computation takes as long as the overhead of one more pass.
    max_rows: the largest batch that the cache holds.
    joins: a row may begin on a copy of another row's cache, which its mask then hides. A recurrent
        state can't be hidden.
    device: name of the device that computes, in messages; cpu.
    placement: which parts of the model an accelerator computes; empty on the CPU.
    """

    padding: str
    vocabulary: int
    all_logits: bool
    computes_padding: bool
    pass_tokens: int = 64
    max_rows: int = 2**31
    joins: bool = True
    device: str = "cpu"
    placement: str = ""

    def reset(self) -> None:
        """Clear the cache."""

    def select(self, rows: np.ndarray) -> None:
        """Continue with the given rows of the cache's batch, int64 ``[new batch]``.

        A row may be dropped, or repeated.
        """

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        """Continue the cache with int64 ``ids [batch, n]``.

        The batch stays the same between two resets, except for :meth:`select`.

        :param mask: int64 ``[batch, cached + n]``, 0 at padding.
        :param last: return only the logits of the last ``last`` tokens of each row, padding not
            counted; None: of all columns.
        :return: logits, float32 ``[batch, n, vocabulary]``.
        """

    def argmax_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Continue the cache with ``ids``; return the argmax token per row, int64 ``[batch]``."""
        return self.forward(ids, None, 1)[:, -1].argmax(axis=-1).astype(np.int64)


class Runner(Protocol):
    """A runtime that runs models."""

    def open_session(
        self, folder: Path, exact: bool, threads: int | None, device: str = "cpu"
    ) -> Session:
        """Load a folder into a session.

        :param exact: compute in float32, to compare with torch; else use the runtime's defaults.
        :param threads: CPU threads; None: the runtime's choice.
        :param device: a kind of device (``devices.DEVICE_KINDS``).
        :raises UserError: if this machine does not have the device.
        """


class Target(Runner, Protocol):
    """A runtime that models are also exported to."""

    def export(
        self, merged: Path, folder: Path, options: Export, facts: dict[str, str] | None = None
    ) -> None:
        """Write the deployment folder of a merged model.

        :param merged: Hugging Face folder, in the GPTQ layout or with float weights.
        :param facts: facts about the model that the deployment stores
            (``model.storage.model_facts``); None: read from the folder.
        """

    def add_adapter(self, folder: Path, adapter: Path) -> None:
        """Add an unmerged adapter to a deployment.

        :param adapter: folder in peft's format.
        """

    def read_back(self, folder: Path) -> Iterator[tuple[str, QuantizedWeight[np.ndarray]]]:
        """Yield module and quantized weight, one at a time, from the written file."""

    def read_floats(self, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and values of every float constant of the written file, float32.

        The name of a matrix ``[out, in]`` is its module. Other constants have the name of their
        tensor, or an empty name if the graph has none.
        """

    def metadata(self, folder: Path) -> dict[str, str]:
        """Return the model facts that the graph stores."""

    def compressed_kernels(self, folder: Path, scratch: Path) -> set[str]:
        """Return the modules whose CPU kernel reads 4- or 8-bit weights in the optimized graph.

        :param scratch: folder for an optimized copy of the graph.
        """


def positions_of(mask: np.ndarray, length: int) -> np.ndarray:
    """Return the positions of the last ``length`` columns, padding not counted.

    :param mask: int64 ``[batch, n]``, 0 at padding.
    :return: int64 ``[batch, length]``.
    """
    return np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:]


def last_columns(mask: np.ndarray, last: int | None) -> np.ndarray:
    """Return the columns of the last tokens of every row.

    :param mask: int64 ``[batch, n]``, 0 at padding, on either side.
    :param last: number of tokens; None: all columns, including padding.
    :return: int64 ``[batch, last]``.
    """
    if not last:
        return np.tile(np.arange(mask.shape[1]), (len(mask), 1))
    ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    return np.maximum(ends[:, None] + np.arange(-last, 0), 0)


def runner(name: str) -> Runner:
    """Return the module of a runtime, ``torch`` included."""
    return cast(Runner, importlib.import_module(f"{__name__}.{name}"))


def target(name: str) -> Target:
    """Return the module of an export target: openvino, onnx, gguf or web."""
    return cast(Target, importlib.import_module(f"{__name__}.{name}"))


if TYPE_CHECKING:  # mypy checks every module against its protocol
    from sqft_export.targets import gguf, onnx, openvino, torch, web

    _TARGETS: tuple[Target, ...] = (gguf, onnx, openvino, web)
    _RUNNERS: tuple[Runner, ...] = (torch,)
