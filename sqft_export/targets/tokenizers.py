"""Token ids as deployed tokenizers make them."""

from collections.abc import Callable, Iterator
from pathlib import Path

from sqft_export.packed.loaders import dense_gguf
from sqft_export.run.host import installed
from sqft_export.targets.devices import llama_cpp_here
from sqft_export.targets.folder import check_files
from sqft_export.targets.genai_config import check_genai_config
from sqft_export.targets.gguf.bindings import open_model

IdsOf = Callable[[str], list[int]]


def read_ids(runtime: str, folder: Path) -> Iterator[tuple[str, IdsOf]]:
    """Every tokenizer that users of a deployment have, and what makes ids of a text with it.

    :raises UserError: if the folder holds what a runtime can't open safely.
    """
    check_files(folder)
    if runtime == "openvino" and installed("openvino_genai"):
        import openvino_genai

        tokenizer = openvino_genai.Tokenizer(str(folder))
        yield (
            "OpenVINO GenAI",
            lambda text: tokenizer.encode(text).input_ids.data.reshape(-1).tolist(),
        )
    if runtime == "onnx" and installed("onnxruntime_genai"):
        import onnxruntime_genai

        check_genai_config(folder)
        made = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
        made.update_options(add_special_tokens="true")  # this runtime leaves them out by itself
        yield "ONNX Runtime GenAI", lambda text: [int(i) for i in made.encode(text)]
    if runtime == "gguf" and llama_cpp_here():
        with dense_gguf(folder) as file:
            yield "llama.cpp", open_model(file).tokenize
