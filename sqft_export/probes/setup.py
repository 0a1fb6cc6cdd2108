"""How a self-test opens a deployment, and the settings that it can change. Needs no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import require_kernels
from sqft_export.kernels.ir import is_specialized
from sqft_export.targets import Session, runner
from sqft_export.targets.faults import name_device_faults
from sqft_export.targets.folder import GRAPHS, kind_of
from sqft_export.untrusted import MAX_IR_BYTES, read_bounded

# Name of a rounding -> the settings that switch it off, as in exact mode.
OPENVINO_ROUNDING = {
    "cache precision": {"KV_CACHE_PRECISION": "f32"},
    "activation rounding": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
    "inference precision": {"INFERENCE_PRECISION_HINT": "f32"},
}


@dataclass(frozen=True)
class Setup:
    """Device, threads and changed settings of a session.

    threads: CPU threads; None: the runtime's choice.
    execution: auto, sparse or dense: our kernels; stock: the runtime's.
    properties: OpenVINO's settings in place of its defaults.
    float32_cache: llama.cpp keeps keys and values in float32, without flash attention.
    by_token: prompts are computed token by token.
    """

    device: str = "cpu"
    threads: int | None = None
    execution: str = STOCK
    properties: Mapping[str, str] = field(default_factory=dict)
    float32_cache: bool = False
    by_token: bool = False

    def open(self, folder: Path, exact: bool) -> Session:
        """Load a deployment into a session."""
        with name_device_faults(self.device):
            return self._open(folder, exact)

    def _open(self, folder: Path, exact: bool) -> Session:
        runtime = kind_of(folder)
        if runtime == "openvino":
            from sqft_export.targets import openvino

            return openvino.open_session(
                *(folder, exact, self.threads, self.device, self.execution, self.properties)
            )
        if runtime == "gguf":
            from sqft_export.targets import gguf

            place = folder, exact, self.threads, self.device
            return gguf.open_session(*place, self.float32_cache, self.execution)
        return runner(runtime).open_session(folder, exact, self.threads, self.device)


@dataclass(frozen=True)
class Change:
    """A setting to change: its name, the changed value as text, and how to run with it.

    exact: the mode to run in.
    """

    name: str
    value: str
    setup: Setup
    exact: bool


def rounding_changes(folder: Path, runtime: str, setup: Setup) -> list[Change]:
    """Return changes that switch off one rounding of a runtime's default mode, or all of them."""
    if runtime == "openvino":
        changes = [
            Change(name, _text(one), replace(setup, properties=one), False)
            for name, one in OPENVINO_ROUNDING.items()
        ]
        if kernels := _own_kernels(folder):
            name = f"kernels of this package ({kernels}), which round activations to int8"
            changes.append(Change(name, "products in float32", setup, True))
        return changes
    if runtime == "gguf":
        cached = replace(setup, float32_cache=True)
        return [
            Change("cache precision", "a float32 cache", cached, False),
            Change("activation rounding", "float32 weights and activations", setup, True),
        ]
    if runtime in ("onnx", "web"):
        return [Change("activation rounding", "accuracy_level=1", setup, True)]
    return [Change("dtype", "float32", setup, True)]


def _own_kernels(folder: Path) -> str | None:
    """Return the instruction set of this package's kernels; None if the graph does not use them."""
    if not is_specialized(read_bounded(folder / GRAPHS["openvino"], MAX_IR_BYTES)):
        return None
    return require_kernels().name


def machine_changes(setup: Setup, exact: bool, short: bool) -> list[Change]:
    """Return changes of device, threads and the way of computing prompts.

    :param short: compute the prompts token by token too.
    """
    found = []
    single = replace(setup, by_token=True)
    name = "prompts of several tokens in one pass"
    by_token = [Change(name, "prompts token by token", single, exact)] if short else []
    if setup.device != "cpu":  # a device that computes only prompts wrongly is of use
        found += [*by_token, Change("device", "--device cpu", replace(setup, device="cpu"), exact)]
        by_token = []
    if setup.threads != 1 and (os.cpu_count() or 1) > 1:
        found.append(Change("thread count", "--threads 1", replace(setup, threads=1), exact))
    return [*found, *by_token]


def _text(properties: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in properties.items())
