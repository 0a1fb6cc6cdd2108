"""Stop a tokenizer from adding its end token after every text, such as a prompt."""

import json
from collections.abc import Mapping
from pathlib import Path

from sqft_export.model.tokenizer_json import TokenizerStep
from sqft_export.textfiles import read_json


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
