"""Start the server of llama-cpp-python, with the options that it has.

python -m sqft_export.inference.llama_cpp_server --model <model.gguf> ...

With SQFT_EXPORT_KERNELS=1, our kernels are loaded into it.
"""

import os
import runpy

from sqft_export.inference.xllamacpp_server import KERNELS_VARIABLE
from sqft_export.kernels.llama_plugin import use_in_llama_cpp

if __name__ == "__main__":
    if os.environ.get(KERNELS_VARIABLE):
        use_in_llama_cpp()
    runpy.run_module("llama_cpp.server", run_name="__main__", alter_sys=True)
