"""Stop a training once its loss on held-out examples is flat, and keep the best adapter.

The held-out examples are training examples that this training does not use. Their loss is measured
every ``adapt.stop.every`` steps, without dropout and at the highest ranks. The measurements and the
best adapter are files next to the checkpoints, so that an interrupted training resumes with them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from sqft_export.adapters.elastic import set_ranks
from sqft_export.adapters.linear import ElasticLoraLinear
from sqft_export.adapters.packing import TrainingRow
from sqft_export.machine.launcher import process_rank
from sqft_export.recipe.schema import Adapt, Stop

BEST, LOSSES = "best.safetensors", "held_out.json"
Collate = Callable[[list[TrainingRow]], dict[str, Tensor]]


def split_rows(
    rows: list[TrainingRow], config: Stop | None
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Return the rows to train on, and the held-out ones, which are evenly spread.

    At most every fourth row is held out. Without ``config`` all rows are trained on.
    """
    count = min(config.items, len(rows) // 4) if config else 0
    if not count:
        return rows, []
    chosen = {len(rows) * number // count for number in range(count)}
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    return kept, [rows[number] for number in sorted(chosen)]


@dataclass
class HeldOut:
    """The rule, and the data that it reads.

    rows: held-out examples.
    batch: examples per forward pass.
    set_highest_ranks: called before a measurement.
    losses: step -> mean loss per token, in nats.
    """

    config: Stop
    rows: list[TrainingRow]
    batch: int
    set_highest_ranks: Callable[[], None]
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def best_step(self) -> int:
        """Return the step with the lowest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def is_flat(self) -> bool:
        """Return whether the last ``patience`` measurements are no better than those before.

        Better is lower by more than the share ``improvement``.
        """
        found = [self.losses[step] for step in sorted(self.losses)]
        recent, before = found[-self.config.patience :], found[: -self.config.patience]
        return bool(before) and min(recent) > min(before) * (1 - self.config.improvement)


def held_out_of(
    config: Adapt,
    rows: list[TrainingRow],
    layers: dict[str, ElasticLoraLinear],
    groups: dict[str, list[str]],
) -> HeldOut | None:
    """Return the rule of a recipe; None if it has none.

    :param layers, groups: as for ``set_ranks``.
    """
    if config.stop is None:
        return None
    highest = partial(set_ranks, layers, groups, dict.fromkeys(groups, config.max_rank))
    return HeldOut(config.stop, rows, config.batch, highest)


class HeldOutCallback(TrainerCallback):
    """Measures the held-out loss, writes the best adapter, and ends the training.

    :param collate: makes a batch of rows.
    :param folder: folder of the training checkpoints.
    """

    def __init__(self, held_out: HeldOut, collate: Collate, folder: Path):
        self.held_out, self.collate, self.folder = held_out, collate, folder

    def on_train_begin(self, args, state, control, **kwargs):
        """Read the measurements up to the checkpoint that the training resumes from."""
        file = self.folder / LOSSES
        found = json.loads(file.read_text()) if state.global_step and file.is_file() else {}
        self.held_out.losses = {int(s): x for s, x in found.items() if int(s) <= state.global_step}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        held_out = self.held_out
        if state.global_step % held_out.config.every and state.global_step < state.max_steps:
            return
        held_out.losses[state.global_step] = self._loss(model)
        if process_rank() == 0:
            self._write(model, state.global_step)
        control.should_training_stop |= held_out.is_flat

    def _write(self, model: nn.Module, step: int) -> None:
        if self.held_out.best_step == step:
            partial = self.folder / f"{BEST}.partial"
            trained = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
            save_file({name: value.contiguous() for name, value in trained.items()}, partial)
            partial.replace(self.folder / BEST)
        (self.folder / LOSSES).write_text(json.dumps(self.held_out.losses))

    @torch.no_grad()
    def _loss(self, model: nn.Module) -> float:
        """Return the mean loss per token of the held-out rows."""
        self.held_out.set_highest_ranks()
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        total, count, size = 0.0, 0, self.held_out.batch
        for start in range(0, len(self.held_out.rows), size):
            batch = self.collate(self.held_out.rows[start : start + size])
            if "position_ids" in batch:  # packed, as in training
                batch = {k: v for k, v in batch.items() if k != "attention_mask"}
            found = model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(found.loss) * tokens, count + tokens
        model.train(was_training)
        return total / max(1, count)


def measured_losses(held_out: HeldOut | None) -> dict[int, float]:
    """Return step -> held-out loss; empty without a rule."""
    return held_out.losses if held_out else {}


def held_out_callbacks(
    held_out: HeldOut | None, collate: Collate, folder: Path
) -> list[HeldOutCallback]:
    """Return the callback of a rule; empty without a rule or without held-out rows."""
    return [HeldOutCallback(held_out, collate, folder)] if held_out and held_out.rows else []


def restore_best(model: nn.Module, folder: Path, held_out: HeldOut | None) -> None:
    """Set the trained parameters to those of the lowest held-out loss, if it was measured."""
    if held_out is None or not held_out.losses:
        return
    best = load_file(folder / BEST)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in best.items():
            parameters[name].copy_(value)


def short_training(losses: dict[int, float], config: Stop | None, name: str) -> list[str]:
    """Return a warning if the held-out loss still fell at the last of several measurements.

    :param name: of the pass.
    """
    if config is None or len(losses) < 2:
        return []
    *_, before, last = (losses[step] for step in sorted(losses))
    if last >= before * (1 - config.improvement):
        return []
    return [
        f"{name}: the held-out loss still fell at the last step, from {before:.3f} to {last:.3f}; "
        "raise adapt.steps or adapt.epochs"
    ]
