"""Compare the tokenizers of the requested runtimes with the tokenizer used in training."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.data.items import HARD_TEXTS, data_files, load_tokenizer, sample_texts
from sqft_export.errors import one_line
from sqft_export.machine.host import installed
from sqft_export.model.companions import companions
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import VerifySections
from sqft_export.targets.devices import llama_cpp_here
from sqft_export.targets.tokenizers import tokenize_as_deployed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_NAMED_TEXTS = 2  # in a message
RUNTIMES = {
    "openvino": ("openvino_genai", "openvino_tokenizers"),
    "onnx": ("onnxruntime_genai", "onnx"),
    "gguf": ("gguf",),
}


def token_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault per tokenizer that differs, if ``verify.tokenizers`` is ``required``."""
    if recipe.verify.tokenizers == "required" and layout.folder is not None:
        for reader, texts in differing_texts(recipe, layout.folder, layout.embedding[0]).items():
            yield (
                f"verify.tokenizers: found required, but {_difference(reader, texts)}; auto and "
                "reported allow it"
            )


def find_token_differences(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning per tokenizer that differs, if ``verify.tokenizers`` allows it."""
    if recipe.verify.tokenizers != "required" and layout.folder is not None:
        for reader, texts in differing_texts(recipe, layout.folder, layout.embedding[0]).items():
            yield (
                f"export.targets: {_difference(reader, texts)}; texts that are tokenized by "
                "transformers are not affected; verify.tokenizers=required refuses the recipe"
            )


def _difference(reader: str, texts: list[str]) -> str:
    first = ", ".join(repr(text[:40]) for text in texts[:_MAX_NAMED_TEXTS])
    return f"the tokenizer of {reader} makes other ids of {len(texts)} texts ({first})"


def conversion_failure(name: str, layout: Layout) -> str | None:
    """Return why a target's tokenizer conversion fails; None if it works or can't be tried."""
    if layout.folder is None or not _is_readable(name) or _loaded(layout.folder) is None:
        return None
    source = _Source(_stamp(layout.folder), layout.folder)
    found = _tokenized(name, source, HARD_TEXTS, layout.embedding[0])
    return f"its tokenizer can't be converted: {found}" if isinstance(found, str) else None


def differing_texts(recipe: VerifySections, folder: Path, rows: int) -> dict[str, list[str]]:
    """Return tokenizer of a runtime -> the texts for which its ids differ from the model's.

    Tokenizers that agree on every text are left out. Other checks report faults of the data and of
    the model's own tokenizer.

    :param folder: folder of the base model.
    :param rows: number of rows of its embedding.
    """
    tokenizer = _loaded(folder)
    if tokenizer is None or not all(file.is_file() for file in data_files(recipe, "test")):
        return {}
    texts = sample_texts(recipe, recipe.verify.prompts)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    found: dict[str, list[str]] = {}
    source = _Source(_stamp(folder), folder)
    for name in filter(_is_readable, recipe.export.targets):
        ids_of = _tokenized(name, source, tuple(texts), rows)
        for reader, ids in ids_of.items() if isinstance(ids_of, dict) else ():
            pairs = zip(texts, ids, expected, strict=True)
            if differing := [text for text, one, other in pairs if one != other]:
                found[reader] = differing
    return found


def _is_readable(name: str) -> bool:
    here = name in RUNTIMES and all(installed(module) for module in RUNTIMES[name])
    return here and (name != "gguf" or llama_cpp_here())


def _loaded(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a folder; None if it can't be loaded (``plan/tokenizer.py``)."""
    try:
        return load_tokenizer(folder)
    except Exception:  # transformers and its converters raise many kinds
        return None


def _stamp(folder: Path) -> str:
    """Return a digest of the files that determine a tokenizer."""
    digest = hashlib.sha256()
    for file in companions(folder):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    """A model folder; it equals another one with the same configs and tokenizer."""

    stamp: str
    folder: Path = field(compare=False)


@functools.cache
def _tokenized(
    name: str, source: _Source, texts: tuple[str, ...], rows: int
) -> dict[str, list[list[int] | None]] | str:
    """Return tokenizer of a runtime -> ids of every text; the error if the conversion fails."""
    try:
        return tokenize_as_deployed(name, source.folder, list(texts), rows)
    except Exception as error:  # converters raise many kinds
        return one_line(error)
