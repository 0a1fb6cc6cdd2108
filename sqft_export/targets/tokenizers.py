"""Token ids as deployed tokenizers make them."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sqft_export.machine.host import installed
from sqft_export.packed.loaders import dense_gguf
from sqft_export.targets.devices import llama_cpp_here
from sqft_export.targets.folder import GENAI_CONFIG, GRAPHS, check_files
from sqft_export.targets.genai_config import check_genai_config
from sqft_export.targets.gguf.bindings import open_model

IdsOf = Callable[[str], list[int]]
Ids = list[list[int] | None]  # of every text


def read_ids(runtime: str, folder: Path) -> Iterator[tuple[str, IdsOf]]:
    """Yield the name of every deployed tokenizer, and a function from a text to its token ids.

    :raises UserError: if the folder contains a file that is not safe to open.
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
        made.update_options(add_special_tokens="true")  # off by default in this runtime
        yield "ONNX Runtime GenAI", lambda text: [int(i) for i in made.encode(text)]
    if runtime == "gguf" and llama_cpp_here():
        with dense_gguf(folder) as file:
            yield "llama.cpp", open_model(file).tokenize


def tokenize_as_deployed(runtime: str, source: Path, texts: list[str], rows: int) -> dict[str, Ids]:
    """Tokenize texts with every tokenizer of a runtime, before any model is exported.

    :param source: Hugging Face folder of the model.
    :param rows: number of rows of its embedding.
    :return: tokenizer -> ids of every text; None for a text on which the tokenizer fails.
    :raises Exception: any error of the runtime's converter, if it does not support the tokenizer.
    """
    if runtime not in _WRITERS:  # it reads tokenizer.json, as the tokenizers library does
        return {}
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
        folder = Path(scratch)
        _WRITERS[runtime](source, folder, rows)
        readers = read_ids(runtime, folder)
        return {name: [ids_or_none(ids_of, text) for text in texts] for name, ids_of in readers}


def ids_or_none(ids_of: IdsOf, text: str) -> list[int] | None:
    """Return the ids of a text; None if the tokenizer fails on it."""
    try:
        return ids_of(text)
    except RuntimeError:
        return None


def write_openvino_tokenizers(source: Path, folder: Path) -> None:
    """Write the tokenizer of a model folder as transformers has it, and as two OpenVINO graphs."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    from sqft_export.model.chat import default_template

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.chat_template = default_template(tokenizer.chat_template)  # GenAI reads only one
    tokenizer.save_pretrained(folder)
    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    ov.save_model(encoder, folder / "openvino_tokenizer.xml")
    ov.save_model(decoder, folder / "openvino_detokenizer.xml")


def _write_for_openvino(source: Path, folder: Path, rows: int) -> None:
    write_openvino_tokenizers(source, folder)


def _write_for_onnx(source: Path, folder: Path, rows: int) -> None:
    """Write a tokenizer with an empty graph, without which ONNX Runtime GenAI does not load it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from transformers import AutoTokenizer

    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 1])
    table = numpy_helper.from_array(np.zeros((1, 1), np.float32), "table")
    node = helper.make_node("Gather", ["table", "input_ids"], ["logits"])
    graph = helper.make_graph([node], "nothing", [ids], [logits], [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / GRAPHS["onnx"])
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    decoder = {
        "filename": GRAPHS["onnx"],
        **dict.fromkeys(sizes, 1),
        "num_hidden_layers": 0,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    document = {"type": "decoder", "vocab_size": rows, "context_length": 1, **tokens}
    document = {"model": document | {"decoder": decoder}, "search": {"max_length": 1}}
    (folder / GENAI_CONFIG).write_text(json.dumps(document))
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def _write_for_llama_cpp(source: Path, folder: Path, rows: int) -> None:
    """Write a tokenizer with one layer of zeros: cyllama aborts on a file without tensors."""
    import gguf

    from sqft_export.targets.gguf.tokenizer import write_tokenizer

    writer = gguf.GGUFWriter(folder / GRAPHS["gguf"], "llama")
    write_tokenizer(writer, source, rows)
    width = 32
    writer.add_context_length(width)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    writer.add_rope_dimension_count(width)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{part}": (width, width) for part in parts}
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    shapes |= dict.fromkeys(norms, (width,)) | {"token_embd": (rows, width)}
    for name, shape in shapes.items():
        dtype = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_WRITERS = {
    "openvino": _write_for_openvino,
    "onnx": _write_for_onnx,
    "gguf": _write_for_llama_cpp,
}
