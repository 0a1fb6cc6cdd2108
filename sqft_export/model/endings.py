"""End tokens of a model folder.

A tokenizer may add its end token after every text, such as a prompt; that is turned off. A config
may lack the token that ends an answer; it is added.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from sqft_export.model.tokenizer_json import TokenizerStep
from sqft_export.textfiles import read_json

GENERATION_CONFIG = "generation_config.json"
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def disable_end_token(folder: Path) -> None:
    """Rewrite the tokenizer of a model folder so that it adds no token after a text.

    A model does not continue a prompt that ends with the end token. Training and scoring omit the
    token, and every runtime that reads ``tokenizer.json`` must do the same. If the tokenizer adds
    no such token, its files stay unchanged, byte for byte.
    """
    config, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file() and (document := read_json(config)).get("add_eos_token"):
        _write(config, document | {"add_eos_token": False})
    if tokenizer.is_file() and _drop_suffix_tokens(
        (document := read_json(tokenizer))["post_processor"]
    ):
        _write(tokenizer, document)


def add_end_token(folder: Path, token: int) -> None:
    """Add an id to ``eos_token_id`` in the generation config of a model folder, if it is missing.

    Without such a file, one is written with the start, end and padding tokens of ``config.json``.
    """
    config, file = read_json(folder / "config.json"), folder / GENERATION_CONFIG
    found = {name: config[name] for name in _TOKEN_FIELDS if config.get(name) is not None}
    document = read_json(file) if file.is_file() else found
    ends = document.get("eos_token_id", found.get("eos_token_id", []))
    listed = ends if isinstance(ends, list) else [ends]
    if token not in listed:
        _write(file, document | {"eos_token_id": [*listed, token]})


def _drop_suffix_tokens(step: TokenizerStep | None) -> bool:
    """Remove the tokens after a text from a post-processor; return whether there were any."""
    if step is None:
        return False
    if step["type"] == "Sequence":
        return any([_drop_suffix_tokens(one) for one in step["processors"]])
    if step["type"] != "TemplateProcessing":
        return False
    single = step["single"]
    count = 1 + max((n for n, part in enumerate(single) if "Sequence" in part), default=-1)
    step["single"] = single[:count]
    return len(single) > count > 0


def _write(file: Path, document: Mapping[str, object]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
