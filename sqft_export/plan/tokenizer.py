"""Whether a model's tokenizer is the one its text was written with."""

import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqft_export.data.items import load_tokenizer, stop_ids, train_texts
from sqft_export.errors import one_line
from sqft_export.model.companions import companions
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe, Text
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

TEXT = "Once upon a time there was a little girl who liked to play in the park"
SURVIVES = 0.9  # of a text: a few characters that a vocabulary lacks are let
TRIED = 3  # texts of the task
WORDS = 50  # of each


def tokenizer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    if layout.folder is None:
        return
    names = {file.name for file in companions(layout.folder)}
    if "tokenizer.json" not in names and "tokenizer.model" in names:
        yield (
            f"model: {layout.folder} has tokenizer.model alone, which needs sentencepiece or "
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
    except Exception as error:  # whatever transformers and its converters raise
        yield f"model: the tokenizer of {layout.folder} can't be loaded: {one_line(error)}"
        return
    yield from _row_faults(recipe, layout, tokenizer)
    for text in (TEXT, *itertools.islice(train_texts(recipe), TRIED)):
        if fault := _round_trip_fault(tokenizer, layout.folder, text):
            yield fault
            return


def _generation_faults(folder: Path) -> Iterator[str]:
    from transformers import GenerationConfig

    read_json(folder / "generation_config.json")
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # its values are checked by whatever first uses them
        yield f"model: {folder / 'generation_config.json'}: {one_line(error)}"


def _row_faults(recipe: Recipe, layout: Layout, tokenizer: Any) -> Iterator[str]:
    """Tokens that the embedding has no row for; what fills a batch needs none."""
    rows = layout.config.get("vocab_size")
    if not isinstance(rows, int):
        return
    ends = stop_ids(Path(str(layout.folder)), tokenizer)
    if not ends and not isinstance(recipe.task, Text):
        yield (
            "model: neither its tokenizer nor its configs name an end token (eos_token), which "
            "answers are trained to end with"
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


def _round_trip_fault(tokenizer: Any, folder: Path, text: str) -> str | None:
    """Text that does not survive is not what the model was trained on. Blanks in a row may become
    one, and some characters may be unknown."""
    try:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        return f"model: the tokenizer of {folder} can't encode {text[:60]!r}: {error}"
    ours, theirs = text.split()[:WORDS], back.split()[:WORDS]
    alike = difflib.SequenceMatcher(None, " ".join(ours), " ".join(theirs), autojunk=False)
    if alike.ratio() >= SURVIVES and len(theirs) >= SURVIVES * len(ours):
        return None
    config = folder / "tokenizer_config.json"
    says = read_json(config).get("tokenizer_class") if config.is_file() else None
    return (
        f"model: text does not survive its tokenizer: {text[:60]!r} comes back as {back[:60]!r}; "
        f"{config} says {says}, which tokenizer.json may not be"
    )
