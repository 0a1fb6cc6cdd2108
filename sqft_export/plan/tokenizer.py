"""Checks of a model's tokenizer: it loads, fits the embedding, and reproduces text."""

import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.data.items import load_tokenizer, stop_ids, train_texts
from sqft_export.errors import one_line
from sqft_export.model.companions import companions
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe, Text
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND_TRIP_TEXT = "Once upon a time there was a little girl who liked to play in the park"
MIN_SIMILARITY = 0.9  # of a text after encoding and decoding; a vocabulary may lack characters
TASK_TEXTS = 3  # texts of the task that are tried as well
COMPARED_WORDS = 50  # per text


def tokenizer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the faults of the base model's tokenizer and of its generation config."""
    if layout.folder is None:
        return
    names = {file.name for file in companions(layout.folder)}
    if "tokenizer.json" not in names and "tokenizer.model" in names:
        yield (
            f"model: {layout.folder} has only tokenizer.model, which needs sentencepiece or "
            "tiktoken; save it with transformers where these are installed, which writes "
            "tokenizer.json"
        )
        return
    if "tokenizer.json" in names:
        read_json(layout.folder / "tokenizer.json", MAX_JSON_BYTES)
    if "generation_config.json" in names:
        yield from _generation_faults(layout.folder)
    try:
        tokenizer = load_tokenizer(layout.folder)
    except Exception as error:  # transformers and its converters raise many types
        yield f"model: the tokenizer of {layout.folder} cannot be loaded: {one_line(error)}"
        return
    yield from _row_faults(recipe, layout, tokenizer)
    for text in (ROUND_TRIP_TEXT, *itertools.islice(train_texts(recipe), TASK_TEXTS)):
        if fault := _round_trip_fault(tokenizer, layout.folder, text):
            yield fault
            return


def _generation_faults(folder: Path) -> Iterator[str]:
    from transformers import GenerationConfig

    read_json(folder / "generation_config.json")
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # invalid values raise many types
        yield f"model: {folder / 'generation_config.json'}: {one_line(error)}"


def _row_faults(
    recipe: Recipe, layout: Layout, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[str]:
    """Yield tokens without a row in the embedding; the padding token needs none."""
    rows = layout.config.get("vocab_size")
    if not isinstance(rows, int):
        return
    ends = stop_ids(Path(str(layout.folder)), tokenizer)
    if not ends and not isinstance(recipe.task, Text):
        yield (
            "model: its tokenizer and its configs have no end token (eos_token); training needs "
            "one at the end of every answer"
        )
    special = {tokenizer.bos_token_id, *ends} - {None}
    for token in sorted(special):
        if not 0 <= token < rows:
            yield (
                f"model: token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}; the "
                f"embedding has {rows} rows"
            )
    if not special and len(tokenizer) > rows + 1:
        yield f"model: the tokenizer has {len(tokenizer)} tokens; the embedding has {rows} rows"


def _round_trip_fault(tokenizer: "PreTrainedTokenizerBase", folder: Path, text: str) -> str | None:
    """Return a fault if encoding and decoding changes a text; then the tokenizer is wrong.

    Repeated blanks may become one, and a few characters may be unknown.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises only Exception
        return f"model: the tokenizer of {folder} cannot encode {text[:60]!r}: {error}"
    before, after = text.split()[:COMPARED_WORDS], decoded.split()[:COMPARED_WORDS]
    matcher = difflib.SequenceMatcher(None, " ".join(before), " ".join(after), autojunk=False)
    if matcher.ratio() >= MIN_SIMILARITY and len(after) >= MIN_SIMILARITY * len(before):
        return None
    config = folder / "tokenizer_config.json"
    tokenizer_class = read_json(config).get("tokenizer_class") if config.is_file() else None
    return (
        f"model: its tokenizer changes text: {text[:60]!r} is decoded as {decoded[:60]!r}; check "
        f"that tokenizer.json is a {tokenizer_class}, as {config} states"
    )
