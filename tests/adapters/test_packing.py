"""Packed examples are trained on as the same examples in separate rows."""

import pytest
import torch
from chat_model import write_chat_folder
from transformers import AutoConfig

from conftest import random_model
from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import add_adapters, load_compressed
from sqft_export.adapters.packing import fill_rows, separates_packed
from sqft_export.adapters.training import collate, train_adapter, training_rows
from sqft_export.data.items import Data, Example, load_tokenizer
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.miniature import make_miniature
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.layout import layout_of
from sqft_export.plan.packing import packing_faults
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Adapt

SETTINGS = {
    **{"pipeline": "shears", "ranks": [8], "alpha": 8, "dropout": 0.0},
    **{"steps": 3, "batch": 2, "warmup_steps": 0},
}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128}


def example(*ids: int, given: int) -> Example:
    loss = [n >= given for n in range(len(ids))]
    return Example(list(ids), given, loss)


EXAMPLES = [
    example(*range(5, 12), given=3),
    example(*range(50, 54), given=1),
    example(*range(90, 99), given=5),
    example(*range(20, 23), given=2),
]


def test_rows_are_filled_with_whole_examples():
    lengths = [7, 4, 9, 3, 5, 1]
    rows = fill_rows(lengths, 10)
    assert sorted(n for row in rows for n in row) == list(range(6))
    assert all(sum(lengths[n] for n in row) <= 10 for row in rows)
    assert len(rows) == 3
    assert fill_rows([10, 10], 10) == [[0], [1]]


def losses(model: torch.nn.Module, rows: list[dict]) -> dict[int, float]:
    """Token id -> its loss; every id of EXAMPLES is there once."""
    batch = collate(rows, 1)
    labels = batch.pop("labels")[:, 1:]
    if "position_ids" in batch:
        del batch["attention_mask"]
        batch["use_cache"] = False
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    counted = labels != -100
    found = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="none")
    return dict(zip(labels[counted].tolist(), found.tolist(), strict=True))


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox"]
)
def test_losses_of_packed_examples_are_those_of_separate_rows(tmp_path, model_type):
    config = {"sliding_window": 4} if model_type in ("mistral", "gemma3_text") else {}
    folder = random_model(tmp_path / "model", model_type=model_type, **config)
    model = load_model(Checkpoint(folder), torch.float32)
    settings = Adapt(**SETTINGS)
    packed = training_rows(EXAMPLES, settings, 16)
    assert [row["lengths"] for row in packed] == [[7, 9], [4, 3]]
    expected = losses(model, training_rows(EXAMPLES, settings))
    assert losses(model, packed) == pytest.approx(expected, rel=1e-4)


def test_a_packed_training_has_the_losses_of_separate_rows(random_llama, tmp_path):
    """All examples are in one step, so the steps are equal."""

    def trained(row_tokens: int | None, batch: int) -> list[float]:
        torch.manual_seed(1)
        compressed = load_compressed(Base(random_llama), torch.float32)
        model = add_adapters(compressed, ("q_proj", "v_proj"), 8, 16, 0.0)
        settings = Adapt(**(SETTINGS | {"batch": batch}))
        log, _ = train_adapter(
            model,
            training_rows(EXAMPLES, settings, row_tokens),
            settings,
            7,
            1,
            tmp_path / str(batch),
            lambda step: None,
            lambda note="": None,
        )
        assert {entry["tokens"] for entry in log} == {23}
        return [entry["loss"] for entry in log]

    assert trained(16, 2) == pytest.approx(trained(None, 4), rel=1e-4)


@pytest.mark.parametrize("model_type", ["bloom", "lfm2", "opt"])
def test_a_model_that_mixes_packed_examples_is_found(tmp_path, model_type):
    config = LFM2 if model_type == "lfm2" else {}
    folder = random_model(tmp_path / "model", model_type=model_type, **config)
    model = make_miniature(AutoConfig.from_pretrained(folder))
    assert not separates_packed(model, model.config.vocab_size)


def test_packing_is_refused_where_a_family_mixes_conversations(tmp_path):
    recipe = load_recipe(write_chat_folder(tmp_path) / "recipe.yaml", ("task.packing=true",))
    model = random_model(tmp_path / "bloom", model_type="bloom")
    (fault,) = packing_faults(recipe, layout_of(recipe, model))
    assert fault == (
        "task.packing: found true, but bloom models mix the conversations of a packed row; "
        "set false"
    )
    assert list(packing_faults(recipe, layout_of(recipe, tmp_path / "model"))) == []


def test_a_packed_recipe_trains_on_fewer_rows(tmp_path):
    folder = write_chat_folder(tmp_path)
    recipe = load_recipe(folder / "recipe.yaml", ("task.packing=true", "task.sequence_length=512"))
    check_recipe(recipe, folder / "model")
    examples = list(Data(recipe, load_tokenizer(folder / "model")).train)
    rows = training_rows(examples, recipe.training, 512)
    assert len(rows) < len(examples) / 2
    assert sum(len(row["input_ids"]) for row in rows) == sum(len(one.ids) for one in examples)
