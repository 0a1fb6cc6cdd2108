import re

import pytest
import torch
from torch import nn

from conftest import random_model
from sqft_export.adapters.elastic import draw_ranks, elastic_layers, set_ranks
from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import add_adapters, load_compressed
from sqft_export.adapters.training import (
    _LengthGroupedSampler,
    collate,
    layer_error,
    select_logits,
    train_adapter,
    training_rows,
)
from sqft_export.data.items import Example
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Adapt

EXAMPLES = [Example([0, *range(i + 3, i + 9 + i % 4)], 3) for i in range(40)]


def config(**changes) -> Adapt:
    settings = {"steps": 8, "batch": 4, "save_steps": 2, "warmup_steps": 2, "learning_rate": 1e-2}
    return Adapt(**(settings | changes))


def start(folder) -> nn.Module:
    model = load_compressed(Base(folder), torch.float32)
    torch.manual_seed(1)
    return add_adapters(model, ("q_proj", "v_proj"), 8, 16, 0.1)


class Interrupted(Exception):
    pass


def run(model: nn.Module, settings: Adapt, folder, stop_at=None, examples=EXAMPLES, teacher=None):
    layers = elastic_layers(model)
    groups = {name: [name] for name in layers}

    def before_step(step: int) -> None:
        if step == stop_at:
            raise Interrupted
        set_ranks(layers, groups, draw_ranks(list(groups), (8, 4, 2), 7, step))

    return train_adapter(
        model,
        training_rows(examples, settings),
        settings,
        7,
        1,
        folder,
        before_step,
        lambda note="": None,
        teacher,
    )[0]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stop_at", [3, 6])
def test_an_interrupted_training_ends_as_an_undisturbed_one(random_llama, tmp_path, stop_at):
    undisturbed = start(random_llama)
    log = run(undisturbed, config(), tmp_path / "a")
    with pytest.raises(Interrupted):
        run(start(random_llama), config(), tmp_path / "b", stop_at=stop_at)
    resumed = start(random_llama)
    resumed_log = run(resumed, config(), tmp_path / "b")
    assert [e["loss"] for e in log] == [e["loss"] for e in resumed_log]
    ours, theirs = state(undisturbed), state(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_torn_training_checkpoint_is_not_resumed(random_llama, tmp_path):
    with pytest.raises(Interrupted):
        run(start(random_llama), config(), tmp_path, stop_at=5)
    newest = tmp_path / "checkpoint-4"
    (newest / "complete").unlink()
    (newest / "adapter_model.safetensors").write_bytes(b"torn")
    resumed = start(random_llama)
    log = run(resumed, config(), tmp_path)
    assert len(log) == 8


def test_warmup_and_schedule_are_obeyed(random_llama, tmp_path):
    log = run(start(random_llama), config(), tmp_path)
    rates = [entry["learning_rate"] for entry in log]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(set(rates[2:]), reverse=True)


def test_ranks_are_drawn_from_the_list_and_depend_on_the_step_alone():
    groups = [f"{block}.q_proj" for block in range(50)]
    drawn = draw_ranks(groups, (32, 24, 16), 42, 3)
    assert set(drawn.values()) == {32, 24, 16}
    assert drawn == draw_ranks(groups, (32, 24, 16), 42, 3)
    assert drawn != draw_ranks(groups, (32, 24, 16), 42, 4)
    assert drawn != draw_ranks(groups, (32, 24, 16), 43, 3)


def test_padding_is_out_of_attention_and_loss():
    batch = collate([{"input_ids": [5, 6, 7], "skip": 1}, {"input_ids": [8], "skip": 0}], pad=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "granite", "gpt_neox"])
