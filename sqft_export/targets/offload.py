"""GPUs that llama.cpp off-loads layers to, and reasons why it can't.

A separate process asks for them: ggml ends the process that meets a driver without a feature.
"""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import HostError, one_line
from sqft_export.libraries.ggml import has_backend
from sqft_export.machine.host import installed, size_text

MESSAGE_CHARACTERS = 200
_MISSING_LIBRARY = re.compile(r"ImportError: (\S+): cannot open shared object file")
_GGML_MESSAGE = re.compile(r"^ggml_\w+: .+", re.MULTILINE)


@dataclass(frozen=True)
class OffloadBackend:
    """A backend of llama.cpp for GPUs.

    name: ggml's name.
    package: wheel of cyllama that has it.
    no_device: why it may see no device, and what helps.
    """

    name: str
    package: str
    no_device: str


BACKENDS = {
    "vulkan": OffloadBackend(
        "Vulkan",
        "cyllama-vulkan",
        "no Vulkan driver offers a GPU; install the driver of your GPU. A driver that computes on "
        "the CPU, such as Mesa's lavapipe, is used only if GGML_VK_VISIBLE_DEVICES=0 names it",
    ),
    "cuda": OffloadBackend(
        "CUDA", "cyllama-cuda12", "no NVIDIA GPU, or its driver is older than CUDA 12"
    ),
}


@dataclass(frozen=True)
class OffloadDevice:
    """A GPU.

    number: place among the GPUs that llama.cpp sees.
    name: ggml's name, such as ``Vulkan0``.
    """

    number: int
    name: str
    description: str
    free_bytes: int


@functools.cache
def find_offload(kind: str) -> OffloadDevice | str:
    """Return the first GPU of a backend, or the reason why it has no usable GPU.

    :param kind: vulkan or cuda.
    """
    backend = BACKENDS[kind]
    if not installed("cyllama"):
        return f"cyllama is not installed; pip install {backend.package}"
    if not has_backend(backend.name):
        return (
            f"the installed llama.cpp has no {backend.name} backend; "
            f"pip uninstall cyllama, then pip install {backend.package}"
        )
    # -P: do not import from the current folder, which may be untrusted.
    command = [sys.executable, "-P", "-m", "sqft_export.libraries.ggml", backend.name]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 and (found := json.loads(done.stdout)):
        return OffloadDevice(**found[0])
    return failure_reason(done.returncode, done.stderr) or backend.no_device


def failure_reason(code: int, messages: str) -> str | None:
    """Return the reason in the messages of the separate process, or None."""
    if library := _MISSING_LIBRARY.search(messages):
        return f"the library {library[1]} is missing; for libvulkan.so.1 install a Vulkan loader"
    if message := _GGML_MESSAGE.search(messages):
        return f"llama.cpp refuses the driver: {one_line(message[0], MESSAGE_CHARACTERS)}"
    return f"llama.cpp's driver ended with code {code}" if code else None


def require_device_memory(file: Path, weights: int, device: OffloadDevice) -> None:
    """Refuse a model that is larger than the free memory of a device.

    :param weights: bytes of the model; its cache comes on top.
    :raises HostError: naming what to lower.
    """
    if weights > device.free_bytes:
        raise HostError(
            f"{file}: {size_text(weights)} of weights do not fit {device.name} "
            f"({device.description}), which has {size_text(device.free_bytes)} free; end other "
            "programs on it, use fewer bits (quantize.bits) or --device cpu"
        )
