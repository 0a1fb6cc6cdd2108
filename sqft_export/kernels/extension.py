"""Find the OpenVINO extension of this installation, or report why it is missing."""

import functools
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.kernels.library import Kernels, find_kernels

HERE = Path(__file__).parent


def extension_file() -> Path | None:
    """Return the path of the extension for the installed OpenVINO, built or not.

    None if OpenVINO is not installed.
    """
    try:
        return HERE / f"_openvino-{version('openvino')}.so"
    except PackageNotFoundError:
        return None


@functools.cache
def unavailable_reason() -> str | None:
    """Return in a few words why our kernels can't run here; None if they can."""
    if find_kernels() is None:
        return "the package was installed without a compiler"
    file = extension_file()
    if file is None:
        return "OpenVINO is not installed"
    if not file.is_file():
        return f"{file.name} is missing; python -m sqft_export.kernels.build makes it"
    return None


def require_kernels() -> Kernels:
    """Return the fastest kernels of this machine.

    :raises UserError: if none are available, with the reason.
    """
    found = find_kernels()
    if found is None or unavailable_reason():
        raise UserError(f"sparse execution: {unavailable_reason()}")
    return found


def openvino_extension() -> str:
    """Return the path of the library that runs a specialized folder.

    Pass it to ``LLMPipeline(folder, "CPU", extensions=[sqft_export.openvino_extension()])`` or to
    ``core.add_extension``.

    It comes from the installed package, never from a deployment.

    :raises UserError: if the extension for the installed OpenVINO is missing.
    """
    require_kernels()
    file = extension_file()
    assert file is not None
    return str(file)