def test_logits_without_a_target_are_left_out_of_the_product_and_change_nothing(
    model_type, tmp_path
):
    model = load_compressed(Base(random_model(tmp_path, model_type=model_type)), torch.float32)
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    model = add_adapters(model, tuple({n.split(".")[-1] for n in linears}), 8, 16, 0.0)
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "skip": 4}, {"input_ids": [8, 9, 4], "skip": 2}]
    batch = collate(rows, pad=1)
    selected = select_logits(batch)
    assert selected["logits_to_keep"].tolist() == [1, 3, 4]
    found = []
    for inputs in (batch, selected):
        model.zero_grad()
        output = model(**inputs, num_items_in_batch=torch.tensor(3))
        output.loss.backward()
        found.append((output, [p.grad for p in model.parameters() if p.grad is not None]))
    (full, gradients), (less, others) = found
    assert full.logits.shape[1] == 6 and less.logits.shape[1] == 3
    torch.testing.assert_close(less.loss, full.loss)
    assert len(gradients) == len(others) > 0
    torch.testing.assert_close(others, gradients, rtol=1e-3, atol=1e-6)


def test_no_label_left_is_an_error(random_llama, tmp_path):
    examples = [Example([1, 2, 3], 3)]
    with pytest.raises(UserError, match="no training example has a token in the loss"):
        run(start(random_llama), config(loss_on="answer"), tmp_path, examples=examples)


def test_a_loss_that_is_not_finite_stops(random_llama, tmp_path):
    model = start(random_llama)
    next(iter(elastic_layers(model).values())).lora_A["default"].weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"the (loss|norm of the gradient) is nan at step 1"):
        run(model, config(), tmp_path)


def test_steps_follow_from_epochs():
    settings = Adapt(epochs=3, batch=16, accumulation=1)
    assert settings.total_steps(7473) == 1404
    # As the Trainer counts: the remaining batches of every epoch are one step.
    few = Adapt(epochs=4, batch=2, accumulation=2)
    assert few.total_steps(10) == 12
    assert few.total_steps(10, processes=5) == 4


def test_batches_are_of_like_lengths_in_any_order_and_hold_every_example():
    lengths = [(7 * n) % 61 + 1 for n in range(203)]
    sampler = _LengthGroupedSampler(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again and sorted(first) == list(range(203))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sizes = [[lengths[i] for i in first[at : at + 8]] for at in range(0, 203, 8)]
    padded = sum(len(each) * max(each) for each in sizes)
    at_random = sum(8 * max(lengths[at : at + 8]) for at in range(0, 203, 8))
    assert padded < 1.2 * sum(lengths) < 0.8 * at_random
    longest = [max(each) for each in sizes]
    assert longest != sorted(longest, reverse=True)


def test_the_log_has_tokens_and_what_filled_batches_up(random_llama, tmp_path):
    notes: list[str] = []
    log, pace = train_adapter(
        start(random_llama),
        training_rows(EXAMPLES, config()),
        config(),
        7,
        1,
        tmp_path,
        lambda _: None,
        notes.append,
    )
    for entry in log:
        assert 4 * 6 <= entry["tokens"] <= entry["padded"] <= 4 * 10
    assert pace > 0
    assert len(notes) == 8
    assert re.fullmatch(r"loss \d+\.\d{3}, [\d,]+ tokens/s", notes[-1])


def test_layers_learn_to_give_what_the_teachers_give(random_llama, tmp_path):
    """Half of the student is gone; its loss alone does not ask for what blocks give."""
    batch = collate([{"input_ids": e.ids, "skip": e.skip} for e in EXAMPLES[:8]], 1)
    labels = batch.pop("labels")
    teacher = load_compressed(Base(random_llama), torch.float32)

    def error(layers: float, folder) -> float:
        student = start(random_llama)
        for layer in elastic_layers(student).values():
            weight = layer.get_base_layer().weight
            weight.data[:, ::2] = 0
        distill = {"weight": 0.5, "layers": layers}
        run(student, config(steps=30, distill=distill), folder, teacher=teacher)
        with torch.no_grad():
            ours, theirs = (
                model(**batch, output_hidden_states=True).hidden_states
                for model in (student, teacher)
            )
        found = layer_error(ours, theirs, labels)
        wanted = labels != -100
        by_hand = [
            ((one[wanted] - other[wanted]) ** 2).sum() / (other[wanted] ** 2).sum()
            for one, other in zip(ours[1:], theirs[1:], strict=True)
        ]
        assert found == pytest.approx(float(sum(by_hand) / len(by_hand)))
        return float(found)

    assert error(10.0, tmp_path / "with") < 0.9 * error(0.0, tmp_path / "without")
