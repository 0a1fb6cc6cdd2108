"""The Python interface: compile, plan, benchmark, and talk to the result.

Importing it loads no torch and no runtime; the functions load what they need.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqft_export.inference.text import TextSession


def load(folder: str | Path, device: str = "cpu", threads: int | None = None) -> "TextSession":
    """Load a deployment, a merged model or the best deployment of a run into its runtime.

    :param device: cpu, gpu or npu.
    :param threads: CPU threads; None: the runtime's choice.
    :raises UserError: if the folder is none of them, or its runtime cannot load it.
    """
    from sqft_export.inference.locate import find_deployment
    from sqft_export.inference.text import open_deployment

    return open_deployment(find_deployment(Path(folder)).path, device, threads)
