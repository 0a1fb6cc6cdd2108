"""Which runtimes reach which devices of this machine, and why the others do not."""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from sqft_export.errors import UserError
from sqft_export.machine import installed

DEVICES = ("cpu", "gpu", "npu")
OPENVINO_NEEDS = {
    "gpu": "an Intel GPU and its compute runtime",
    "npu": "an Intel NPU and its driver",
}
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "gpu": ("CUDAExecutionProvider", "DmlExecutionProvider"),
}
PROVIDER_NEEDS = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "DmlExecutionProvider": "onnxruntime-directml, on Windows",
}


@dataclass(frozen=True)
class Place:
    """A device as one runtime reaches it.

    name: what the runtime calls it.
    missing: why it can't be used here; None where it can.
    """

    runtime: str
    device: str
    name: str
    missing: str | None


def places() -> list[Place]:
    """Every runtime with every device it knows."""
    return [place for probe in PROBES.values() for place in probe()]


def present(runtime: str, device: str) -> Place:
    """The place a model is to run; no other runtime is loaded to find it.

    :raises UserError: if it is not on this machine, with the reason.
    """
    found = [place for place in PROBES[runtime]() if place.device == device]
    for place in found:
        if place.missing is None:
            return place
    reasons = "; ".join(f"{p.name}: {p.missing}" for p in found) or "it has no such device"
    raise UserError(f"device: found {device}, which {runtime} does not reach here ({reasons})")


def _openvino() -> Iterator[Place]:
    here: list[str] = []
    if installed("openvino"):
        import openvino as ov

        here = [name.partition(".")[0] for name in ov.Core().available_devices]
    for device in DEVICES:
        missing = None
        if not installed("openvino"):
            missing = "openvino is not installed"
        elif device.upper() not in here:
            missing = f"OpenVINO sees {', '.join(here)}; this needs {OPENVINO_NEEDS[device]}"
        yield Place("openvino", device, device.upper(), missing)


def _onnx() -> Iterator[Place]:
    here: list[str] = []
    if installed("onnxruntime"):
        import onnxruntime as ort

        here = ort.get_available_providers()
    for device, names in PROVIDERS.items():
        for name in names:
            missing = None
            if not installed("onnxruntime"):
                missing = "onnxruntime is not installed"
            elif name not in here:
                missing = f"not in this build of ONNX Runtime; it is in {PROVIDER_NEEDS[name]}"
            elif name.startswith("CUDA") and shutil.which("nvidia-smi") is None:
                missing = "no NVIDIA driver"
            yield Place("onnx", device, name, missing)


def _torch() -> Iterator[Place]:
    if not installed("torch"):
        for device, name in (("cpu", "cpu"), ("gpu", "cuda")):
            yield Place("torch", device, name, "torch is not installed")
        return
    yield Place("torch", "cpu", "cpu", None)
    version = importlib.metadata.version("torch")
    missing = None
    if "+cpu" in version:  # known without the seconds that importing it takes
        missing = f"torch {version} is a build without CUDA"
    else:
        import torch

        if not torch.cuda.is_available():
            missing = f"torch {version} sees no CUDA device"
    yield Place("torch", "gpu", "cuda", missing)


PROBES = {"openvino": _openvino, "onnx": _onnx, "torch": _torch}
