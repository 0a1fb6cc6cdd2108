"""Start llama.cpp's own server, which the package xllamacpp holds, and wait until it is ended.

python -m sqft_export.inference.xllamacpp_server <model.gguf> <host> <port> <name>

With SQFT_EXPORT_KERNELS=1, our kernels are loaded into it.
"""

import os
import signal
import sys
from typing import Any

from sqft_export.kernels.llama_plugin import load_plugin, require_plugin
from sqft_export.libraries.xllamacpp import extension_module

KERNELS_VARIABLE = "SQFT_EXPORT_KERNELS"


def start_server(file: str, host: str, port: int, name: str) -> Any:
    """Return the running server; it ends with the returned object.

    The context is the model's, and messages are rendered with the file's chat template.
    """
    import xllamacpp

    module = extension_module()
    if os.environ.get(KERNELS_VARIABLE) and module is not None:
        load_plugin(module, require_plugin())
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = [host], port
    params.model_alias = [name]
    params.n_gpu_layers = 0
    params.n_ctx = 0  # that of the model
    return xllamacpp.Server(params)


if __name__ == "__main__":
    path, address, number, alias = sys.argv[1:]
    server = start_server(path, address, int(number), alias)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
