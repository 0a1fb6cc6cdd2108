"""The calibration samples that pruning and quantization read."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqft_export.data.files import numbered_rows, read_text
from sqft_export.data.items import (
    TRAIN_FIELDS,
    Data,
    Example,
    encode,
    first_token,
    load_tokenizer,
    split_windows,
)
from sqft_export.errors import UserError
from sqft_export.recipe.schema import HUB
from sqft_export.recipe.sections import CalibrationSections
from sqft_export.recipe.templates import text_field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_ROW_TOKENS = 16  # shorter dataset rows (headings, blank lines) are skipped
SHUFFLE_BUFFER_ROWS = 10_000


def calibration_fields(recipe: CalibrationSections) -> tuple[str, ...]:
    """Return the recipe fields that the samples depend on.

    They include the fields of the training data if the samples come from it.
    """
    return ("calibration", "seed", *(TRAIN_FIELDS if recipe.calibration.source == "task" else ()))


def calibration_samples(
    recipe: CalibrationSections, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Return a seeded choice of samples, each cut to the calibration length; lengths may differ.

    :raises UserError: if the source has fewer samples than requested.
    """
    config = recipe.calibration
    task = config.source == "task"
    samples: Sequence[Any] = (
        Data(recipe, tokenizer).train if task else _tokenize_source(recipe, tokenizer)
    )
    if len(samples) < config.samples:
        where = "the training split" if task else config.source
        raise UserError(
            f"{recipe.file}: calibration.samples: found {config.samples}, but {where} has "
            f"{len(samples)} of at most {config.sequence_length} tokens"
        )
    chosen = random.Random(recipe.seed).sample(samples, config.samples)
    ids = (sample.ids if isinstance(sample, Example) else sample for sample in chosen)
    return [one[: config.sequence_length] for one in ids]


def _tokenize_source(
    recipe: CalibrationSections, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Return the samples of a source that is not the task's training split."""
    config = recipe.calibration
    file = recipe.resolve(config.source)
    if config.source.startswith(HUB) or file.is_dir():
        return _stream_dataset(recipe, tokenizer)
    if file.suffix == ".jsonl":
        rows = numbered_rows(file)
        texts = [str(text_field(config.field, item, file, number)) for number, item in rows]
        return [ids for ids in encode(tokenizer, texts) if ids]
    ids = tokenizer(read_text(file), add_special_tokens=False)["input_ids"]
    return split_windows(ids, config.sequence_length, first_token(tokenizer))


def _stream_dataset(
    recipe: CalibrationSections, tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int]]:
    """Return the first rows of a seeded shuffle as token ids.

    Rows are streamed, so that a large dataset is not downloaded completely. Rows of fewer than
    ``MIN_ROW_TOKENS`` tokens are skipped.
    """
    import datasets

    config = recipe.calibration
    name = config.source.removeprefix(HUB)
    where = name if config.source.startswith(HUB) else str(recipe.resolve(name))
    revision = (recipe.revisions or {}).get(f"{HUB}{name}") or config.revision
    try:
        rows = datasets.load_dataset(
            where, config.subset, split=config.split, revision=revision, streaming=True
        )
        samples: list[list[int]] = []
        for row in rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLE_BUFFER_ROWS):
            if config.field not in row:
                raise UserError(
                    f"{recipe.file}: calibration.field: found {config.field!r}; rows of {where} "
                    f"have {', '.join(row)}"
                )
            (ids,) = encode(tokenizer, [row[config.field]])
            if len(ids) >= MIN_ROW_TOKENS:
                samples.append(ids)
            if len(samples) == config.samples:
                break
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{recipe.file}: calibration.source: {config.source} can't be read "
            f"({type(error).__name__}: {error}); use a local .txt or .jsonl file to avoid the hub"
        ) from error
    return samples


def calibration_tensors(recipe: CalibrationSections, model: Path) -> list[Tensor]:
    """Return the samples as int64 tensors ``[length]``, tokenized by a model folder's tokenizer."""
    return [torch.tensor(ids) for ids in calibration_samples(recipe, load_tokenizer(model))]
