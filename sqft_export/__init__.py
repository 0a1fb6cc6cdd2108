"""Compile a language model into a sparse, low-precision deployment, and load it where it runs.

    import sqft_export

    model = sqft_export.load_openvino("folder")          # openvino.Model
    pipe = sqft_export.load_openvino_genai("folder")     # openvino_genai.LLMPipeline
    session = sqft_export.load_onnx("folder")            # onnxruntime.InferenceSession
    model = sqft_export.load_onnx_genai("folder")        # onnxruntime_genai.Model
    model = sqft_export.load_gguf("folder")              # cyllama's LlamaModel (llama.cpp)
    library = sqft_export.openvino_extension()           # kernels for a specialized folder

``import sqft_export`` does not import torch or any runtime.
"""

from sqft_export.api import load
from sqft_export.kernels.extension import openvino_extension
from sqft_export.packed.loaders import (
    load_gguf,
    load_onnx,
    load_onnx_genai,
    load_openvino,
    load_openvino_genai,
)

__all__ = [
    "load",
    "load_gguf",
    "load_onnx",
    "load_onnx_genai",
    "load_openvino",
    "load_openvino_genai",
    "openvino_extension",
]
