"""Errors of a device during a computation, one line each: the device was lost, or has no memory."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from sqft_export.errors import HostError, UserError, one_line
from sqft_export.machine.host import LESS_MEMORY, MAX_REASON_CHARACTERS, out_of_memory
from sqft_export.targets import Session

# Messages of drivers and runtimes after a reset, a removed device or a failed kernel.
LOST_MESSAGES = (
    *("ErrorDeviceLost", "DEVICE_LOST", "device lost", "Device lost", "device was lost"),  # Vulkan
    *("Device is lost", "Device was destroyed", "Instance reference no longer exists"),  # WebGPU
    *("an illegal memory access", "unspecified launch failure", "launch timed out"),  # CUDA
    *("CL_OUT_OF_RESOURCES", "CL_DEVICE_NOT_AVAILABLE", "DXGI_ERROR_DEVICE_REMOVED"),
)
RUN_AGAIN = "run the command again; if that does not help, update the driver"


def device_fault(device: str, error: BaseException) -> HostError | None:
    """Return a one-line error if a device was lost or its memory is exhausted; else None.

    :param device: name of the device in the message.
    :param error: the error of a runtime, or one whose text holds a runtime's messages.
    """
    reason = one_line(error, MAX_REASON_CHARACTERS)
    if out_of_memory(error):
        return HostError(f"{device}: out of memory: {reason}; {LESS_MEMORY}")
    if any(words in str(error) for words in LOST_MESSAGES):
        return HostError(
            f"{device} was lost during the computation: {reason}; {RUN_AGAIN} or use --device cpu"
        )
    return None


# Messages of native libraries before they end the process, the most specific kind first.
_NATIVE_MESSAGES = (
    re.compile(r"^\s*what\(\):\s*(.+)", re.MULTILINE),  # a C++ exception that nothing catches
    re.compile(r"^(?:ggml_\w+: )?((?:CUDA|HIP|MUSA) error: .+)", re.MULTILINE),
    re.compile(r"^(ggml_\w+: .+)", re.MULTILINE),
)


def ended_by_signal(number: int, messages: str) -> str:
    """Return why a native library ended a process.

    :param messages: text that it wrote to the standard error.
    """
    ended = f"ended by signal {number}"
    for pattern in _NATIVE_MESSAGES:
        if found := pattern.findall(messages):
            return f"{ended}: {one_line(found[-1], MAX_REASON_CHARACTERS)}"
    return f"{ended}; the machine may be out of memory"


@contextlib.contextmanager
def name_device_faults(device: str) -> Iterator[None]:
    """Convert errors about a lost device or its memory to one line; others pass unchanged.

    :param device: name of the device; ``cpu`` changes nothing.
    :raises HostError: in place of such an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each runtime has its own exception classes
        if device != "cpu" and (fault := device_fault(device, error)):
            raise fault from error
        raise


_S = TypeVar("_S", bound=Session)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def names_device_faults(
    method: Callable[Concatenate[_S, _P], _T],
) -> Callable[Concatenate[_S, _P], _T]:
    """Decorate a method of a session, whose ``device`` the messages name."""

    @functools.wraps(method)
    def call(self: _S, *arguments: _P.args, **named: _P.kwargs) -> _T:
        with name_device_faults(self.device):
            return method(self, *arguments, **named)

    return call
