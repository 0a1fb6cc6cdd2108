"""The training loop: transformers' Trainer, with the rank of every group drawn once a step."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from sqft_export.adapters.checkpoints import PlainCheckpointTrainer
from sqft_export.adapters.elastic import (
    draw_ranks,
    elastic_layers,
    groups_of,
    set_ranks,
    train_scales,
)
from sqft_export.adapters.files import Base, save_adapter
from sqft_export.adapters.loading import new_adapter
from sqft_export.data.items import Data, Example
from sqft_export.errors import UserError
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.recipe.schema import Adapt, Recipe
from sqft_export.run.device import CPU, device_name, device_of, training_dtype
from sqft_export.run.launcher import process_count, process_rank
from sqft_export.run.progress import Advance, Start

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # read by the Trainer
COMPLETE = "complete"  # written after a training checkpoint, so that a torn one is never resumed


class _Callback(TrainerCallback):
    """Sets the ranks before each step, stops on a bad loss, seals checkpoints, moves the bar."""

    def __init__(self, before_step: Callable[[int], None], advance: Advance, pace: "Pace"):
        self.before_step, self.advance, self.pace = before_step, advance, pace

    def on_step_begin(self, args, state, control, **kwargs):
        self.before_step(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:  # the summary at the end
            return
        self.advance(f"loss {loss:.3f}, {self.pace.tokens_per_second:,.0f} tokens/s")
        if not math.isfinite(loss):
            raise UserError(
                f"adapt: the loss is {loss} at step {state.global_step}; "
                "lower adapt.learning_rate or use precision float32"
            )

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / COMPLETE).touch()


@dataclass
class Pace:
    """Tokens that this process trained on, and how fast.

    counts, padded: tokens of the batches of the step at hand, without and with padding. Counts stay
    on the batch's device until the step has ended: to read one is to wait for an accelerator.
    began: when the first step had ended, which warms up and is left out; None before.
    trained, last: tokens since then, and when the last step ended.
    """

    counts: list[Tensor] = field(default_factory=list)
    padded: int = 0
    began: float | None = None
    trained: int = 0
    last: float = 0.0

    def add(self, attention_mask: Tensor) -> None:
        self.counts.append(attention_mask.sum())
        self.padded += attention_mask.numel()

    def end_step(self) -> dict[str, int]:
        """What is logged of the step."""
        tokens = int(torch.stack(self.counts).sum())
        self.last = time.monotonic()
        if self.began is None:
            self.began = self.last
        else:
            self.trained += tokens
        found = {"tokens": tokens, "padded": self.padded}
        self.counts, self.padded = [], 0
        return found

    @property
    def tokens_per_second(self) -> float:
        """0 until two steps have ended."""
        return self.trained / (self.last - self.began) if self.trained and self.began else 0.0


class _LikeLengths(Sampler[int]):
    """Batches of like lengths, in any order: the library's sampler has them from long to short.

    :param batch: examples of an optimizer step, over all processes.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        grouped = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        whole = len(grouped) // self.batch
        for number in torch.randperm(whole, generator=generator).tolist():
            yield from grouped[number * self.batch : (number + 1) * self.batch]
        yield from grouped[whole * self.batch :]


