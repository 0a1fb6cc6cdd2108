"""The OpenVINO extension of this installation, or why there is none."""

import functools
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.kernels.library import Kernels, kernels_here

HERE = Path(__file__).parent


def extension_file() -> Path | None:
    """Where the extension for the OpenVINO of this environment is, or would be; None without."""
    try:
        return HERE / f"_openvino-{version('openvino')}.so"
    except PackageNotFoundError:
        return None


@functools.cache
def why_not() -> str | None:
    """Why products can't run on our kernels here, in a few words; None if they can."""
    if kernels_here() is None:
        return "the package was installed without a compiler"
    file = extension_file()
    if file is None:
        return "OpenVINO is not installed"
    if not file.is_file():
        return f"there is no {file.name}; python -m sqft_export.kernels.build makes it"
    return None


def kernels_used() -> Kernels:
    """:raises UserError: if none run here."""
    found = kernels_here()
    if found is None or why_not():
        raise UserError(f"sparse execution: {why_not()}")
    return found


def openvino_extension() -> str:
    """The library that runs a specialized folder, for ``LLMPipeline(folder, "CPU",
    extensions=[sqft_export.openvino_extension()])`` and ``core.add_extension``.

    It comes from the installed package, never from a deployment.

    :raises UserError: if there is none for the OpenVINO that is installed.
    """
    kernels_used()
    file = extension_file()
    assert file is not None
    return str(file)
