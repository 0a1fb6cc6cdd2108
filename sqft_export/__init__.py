"""Compile a language model into a sparse, low-precision deployment, and load it where it runs.

    import sqft_export

    run = sqft_export.compile("HuggingFaceTB/SmolLM2-135M-Instruct", data="chats.jsonl")
    print(run.report.best.tokens_per_second, run.certificate.passed)
    session = sqft_export.load(run.folder)               # text in, text out, in any runtime
    print(session.generate([{"role": "user", "content": "Hello"}]))

    model = sqft_export.load_openvino("folder")          # openvino.Model
    pipe = sqft_export.load_openvino_genai("folder")     # openvino_genai.LLMPipeline
    session = sqft_export.load_onnx("folder")            # onnxruntime.InferenceSession
    model = sqft_export.load_onnx_genai("folder")        # onnxruntime_genai.Model
    model = sqft_export.load_gguf("folder")              # cyllama's LlamaModel (llama.cpp)
    library = sqft_export.openvino_extension()           # kernels for a specialized folder
    sqft_export.use_in_llama_cpp()                       # kernels for llama-cpp-python

``import sqft_export`` does not import torch or any runtime.
"""

from importlib.metadata import version

# The package of this name is loaded first: loading it later would hide the function ``plan``.
import sqft_export.plan  # noqa: F401
from sqft_export.api import Run, benchmark, compile, load, open_run, plan
from sqft_export.kernels.extension import openvino_extension
from sqft_export.kernels.llama_plugin import use_in_llama_cpp
from sqft_export.packed.loaders import (
    load_gguf,
    load_onnx,
    load_onnx_genai,
    load_openvino,
    load_openvino_genai,
)

__version__ = version("sqft-export")

__all__ = [
    "Run",
    "__version__",
    "benchmark",
    "compile",
    "load",
    "load_gguf",
    "load_onnx",
    "load_onnx_genai",
    "load_openvino",
    "load_openvino_genai",
    "open_run",
    "openvino_extension",
    "plan",
    "use_in_llama_cpp",
]