def collate(examples: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch; padding is out of attention and out of the loss."""
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, example["skip"] : length] = ids[row, example["skip"] : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _last_complete(folder: Path) -> str | None:
    """The newest whole checkpoint of an interrupted training."""
    done = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    newest = max(done, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
    return str(newest) if newest else None


class _Trainer(PlainCheckpointTrainer):
    """Batches of like lengths, scales at their own learning rate, and a teacher in the loss."""

    def __init__(self, config: Adapt, teacher: nn.Module | None, pace: Pace, **kwargs):
        super().__init__(**kwargs)
        self.config, self.pace = config, pace
        self.teacher = None if teacher is None else teacher.to(self.args.device)

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch = self.config.batch * self.config.accumulation * process_count()
        return _LikeLengths([len(row["input_ids"]) for row in rows], batch, self.args.data_seed)

    def log(self, logs, start_time=None):
        super().log(logs | (self.pace.end_step() if "loss" in logs else {}), start_time)

    optimizer: Any

    def create_optimizer(self, *_):
        if self.optimizer is None:
            rate = self.config.learning_rate
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            scales = [p for n, p in named if ".lora_shift." in n]
            adapters = [p for n, p in named if ".lora_shift." not in n]
            groups = [{"params": adapters, "weight_decay": self.config.weight_decay}]
            if scales:
                groups.append({"params": scales, "lr": rate * self.config.scale_learning_rate})
            self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.pace.add(inputs["attention_mask"])
        distill = None if self.teacher is None else self.config.distill
        if self.teacher is None or distill is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = inputs | {"output_hidden_states": bool(distill.layers)}
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        away = distill.weight * divergence(
            outputs.logits, teacher.logits, labels, distill.temperature, num_items_in_batch
        )
        if distill.layers:
            error = layer_error(outputs.hidden_states, teacher.hidden_states, labels)
            counted = (labels[:, 1:] != -100).sum()
            share = 1.0 if num_items_in_batch is None else counted / num_items_in_batch
            away = away + distill.layers * share * error
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # As the Trainer does with the loss: its mean over processes is taken later.
            away = away * self.accelerator.num_processes
        loss = (1 - distill.weight) * loss + away
        return (loss, outputs) if return_outputs else loss


def divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, count: Tensor | None
) -> Tensor:
    """``T^2 KL(teacher || student)`` per token of the loss (arXiv 1503.02531).

    :param student, teacher: logits ``[batch, length, vocabulary]``.
    :param labels: ``[batch, length]``, -100 where a token is not in the loss.
    :param count: tokens of the whole optimizer step, None for those of this batch.
    """
    wanted = labels[:, 1:] != -100
    ours = (student[:, :-1][wanted].float() / temperature).log_softmax(-1)
    theirs = (teacher[:, :-1][wanted].float() / temperature).log_softmax(-1)
    total = nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / (wanted.sum() if count is None else count)


def layer_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Mean over blocks of ``|student - teacher|^2 / |teacher|^2`` at the tokens of the loss, as
    SquareHead has it (arXiv 2310.06927).

    :param student, teacher: hidden states ``[batch, length, hidden]``: the embedding's, which is
        the same, and every block's.
    :param labels: ``[batch, length]``, -100 where a token is not in the loss.
    """
    wanted = labels != -100
    errors = []
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        expected = theirs[wanted].float()
        error = (ours[wanted].float() - expected).square().sum()
        errors.append(error / expected.square().sum())
    return torch.stack(errors).mean()


def padding_id(model: nn.Module, tokenizer: Any) -> int:
    """What fills a batch, out of attention and loss: any id that the embedding has."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    pad = tokenizer.pad_token_id
    return pad if pad is not None and 0 <= pad < rows else 0


def without_loss(example: Example, config: Adapt) -> bool:
    """Whether cutting an example to the limit left nothing of it that the loss is on."""
    return config.loss_on == "answer" and example.skip >= len(example.ids)


@dataclass(frozen=True)
class Trained:
    """A model with its trained super-adapter, what it was trained on, and how.

    log: of every step loss, learning rate, tokens, and ranks.
    facts: precision, device, tokens_per_second, padded_share: what depends on the machine.
    """

    model: nn.Module
    data: Data
    log: list[dict[str, Any]]
    facts: dict[str, Any]


def train_on_task(
    recipe: Recipe,
    base: Base,
    tokenizer: Any,
    folder: Path,
    start: Start,
    elastic: bool,
    teacher: nn.Module | None = None,
) -> Trained:
    """Train a fresh adapter, seeded, and write it to ``folder / "adapter"``.

    :param start: ``start(steps) -> advance``, called once a step.
    :param elastic: with the recipe's elastic ranks and trainable scales.
    """
    config, data = recipe.training, Data(recipe, tokenizer)
    device = device_of(recipe.device)
    dtype = training_dtype(config.precision, device)
    model = new_adapter(recipe, base, dtype)
    groups = _elastic_groups(model, base, config) if elastic else {}
    layers = elastic_layers(model)
    ranks_at = partial(draw_ranks, list(groups), config.ranks, recipe.seed)
    log, pace = train_adapter(
        model,
        list(data.train),
        config,
        recipe.seed,
        padding_id(model, tokenizer),
        folder / "training",
        before_step=lambda step: set_ranks(layers, groups, ranks_at(step)),
        advance=start(config.total_steps(len(data.train), process_count())),
        teacher=teacher,
        device=device,
    )
    save_adapter(model, folder / "adapter")
    if process_rank() == 0:  # training checkpoints serve an interrupted run alone
        shutil.rmtree(folder / "training")
    # The step logged as n is the one that began at n - 1.
    log = [{**e, "ranks": ranks_at(int(e["step"]) - 1)} for e in log]
    return Trained(model, data, log, _facts(log, pace, dtype, device))


def _elastic_groups(model: nn.Module, base: Base, config: Adapt) -> dict[str, list[str]]:
    """What shares a rank; the scales of a model that has it are free to move."""
    if config.trainable_scales:
        train_scales(model)
    return groups_of(model, Checkpoint(base.folder).family, config)


def _facts(
    log: list[dict[str, Any]], tokens_per_second: float, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    filled = sum(e["padded"] for e in log)
    return {
        "precision": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "tokens_per_second": tokens_per_second,
        "padded_share": 1 - sum(e["tokens"] for e in log) / filled,
    }


def _arguments(
    config: Adapt, steps: int, seed: int, folder: Path, device: torch.device
) -> TrainingArguments:
    os.environ[MIXED_PRECISION] = "no"  # whatever a launcher's config says: adapt.precision decides
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )


def _rows(examples: list[Example], config: Adapt) -> list[dict[str, Any]]:
    """What is trained on, as the Trainer takes it."""
    rows = [
        {"input_ids": e.ids, "skip": e.skip if config.loss_on == "answer" else 0}
        for e in examples
        if not without_loss(e, config)
    ]
    if not rows:
        raise UserError("adapt: no training example has a token left for the loss")
    return rows


def train_adapter(
    model: nn.Module,
    examples: list[Example],
    config: Adapt,
    seed: int,
    pad: int,
    folder: Path,
    before_step: Callable[[int], None],
    advance: Advance,
    teacher: nn.Module | None = None,
    device: torch.device = CPU,
) -> tuple[list[dict[str, Any]], float]:
    """Train the adapters of ``model`` in place.

    :param pad: token id that fills a batch on the right.
    :param folder: holds training checkpoints; a training interrupted there is continued.
    :param before_step: called with the number of the optimizer step about to run.
    :param teacher: what ``config.distill`` learns from.
    :param device: where it computes.
    :return: of every step loss, learning rate, tokens, and tokens with what fills batches up; and
        tokens a second of this process.
    :raises UserError: if every label is masked, or the loss is not finite.
    """
    rows = _rows(examples, config)
    pace, steps = Pace(), config.total_steps(len(rows), process_count())
    trainer = _Trainer(
        config,
        teacher,
        pace,
        model=model,
        args=_arguments(config, steps, seed, folder, device),
        train_dataset=rows,  # type: ignore[arg-type]  # a list serves as a map-style dataset
        data_collator=lambda batch: collate(batch, pad),
        callbacks=[_Callback(before_step, advance, pace)],
    )
    trainer.train(resume_from_checkpoint=_last_complete(folder))
    model.eval()
    keys = ("step", "loss", "learning_rate", "tokens", "padded")
    log = [{k: e[k] for k in keys} for e in trainer.state.log_history if "loss" in e]
    return log, pace.tokens_per_second
