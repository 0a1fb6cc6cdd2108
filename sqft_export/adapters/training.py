"""The training loop: transformers' Trainer, with new ranks for every group at each step."""

import inspect
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
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
from sqft_export.adapters.files import Base, RankedStepLog, StepLog, save_adapter
from sqft_export.adapters.loading import new_adapter
from sqft_export.adapters.packing import TrainingRow, pack_rows, position_ids
from sqft_export.adapters.stopping import (
    HeldOut,
    held_out_callbacks,
    held_out_of,
    measured_losses,
    restore_best,
    split_rows,
)
from sqft_export.data.items import Data, Example
from sqft_export.errors import UserError
from sqft_export.machine.device import CPU, device_name, device_of, training_dtype
from sqft_export.machine.launcher import process_count, process_rank
from sqft_export.machine.progress import Advance, Start
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.recipe.schema import Adapt, Chat
from sqft_export.recipe.sections import TrainingSections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # read by the Trainer
COMPLETE = "complete"  # file written after a checkpoint; partial checkpoints are not resumed


class _Callback(TrainerCallback):
    """Sets the ranks before a step, advances the progress bar and marks complete checkpoints.

    :raises UserError: if the loss or the gradient is NaN or infinite. torch's attention on AVX-512
        drops NaN in the forward, so that only the gradient shows it.
    """

    def __init__(
        self, before_step: Callable[[int], None], advance: Advance, throughput: "Throughput"
    ):
        self.before_step, self.advance, self.throughput = before_step, advance, throughput

    def on_step_begin(self, args, state, control, **kwargs):
        self.before_step(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:  # the summary after the last step
            return
        self.advance(f"loss {loss:.3f}, {self.throughput.tokens_per_second:,.0f} tokens/s")
        for name, value in (("loss", loss), ("norm of the gradient", logs.get("grad_norm", 0.0))):
            if not math.isfinite(value):
                raise UserError(
                    f"adapt: the {name} is {value} at step {state.global_step}; "
                    "lower adapt.learning_rate or use precision float32"
                )

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / COMPLETE).touch()


@dataclass
class Throughput:
    """Tokens per second that this process trains on.

    counts, padded: tokens of the current step's batches without and with padding. The counts stay
        on the batch's device until the step ends: reading one waits for the accelerator.
    began: end of the first step, in seconds; None before. The first step is a warm-up and does not
        count.
    trained, last: tokens since then, and the end of the last step in seconds.
    """

    counts: list[Tensor] = field(default_factory=list)
    padded: int = 0
    began: float | None = None
    trained: int = 0
    last: float = 0.0

    def add(self, attention_mask: Tensor) -> None:
        """Count the tokens of one batch; the mask is int64 ``[batch, length]``."""
        self.counts.append(attention_mask.sum())
        self.padded += attention_mask.numel()

    def end_step(self) -> dict[str, int]:
        """Return the token counts of the step, for the log, and reset them."""
        tokens = int(torch.stack(self.counts).sum())
        self.last = time.monotonic()
        if self.began is None:
            self.began = self.last
        else:
            self.trained += tokens
        counted = {"tokens": tokens, "padded": self.padded}
        self.counts, self.padded = [], 0
        return counted

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second without padding; 0 until the second step has ended."""
        return self.trained / (self.last - self.began) if self.trained and self.began else 0.0


class _LengthGroupedSampler(Sampler[int]):
    """Samples batches of similar length in random order.

    The sampler of transformers yields them from long to short.

    :param lengths: tokens of every example.
    :param batch: examples of an optimizer step over all processes.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which is part of the seed; called by the Trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def _batches_sorted(self) -> int:
        """Return how many random batches are sorted by length together.

        As in transformers a quarter of an epoch, at most 50; but at least eight, since a quarter
        of a small set is one batch, which would be padded to its longest row.
        """
        batches = len(self.lengths) // self.batch
        return max(1, min(batches // 4, 50), min(batches, 8))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        grouped = get_length_grouped_indices(
            self.lengths, self.batch, self._batches_sorted(), generator=generator
        )
        full_batches = len(grouped) // self.batch
        for number in torch.randperm(full_batches, generator=generator).tolist():
            yield from grouped[number * self.batch : (number + 1) * self.batch]
        yield from grouped[full_batches * self.batch :]


def collate(examples: list[TrainingRow], pad: int) -> dict[str, torch.Tensor]:
    """Return a right-padded batch: int64 ``[batch, length]`` ids, labels and attention mask.

    Padding is masked in the attention and in the loss (label -100). Packed rows also get
    ``position_ids``.

    :param pad: token id of the padding.
    """
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, example["skip"] : length] = ids[row, example["skip"] : length]
        if (loss := example.get("loss")) is not None:
            labels[row, :length][~torch.tensor(loss)] = -100
        mask[row, :length] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if "lengths" in examples[0]:
        batch["position_ids"] = position_ids([e["lengths"] for e in examples], longest)
    return batch


