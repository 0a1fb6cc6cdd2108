"""A training ends once its held-out loss is flat, and keeps its best adapter."""

import pytest
import torch
from test_training import EXAMPLES, Interrupted, config, start, state

from sqft_export.adapters.elastic import elastic_layers, set_ranks
from sqft_export.adapters.stopping import HeldOut, short_training, split_rows
from sqft_export.adapters.training import collate, train_adapter, training_rows
from sqft_export.recipe.schema import Stop


def train(model, folder, stop: Stop, stop_at=None, **changes):
    """Train with a rule; return the log and the rule with its measurements."""
    settings = config(stop=stop, **changes)
    rows, others = split_rows(training_rows(EXAMPLES, settings), stop)
    layers = elastic_layers(model)
    groups = {name: [name] for name in layers}

    def highest() -> None:
        set_ranks(layers, groups, dict.fromkeys(groups, 8))

    def before_step(step: int) -> None:
        if step == stop_at:
            raise Interrupted
        set_ranks(layers, groups, dict.fromkeys(groups, 4))

    held_out = HeldOut(stop, others, 4, highest)
    log, _ = train_adapter(
        model, rows, settings, 7, 1, folder, before_step, lambda note="": None, held_out=held_out
    )
    highest()
    return log, held_out


def loss_of(model, rows) -> float:
    """The mean loss per token, in one batch, from the logits."""
    batch = collate(rows, pad=1)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, :-1].log_softmax(-1)
    counted = labels != -100
    taken = logits.gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return -float(taken[counted].mean())


def test_held_out_rows_are_spread_and_not_trained():
    rows = [{"input_ids": [n], "skip": 0} for n in range(100)]
    kept, others = split_rows(rows, Stop(items=4))
    assert [row["input_ids"][0] for row in others] == [0, 25, 50, 75]
    assert len(kept) == 96 and not [row for row in kept if row in others]
    assert len(split_rows(rows[:10], Stop(items=64))[1]) == 2
    assert split_rows(rows, None) == (rows, [])


@pytest.mark.parametrize(
    ("losses", "flat"),
    [
        ([2.0, 1.5, 1.2], False),
        ([2.0, 1.5, 1.499, 1.51], True),
        ([2.0, 1.5, 1.6, 1.4], False),
        ([2.0, 2.1], False),
    ],
)
def test_a_loss_is_flat_after_measurements_without_an_improvement(losses, flat):
    rule = HeldOut(Stop(patience=2, improvement=0.01), [], 1, lambda: None)
    rule.losses = {10 * (n + 1): loss for n, loss in enumerate(losses)}
    assert rule.is_flat is flat


def test_training_stops_early_with_the_adapter_of_the_lowest_loss(random_llama, tmp_path):
    model = start(random_llama)
    stop = Stop(items=8, every=2, patience=2, improvement=0.0)
    log, rule = train(model, tmp_path, stop, steps=60, learning_rate=0.3, warmup_steps=0)
    assert len(log) < 60 and max(rule.losses) == len(log)
    assert loss_of(model, rule.rows) == pytest.approx(min(rule.losses.values()), rel=1e-4)
    assert rule.best_step < len(log)


def test_an_interrupted_training_keeps_its_measurements(random_llama, tmp_path):
    stop = Stop(items=8, every=2, patience=50)
    undisturbed, resumed = start(random_llama), start(random_llama)
    _, expected = train(undisturbed, tmp_path / "a", stop)
    with pytest.raises(Interrupted):
        train(start(random_llama), tmp_path / "b", stop, stop_at=5)
    _, found = train(resumed, tmp_path / "b", stop)
    assert found.losses == expected.losses and list(found.losses) == [2, 4, 6, 8]
    ours, theirs = state(undisturbed), state(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loss_that_still_falls_is_a_warning():
    stop = Stop()
    assert short_training({50: 1.0, 100: 0.9}, stop, "adapt") == [
        "adapt: the held-out loss still fell at the last step, from 1.000 to 0.900; raise "
        "adapt.steps or adapt.epochs"
    ]
    assert short_training({50: 1.0, 100: 0.999}, stop, "adapt") == []
    assert short_training({}, None, "adapt") == []
