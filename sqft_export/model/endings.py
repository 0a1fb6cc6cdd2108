"""A tokenizer that ends every text with its end token, made to leave prompts open."""

import json
from pathlib import Path
from typing import Any

from sqft_export.textfiles import read_json


def end_no_text(folder: Path) -> None:
    """Write the tokenizer of a model folder so that it adds no token after a text.

    A prompt with an end token after it asks for nothing; training and scoring leave the token out,
    and so must every runtime that reads ``tokenizer.json``. A tokenizer that adds none stays as it
    is, byte for byte.
    """
    config, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file() and (document := read_json(config)).get("add_eos_token"):
        _write(config, document | {"add_eos_token": False})
    if tokenizer.is_file() and _leave_open((document := read_json(tokenizer))["post_processor"]):
        _write(tokenizer, document)


def _leave_open(step: dict[str, Any] | None) -> bool:
    """Take what follows a text out of a post-processor; whether there was anything."""
    if step is None:
        return False
    if step["type"] == "Sequence":
        return any([_leave_open(one) for one in step["processors"]])
    if step["type"] != "TemplateProcessing":
        return False
    single = step["single"]
    count = 1 + max((n for n, part in enumerate(single) if "Sequence" in part), default=-1)
    step["single"] = single[:count]
    return len(single) > count > 0


def _write(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
