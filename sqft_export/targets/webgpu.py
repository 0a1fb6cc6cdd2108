"""ONNX Runtime's WebGPU provider: built into the package onnxruntime-webgpu, or as a plug-in."""

import functools
from typing import TYPE_CHECKING

from sqft_export.errors import one_line
from sqft_export.machine.host import installed

if TYPE_CHECKING:
    import onnxruntime as ort

WEBGPU_PROVIDER = "WebGpuExecutionProvider"
PLUGIN_PACKAGE = "onnxruntime-ep-webgpu"
_REGISTERED_NAME = "sqft-webgpu"


def why_no_webgpu() -> str | None:
    """Return why ONNX Runtime has no WebGPU provider; None if it has one.

    The built-in provider looks for an adapter when a model is loaded.
    """
    import onnxruntime as ort

    if WEBGPU_PROVIDER in ort.get_available_providers():
        return None
    if not installed("onnxruntime_ep_webgpu"):
        return f"not in this build of ONNX Runtime; pip install {PLUGIN_PACKAGE}"
    found = find_plugin_devices()
    return found if isinstance(found, str) else None


@functools.cache
def find_plugin_devices() -> "list[ort.OrtEpDevice] | str":
    """Register the plug-in once; return its devices, or why it offers none."""
    import onnxruntime as ort
    import onnxruntime_ep_webgpu as plugin

    try:
        ort.register_execution_provider_library(_REGISTERED_NAME, plugin.get_library_path())
    except RuntimeError as error:  # another version of ONNX Runtime, or no Vulkan loader
        return f"{PLUGIN_PACKAGE} can't be registered: {one_line(error)}"
    found = [one for one in ort.get_ep_devices() if one.ep_name == plugin.get_ep_name()]
    return found or f"{PLUGIN_PACKAGE} sees no GPU on this machine"


def add_webgpu(options: "ort.SessionOptions") -> None:
    """Add the plug-in to a session; the built-in provider is requested by its name."""
    import onnxruntime as ort

    if WEBGPU_PROVIDER not in ort.get_available_providers():
        devices = find_plugin_devices()
        assert not isinstance(devices, str)  # find_device refuses it
        options.add_provider_for_devices(devices[:1], {})
