"""Open deployments on the kernels of their runtime, or on this package's.

Our kernels run in OpenVINO through an extension (``packed/execution.py``), and in llama.cpp through
a plug-in (``kernels/llama_plugin.py``). In llama.cpp, a process that has loaded the plug-in keeps
it: all its later models use it.
"""

import logging
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import unavailable_reason
from sqft_export.kernels.llama_plugin import use_in_llama_cpp, why_not_in_llama_cpp
from sqft_export.packed.execution import resolve_execution
from sqft_export.targets import Session, runner
from sqft_export.targets.devices import llama_cpp_here
from sqft_export.targets.faults import name_device_faults
from sqft_export.targets.folder import kind_of

LLAMA_CPP_WITH_KERNELS = "llama.cpp with our kernels"
_logger = logging.getLogger(__name__)


def why_not_our_kernels(folder: Path, device: str = "cpu") -> str | None:
    """Return in a few words why our kernels can't run a deployment here; None if they can."""
    if device != "cpu":
        return f"{device} has its own kernels"
    runtime = kind_of(folder)
    if runtime == "openvino":
        return unavailable_reason()
    return why_not_in_llama_cpp() if runtime == "gguf" else f"{runtime} has its own kernels"


def usable_execution(folder: Path, execution: str, device: str = "cpu") -> str:
    """Resolve ``execution``; log a warning and return ``stock`` if our kernels can't run there.

    :raises UserError: if the value is unknown.
    """
    execution = resolve_execution(execution)
    if execution == STOCK:
        return STOCK
    if missing := why_not_our_kernels(folder, device):
        _logger.warning("%s: our kernels are not used: %s", folder, missing)
        return STOCK
    if kind_of(folder) == "gguf":
        try:
            use_in_llama_cpp(execution)
        except UserError as error:  # this process has loaded a model before
            _logger.warning("%s", error)
            return STOCK
    return execution


def kernels_title(runtime: str, execution: str) -> str:
    """Return the name of a runtime's kernels in tables.

    >>> kernels_title("gguf", "auto")
    'llama.cpp with our kernels'
    """
    if runtime != "gguf":
        return execution
    if execution == STOCK:
        return "llama.cpp"
    return LLAMA_CPP_WITH_KERNELS + ("" if execution == "auto" else f" ({execution})")


def kernel_notes(folder: Path, execution: str, missing: str | None = None) -> list[str]:
    """Return notes about the llama.cpp that a GGUF folder runs in; none for other folders.

    :param missing: why our kernels were not measured in it; None if they were, or were not wanted.
    """
    if kind_of(folder) != "gguf" or not llama_cpp_here():
        return []
    from sqft_export.targets.gguf.bindings import describe_build

    unused = [] if missing is None else [f"our kernels were not measured in it: {missing}"]
    return [describe_build(execution), *unused]


def open_on_kernels(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu", execution: str = STOCK
) -> Session:
    """Load a folder into a session of its runtime.

    :param execution: auto, sparse or dense: our kernels; stock: the runtime's.
    :raises UserError: if our kernels can't run in llama.cpp, or this machine lacks the device.
    :raises HostError: if the device is lost or has too little memory.
    """
    with name_device_faults(device):
        return _open(folder, exact, threads, device, execution)


def _open(folder: Path, exact: bool, threads: int | None, device: str, execution: str) -> Session:
    runtime = kind_of(folder)
    if execution != STOCK and runtime == "openvino":
        from sqft_export.targets import openvino

        return openvino.open_session(folder, exact, threads, device, execution)
    if execution != STOCK and runtime == "gguf":
        from sqft_export.targets import gguf

        return gguf.open_session(folder, exact, threads, device, execution=execution)
    return runner(runtime).open_session(folder, exact, threads, device)
