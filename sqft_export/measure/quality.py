"""Measure KL divergence and perplexity of the model after a pass, on a small held-out sample.

Every model runs in float32 with the weights of one module in memory. The sample is a few test
items. The distributions that predict their target tokens are compared.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sqft_export.adapters.files import Base, read_low_rank
from sqft_export.artifacts.store import SEAL, key_of
from sqft_export.data.items import load_tokenizer, sample_items
from sqft_export.documents import Document
from sqft_export.errors import DamagedError, UserError
from sqft_export.measure.agreement import agreement
from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.floats import StreamedWeights, streamed_model
from sqft_export.numerics.affine import fake_quantize
from sqft_export.recipe.schema import Recipe
from sqft_export.textfiles import read_json

SAMPLED_ITEMS = 8
MAX_TARGET_TOKENS = 64  # per item
MAX_SEQUENCE_TOKENS = 256  # per item, prompt and target; the prompt is cut at its beginning


@dataclass(frozen=True)
class SampledItem:
    """A prompt with its target, cut to the limits above.

    ids: token ids of prompt and target.
    count: number of ids at the end that are the target.
    """

    ids: list[int]
    count: int


@dataclass(frozen=True)
class PassModel:
    """The model after a pass.

    base: its weights, masks and grids.
    adapter: folder of the adapter that is added to them, or None.
    """

    base: Base
    adapter: Path | None = None


def held_out_sample(recipe: Recipe, model: Path) -> list[SampledItem]:
    """Return evenly spread items of the test split, tokenized by the base model's tokenizer."""
    tokenizer = load_tokenizer(model)
    _, items = sample_items(recipe, tokenizer, "test", SAMPLED_ITEMS)
    found = []
    for item in items[:SAMPLED_ITEMS]:
        target = item.target[:MAX_TARGET_TOKENS]
        found.append(SampledItem((item.prompt + target)[-MAX_SEQUENCE_TOKENS:], len(target)))
    return found


class _EffectiveWeights(StreamedWeights):
    """The weights that the model after a pass multiplies with."""

    def __init__(self, model: PassModel):
        from sqft_export.adapters.loading import Layers  # imports peft, which `plan` does not need

        self.layers = Layers(model.base, model.adapter)
        unmerged = model.adapter if model.base.unmerged else None
        updates = read_low_rank(unmerged) if unmerged else {}
        super().__init__(self.layers.checkpoint, updates, self.layers.grids)

    def read(self, module: str, parameter: str) -> Tensor:
        if parameter == "weight" and module in self.layers.names:
            layer, update = self.layers.layer(module)
            return layer.effective_weight(update)
        weight = super().read(module, parameter)
        grid = self.grids.get(module) if parameter == "weight" else None
        return fake_quantize(weight, grid) if grid else weight


@torch.no_grad()
def target_distributions(
    model: PassModel, sample: list[SampledItem], device: torch.device
) -> np.ndarray:
    """Return the log-probabilities that predict the targets: float32 ``[tokens, vocabulary]``.

    Shorter items are padded on the right, where a causal model does not attend.
    """
    weights = _EffectiveWeights(model)
    streamed = streamed_model(weights.checkpoint, weights, device)
    ids = torch.zeros(len(sample), max(len(item.ids) for item in sample), dtype=torch.int64)
    for row, item in zip(ids, sample, strict=True):
        row[: len(item.ids)] = torch.tensor(item.ids)
    logits = streamed(input_ids=ids.to(device), use_cache=False).logits
    rows = []
    for one, item in zip(logits, sample, strict=True):
        last = len(item.ids) - 1  # the token after the last id is not in the sample
        rows.append(log_softmax(one[last - item.count : last].cpu().numpy()).astype(np.float32))
    return np.concatenate(rows)


def perplexity_of(distributions: np.ndarray, sample: list[SampledItem]) -> float:
    """Return the perplexity of the targets; infinite or NaN if the log-probabilities are."""
    targets = [token for item in sample for token in item.ids[-item.count :]]
    mean = float(distributions[np.arange(len(targets)), targets].astype(np.float64).mean())
    return math.exp(-mean) if mean > -700 else math.nan if math.isnan(mean) else math.inf


class PassQuality(Document):
    """The quality of a model after a pass, compared with the model before it.

    before: the pass, or the base model, that it is compared with.
    items, tokens: number of compared items and tokens.
    kl_nats: mean KL divergence from the model before, in nats per token.
    agreement: share of tokens with the same argmax.
    data: digest of the sample and the method.
    """

    pass_name: str = Field(alias="pass")
    before: str
    items: int
    tokens: int
    kl_nats: float
    agreement: float
    perplexity: float
    perplexity_before: float
    data: str


def compare_quality(
    before: np.ndarray,
    after: np.ndarray,
    sample: list[SampledItem],
    *,
    pass_name: str,
    before_name: str,
    data: str,
) -> PassQuality:
    """Compare the distributions of the models before and after a pass.

    :param pass_name, before_name, data: stored with the result.
    """
    found = agreement(before, after)
    return PassQuality(
        pass_name=pass_name,
        before=before_name,
        items=len(sample),
        tokens=found.tokens,
        kl_nats=found.kl_nats,
        agreement=found.agreement,
        perplexity=perplexity_of(after, sample),
        perplexity_before=perplexity_of(before, sample),
        data=data,
    )


def quality_file(root: Path, name: str, key: str) -> Path:
    """Return the path of the record of a pass ``name`` with the artifact key ``key``."""
    return root / f"quality-{name}-{key[:16]}.json"


def write_quality(file: Path, record: PassQuality) -> None:
    """Write a record with its seal to a temporary file, then rename it to ``file``."""
    partial = file.with_suffix(".partial")
    fields = record.to_json()
    partial.write_text(json.dumps(fields | {SEAL: key_of(fields)}, indent=2) + "\n")
    partial.rename(file)


def read_quality(file: Path) -> PassQuality | None:
    """Read a record; None if the file is missing.

    :raises DamagedError: if the seal does not match the content.
    """
    if not file.is_file():
        return None
    try:
        fields = read_json(file)
        seal = fields.pop(SEAL, None)
        record = PassQuality.parse(json.dumps(fields), str(file))
    except UserError as error:
        raise DamagedError(f"{error}; delete it and run again") from error
    if seal != key_of(fields):
        raise DamagedError(f"{file}: its seal is broken; delete it and run again")
    return record
