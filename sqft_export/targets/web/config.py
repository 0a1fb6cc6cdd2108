"""Write the configs and the tokenizer that Transformers.js loads next to a graph."""

import json
import shutil
from pathlib import Path
from typing import cast

from sqft_export.errors import UserError
from sqft_export.targets.folder import GENAI_CONFIG
from sqft_export.targets.genai_config import DecoderConfig
from sqft_export.targets.web.graph import BROWSER_GRAPH, GraphFiles
from sqft_export.textfiles import read_json

BROWSER_CONFIG, BROWSER_GENERATION = "config.json", "generation_config.json"
BROWSER_TOKENIZER = "tokenizer.json"  # the only tokenizer format of a browser
BROWSER_TOKENIZER_FILES = (BROWSER_TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
# Model types whose config Transformers.js 4.3 reads under the names that ``_model_config`` writes
# (``getNormalizedConfig`` in its ``configs.js``). Another type is declared as llama: the page only
# takes the sizes of the key-value cache from it, and the graph computes the model.
READ_TYPES = {
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2"),
    *("gemma3_text", "smollm3", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2"),
    *("starcoder2", "glm", "helium", "ernie4_5", "hunyuan_v1_dense", "apertus", "arcee"),
}
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_browser_configs(deployment: Path, folder: Path, written: GraphFiles) -> None:
    """Write configs and tokenizer of an ONNX deployment in the layout of Transformers.js.

    :raises UserError: if the deployment has no ``tokenizer.json``.
    """
    found = read_json(deployment / GENAI_CONFIG)["model"]
    generation = {name: found[name] for name in TOKEN_FIELDS if name in found}
    documents = {BROWSER_CONFIG: _model_config(found, written), BROWSER_GENERATION: generation}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    for name in BROWSER_TOKENIZER_FILES:
        if (deployment / name).is_file():
            shutil.copyfile(deployment / name, folder / name)
    if not (folder / BROWSER_TOKENIZER).is_file():
        raise UserError(
            f"{deployment}: has no {BROWSER_TOKENIZER}, the only tokenizer format of a browser"
        )


def _model_config(found: dict, written: GraphFiles) -> dict[str, object]:
    """Return the ``config.json`` of a page: the sizes of the key-value cache.

    :param found: the section ``model`` of ``genai_config.json``.
    """
    decoder, kind = found["decoder"], found["type"]
    sizes = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size")
    return {
        "model_type": kind if kind in READ_TYPES else "llama",
        **{name: decoder[name] for name in sizes},
        "head_dim": decoder["head_size"],
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": found["context_length"],
        "eos_token_id": found["eos_token_id"],
        "transformers.js_config": {
            "dtype": "q4",
            "use_external_data_format": {BROWSER_GRAPH: written.parts},
            "kv_cache_dtype": {"q4": written.cache_type},
        },
    }


def read_decoder_sizes(folder: Path) -> DecoderConfig:
    """Return the sizes of the key-value cache from the ``config.json`` of a page.

    :raises UserError: if one is missing.
    """
    config = read_json(folder / BROWSER_CONFIG)
    names = {
        "head_size": "head_dim",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
    }
    for name in names.values():
        if type(config.get(name)) is not int:
            raise UserError(f"{folder / BROWSER_CONFIG}: {name}: a number is expected")
    return cast(DecoderConfig, {ours: config[theirs] for ours, theirs in names.items()})