def _last_complete_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of an interrupted training, or None."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")]
    newest = max(complete, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
    return str(newest) if newest else None


class _Trainer(PlainCheckpointTrainer):
    """A Trainer with batches of similar length, a learning rate for the scales, and distillation.

    :param teacher: model that the loss compares with; None for the plain loss.
    """

    def __init__(self, config: Adapt, teacher: nn.Module | None, throughput: Throughput, **kwargs):
        super().__init__(**kwargs)
        self.config, self.throughput = config, throughput
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        accepted = inspect.signature(self.model.forward).parameters
        self.selects_logits = "logits_to_keep" in accepted

    def train_sampler(self, rows: Dataset) -> Sampler:
        batch = self.config.batch * self.config.accumulation * process_count()
        lengths = [len(row["input_ids"]) for row in rows]
        return _LengthGroupedSampler(lengths, batch, self.args.data_seed)

    def log(self, logs, start_time=None):
        super().log(logs | (self.throughput.end_step() if "loss" in logs else {}), start_time)

    optimizer: torch.optim.Optimizer | None

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
        self.throughput.add(inputs["attention_mask"])
        if "position_ids" in inputs:  # packed: the restarts of the positions are the mask
            inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
            inputs |= {"use_cache": False}
        distill = None if self.teacher is None else self.config.distill
        if self.teacher is None or distill is None:
            inputs = select_logits(inputs) if self.selects_logits else inputs
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = inputs | {"output_hidden_states": bool(distill.layers)}
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        distilled = distill.weight * divergence(
            outputs.logits, teacher.logits, labels, distill.temperature, num_items_in_batch
        )
        if distill.layers:
            error = layer_error(outputs.hidden_states, teacher.hidden_states, labels)
            counted = (labels[:, 1:] != -100).sum()
            share = 1.0 if num_items_in_batch is None else counted / num_items_in_batch
            distilled = distilled + distill.layers * share * error
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # As for the plain loss: the Trainer later takes the mean over the processes.
            distilled = distilled * self.accelerator.num_processes
        loss = (1 - distill.weight) * loss + distilled
        return (loss, outputs) if return_outputs else loss


def select_logits(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch for which a model computes logits only where a row has a token in the loss.

    Prompts and padding have none, and the head of a large vocabulary costs as much as all blocks.
    The loss is the same.

    :param inputs: ``labels`` int64 ``[batch, length]``, -100 where a token is not in the loss.
    """
    targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    kept = (targets != -100).any(dim=0).nonzero()[:, 0]
    aligned = targets[:, kept]
    return inputs | {"labels": aligned, "shift_labels": aligned, "logits_to_keep": kept}


def divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, count: Tensor | None
) -> Tensor:
    """Return ``T^2 KL(teacher || student)`` per token of the loss, in nats (arXiv 1503.02531).

    :param student, teacher: logits ``[batch, length, vocabulary]``.
    :param labels: ``[batch, length]``, -100 where a token is not in the loss.
    :param count: tokens of the complete optimizer step; None counts those of this batch.
    """
    counted = labels[:, 1:] != -100
    ours = (student[:, :-1][counted].float() / temperature).log_softmax(-1)
    theirs = (teacher[:, :-1][counted].float() / temperature).log_softmax(-1)
    total = nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / (counted.sum() if count is None else count)


def layer_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the mean over blocks of ``|student - teacher|^2 / |teacher|^2`` (SquareHead).

    Only tokens of the loss count. The formula is from arXiv 2310.06927.

    :param student, teacher: hidden states ``[batch, length, hidden]`` of the embedding and of every
        block. The embedding is the same in both and is skipped.
    :param labels: ``[batch, length]``, -100 where a token is not in the loss.
    """
    counted = labels != -100
    errors = []
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        expected = theirs[counted].float()
        error = (ours[counted].float() - expected).square().sum()
        errors.append(error / expected.square().sum())
    return torch.stack(errors).mean()


def padding_id(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token id of the padding: the tokenizer's if the embedding has it, or 0."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    pad = tokenizer.pad_token_id
    return pad if pad is not None and 0 <= pad < rows else 0


def has_no_loss(example: Example, config: Adapt) -> bool:
    """Return whether truncation left no token of the example in the loss."""
    masked = config.loss_on == "answer" or example.loss is not None
    return masked and example.has_no_answer


class TrainingFacts(TypedDict):
    """Facts of a training that depend on the machine."""

    precision: str
    device: str
    tokens_per_second: float
    padded_share: float


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    model: model with the trained super-adapter.
    data: items that it was trained on.
    log: one entry per step: loss, learning rate, tokens and ranks.
    held_out: step -> loss on held-out examples; empty without ``adapt.stop``.
    """

    model: nn.Module
    data: Data
    log: list[RankedStepLog]
    facts: TrainingFacts
    held_out: dict[int, float]


def train_on_task(
    recipe: TrainingSections,
    base: Base,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    start: Start,
    elastic: bool,
    teacher: nn.Module | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a new, seeded adapter and write it to ``folder / "adapter"``.

    :param start: ``start(steps) -> advance``, called once per step.
    :param elastic: use the elastic ranks and trainable scales.
    """
    config, data, device = recipe.training, Data(recipe, tokenizer), device_of(recipe.device)
    rows, others = split_rows(_task_rows(recipe, data), config.stop)
    dtype = training_dtype(config.precision, device)
    model = new_adapter(recipe, base, dtype)
    groups, layers = _elastic_groups(model, base, config) if elastic else {}, elastic_layers(model)
    ranks_at = partial(draw_ranks, list(groups), config.ranks, recipe.seed)
    held_out = held_out_of(config, others, layers, groups)
    log, tokens_per_second = train_adapter(
        model,
        rows,
        config,
        recipe.seed,
        padding_id(model, tokenizer),
        folder / "training",
        before_step=lambda step: set_ranks(layers, groups, ranks_at(step)),
        advance=start(config.total_steps(len(rows), process_count())),
        teacher=teacher,
        device=device,
        held_out=held_out,
        callbacks=callbacks,
    )
    _save_trained(model, folder)
    ranked = [RankedStepLog(**e, ranks=ranks_at(_ranks_step(e))) for e in log]
    facts = _facts(log, tokens_per_second, dtype, device)
    return Trained(model, data, ranked, facts, measured_losses(held_out))


def _ranks_step(entry: StepLog) -> int:
    """Return the step whose ranks an entry used: the Trainer logs a step after incrementing it."""
    return int(entry["step"]) - 1


def _save_trained(model: nn.Module, folder: Path) -> None:
    save_adapter(model, folder / "adapter")
    if process_rank() == 0:  # checkpoints are only needed to resume an interrupted run
        shutil.rmtree(folder / "training")


def _task_rows(recipe: TrainingSections, data: Data) -> list[TrainingRow]:
    return training_rows(list(data.train), recipe.training, packed_row_tokens(recipe))


def _elastic_groups(model: nn.Module, base: Base, config: Adapt) -> dict[str, list[str]]:
    """Return the groups that share a rank, and make scales trainable if the recipe says so."""
    if config.trainable_scales:
        train_scales(model)
    return groups_of(model, Checkpoint(base.folder).family, config)


def _facts(
    log: list[StepLog], tokens_per_second: float, dtype: torch.dtype, device: torch.device
) -> TrainingFacts:
    """Return the facts of :class:`Trained`."""
    padded = sum(e["padded"] for e in log)
    return {
        "precision": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "tokens_per_second": tokens_per_second,
        "padded_share": 1 - sum(e["tokens"] for e in log) / padded,
    }


def _arguments(
    config: Adapt, steps: int, seed: int, folder: Path, device: torch.device
) -> TrainingArguments:
    """Return the Trainer's arguments."""
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


def packed_row_tokens(recipe: TrainingSections) -> int | None:
    """Return the largest number of tokens per packed row; None if the task packs no examples."""
    task = recipe.task
    return task.sequence_length if isinstance(task, Chat) and task.packing else None


def training_rows(
    examples: list[Example], config: Adapt, row_tokens: int | None = None
) -> list[TrainingRow]:
    """Return the examples in the format of :func:`collate`, without those that have no loss.

    :param row_tokens: pack examples into rows of at most this many tokens; None: one per row.
    :raises UserError: if no example is left.
    """
    rows: list[TrainingRow] = [
        {
            "input_ids": e.ids,
            "skip": e.skip if config.loss_on == "answer" else 0,
            "loss": e.loss,
        }
        for e in examples
        if not has_no_loss(e, config)
    ]
    if not rows:
        raise UserError("adapt: no training example has a token in the loss")
    return rows if row_tokens is None else pack_rows(rows, row_tokens)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep the Trainer from mixed precision: ``adapt.precision`` decides, not a launcher."""
    before = os.environ.get(MIXED_PRECISION)
    os.environ[MIXED_PRECISION] = "no"
    try:
        yield
    finally:
        os.environ.pop(MIXED_PRECISION, None)
        if before is not None:
            os.environ[MIXED_PRECISION] = before


@_full_precision()
def train_adapter(
    model: nn.Module,
    rows: list[TrainingRow],
    config: Adapt,
    seed: int,
    pad: int,
    folder: Path,
    before_step: Callable[[int], None],
    advance: Advance,
    teacher: nn.Module | None = None,
    device: torch.device = CPU,
    held_out: HeldOut | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[list[StepLog], float]:
    """Train the adapters of ``model`` in place.

    :param rows: result of :func:`training_rows`.
    :param pad: token id of the padding.
    :param folder: folder of training checkpoints; an interrupted training resumes from the newest.
    :param before_step: called with the number of the next optimizer step.
    :param held_out: when to stop earlier, with the best adapter; None: train all steps.
    :return: the log of every step; and tokens per second of this process.
    :raises UserError: if the loss is not finite.
    """
    throughput, collator = Throughput(), partial(collate, pad=pad)
    steps = config.total_steps(len(rows), process_count())
    measured = held_out_callbacks(held_out, collator, folder)
    trainer = _Trainer(
        config,
        teacher,
        throughput,
        model=model,
        args=_arguments(config, steps, seed, folder, device),
        train_dataset=rows,  # type: ignore[arg-type]  # a list serves as a map-style dataset
        data_collator=collator,
        callbacks=[_Callback(before_step, advance, throughput), *measured, *callbacks],
    )
    trainer.train(resume_from_checkpoint=_last_complete_checkpoint(folder))
    restore_best(model.eval(), folder, held_out)
    return _step_logs(trainer.state.log_history), throughput.tokens_per_second


def _step_logs(history: list[dict[str, float]]) -> list[StepLog]:
    """Return the log of every step from the Trainer's log, which has other entries too."""
    return [_step_log(entry) for entry in history if "loss" in entry]


def _step_log(entry: dict[str, float]) -> StepLog:
    """Return the log of a step from an entry of the Trainer's log."""
    return {
        "step": int(entry["step"]),
        "loss": entry["loss"],
        "learning_rate": entry["learning_rate"],
        "tokens": int(entry["tokens"]),
        "padded": int(entry["padded"]),
    }
