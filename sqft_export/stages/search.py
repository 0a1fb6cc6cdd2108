"""search: choose a rank for every group and write that sub-adapter for stock peft.

Candidates are scored on items held out from the training data, never on the test split.
"""

import json
import math
import time
from typing import Protocol

import torch
from torch import nn

from sqft_export.adapters.elastic import (
    cache_effective_weights,
    compressed_layers,
    drop_effective_weights,
    elastic_layers,
    groups_of,
    set_ranks,
)
from sqft_export.adapters.evidence import CAPTURED_SEQUENCES, CapturedForward, capture
from sqft_export.adapters.files import read_training_log, write_sub_adapter
from sqft_export.adapters.loading import load_adapted, peft_config
from sqft_export.data.items import (
    SCORE_FIELDS,
    SCORE_FILES,
    TASK_FILES,
    TRAIN_FIELDS,
    Data,
    answer_stops,
    load_tokenizer,
)
from sqft_export.data.scoring import accuracy_of, judge, questions
from sqft_export.documents import Document
from sqft_export.machine.device import device_name, device_of
from sqft_export.machine.launcher import process_rank
from sqft_export.machine.processes import Processes, join_processes
from sqft_export.measure.likelihood import score
from sqft_export.metrics import EvaluatedSize, SearchMetrics
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import GridWriter, load_grids
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import SearchSection, TrainingSections
from sqft_export.search import STRATEGIES
from sqft_export.search.space import Ranks, Score, Space
from sqft_export.stages import BASE_FIELDS, Context
from sqft_export.targets.folder import context_of
from sqft_export.targets.torch import TorchSession
from sqft_export.textfiles import read_json

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct", "quantize", "adapt")
READS: tuple[str, ...] = ("model", "train", "device", "configuration", "score")
SETTINGS = (
    *("search.strategy", "adapt.ranks", "adapt.elastic", "adapt.elastic_groups"),
    *("adapt.target_modules", *BASE_FIELDS),
)
FREE: tuple[str, ...] = ("device", "search.configuration", *TASK_FILES, *SCORE_FILES)
VERSION = 4
RESUMES = True
DISTRIBUTED = True
EVALUATIONS = "evaluations.jsonl"


class Sections(TrainingSections, SearchSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the settings, and the scoring fields if the strategy evaluates candidates."""
    scored = ("search.budget", *SCORE_FIELDS)
    return (*SETTINGS, *TRAIN_FIELDS, *(scored if recipe.search.evaluates else ()))


def _write_trained_grids(context: Context[Sections], model: nn.Module) -> None:
    """Write all grids of the model with the trained scales."""
    for layer in elastic_layers(model).values():
        layer.apply_trained_scales()
    trained = {name: layer.grid for name, (layer, _) in compressed_layers(model).items()}
    with GridWriter(context.folder) as writer:
        for name, grid in load_grids(context.path("quantize")).items():
            writer.add(name, trained.get(name) or grid)


class Evaluation(Document):
    """One line of ``evaluations.jsonl``: a configuration of ranks and its score."""

    ranks: Ranks
    accuracy: float
    likelihood: float
    parameters: int

    @property
    def score(self) -> Score:
        """The score that strategies compare."""
        return Score(self.accuracy, self.likelihood, -self.parameters)

    def size(self) -> EvaluatedSize:
        """Return the evaluation without its ranks."""
        return EvaluatedSize(**self.model_dump(exclude={"ranks"}))

    def line(self) -> str:
        """Return the line of the file."""
        return json.dumps(self.to_json()) + "\n"


class _Validation:
    """Scores configurations on the validation items and writes every score to disk."""

    def __init__(
        self,
        context: Context[Sections],
        model: nn.Module,
        groups: dict[str, list[str]],
        processes: Processes,
    ):
        self.context, self.groups, self.layers = context, groups, elastic_layers(model)
        self.processes = processes
        self.session = TorchSession(model, str(next(model.parameters()).device))
        self.file = context.folder / EVALUATIONS
        self.tokenizer = load_tokenizer(context.model)
        self.items = Data(context.recipe, self.tokenizer).validation
        stop = answer_stops(context.recipe, context.model, self.tokenizer)
        self.questions = questions(
            context.recipe, self.items, stop, self.tokenizer, context_of(context.model)
        )
        self.advance = context.start(context.recipe.search.budget)
        self.known: list[Evaluation] = processes.from_first(self._read)
        if processes.is_first:
            # Without the partial line that an interrupted run may have left.
            self.file.write_text("".join(entry.line() for entry in self.known))

    def _read(self) -> list[Evaluation]:
        """Return the evaluations of an interrupted run; skip a partial line."""
        lines = self.file.read_text().split("\n") if self.file.is_file() else []
        return [entry for line in lines if (entry := _evaluation(line))]

    def parameters(self, ranks: Ranks) -> int:
        """Set the ranks and return the number of adapter parameters."""
        set_ranks(self.layers, self.groups, ranks)
        updates = (layer.update() for layer in self.layers.values())
        return sum(lora_a.numel() + lora_b.numel() for lora_a, lora_b, _ in updates)

    def score(self, ranks: Ranks) -> Score:
        """Score a configuration and append the result to the file."""
        size = self.parameters(ranks)
        recipe = self.context.recipe
        found = score(self.session, self.questions, self.processes)
        judged = judge(recipe, self.items, found, self.tokenizer)
        accuracy = accuracy_of(judged, found)
        likelihood = -math.log(found.perplexity)
        entry = Evaluation(ranks=ranks, accuracy=accuracy, likelihood=likelihood, parameters=size)
        self.known.append(entry)
        if self.processes.is_first:
            with self.file.open("a") as log:
                log.write(entry.line())
        self.advance()
        return entry.score


def _evaluation(line: str) -> Evaluation | None:
    """Parse one line of the file; return None if it is incomplete."""
    try:
        return Evaluation.model_validate_json(line)
    except ValueError:
        return None


def configured_ranks(recipe: Sections) -> Ranks:
    """Return the ranks of ``search.configuration``, checked by ``plan``; empty without it."""
    file = recipe.search.configuration
    return read_json(recipe.resolve(file), finite=True) if file else {}


def _choose_ranks(
    context: Context[Sections],
    model: nn.Module,
    groups: dict[str, list[str]],
    processes: Processes,
) -> tuple[Ranks, list[Evaluation]]:
    """Return the rank of every group, and all evaluations."""
    recipe = context.recipe
    space = Space(
        list(groups),
        tuple(sorted(recipe.training.ranks, reverse=True)),
        read_training_log(context.inputs["adapt"].path),
        recipe.search.budget if recipe.search.evaluates else 0,
        recipe.seed,
        configured_ranks(recipe),
        lambda ranks: Score(0, 0, 0),
    )
    if not groups:
        return {}, []
    search = STRATEGIES[recipe.search.strategy]
    if not recipe.search.evaluates:
        return search(space), []
    validation = _Validation(context, model, groups, processes)
    for entry in validation.known:
        space.seen[space.key(entry.ranks)] = entry.score
    space.score = validation.score
    cache_effective_weights(model)
    chosen = search(space)
    drop_effective_weights(model)
    return chosen, validation.known


def _capture(context: Context[Sections], model: nn.Module) -> CapturedForward:
    """Capture the operands of the chosen sub-adapter's forward, for ``verify``."""
    examples = Data(context.recipe, load_tokenizer(context.model)).train[:CAPTURED_SEQUENCES]
    return capture(model, [example.ids for example in examples], context.path("sparsify"))


def run(context: Context[Sections]) -> SearchMetrics:
    """Write ``configuration.json`` (group -> rank), ``adapter/`` and the captured forward.

    The captured forward is in ``trained.*``. Trainable scales add ``grids.safetensors``.
    """
    splits = context.recipe.search.evaluates
    if process_rank() and not splits:
        return SearchMetrics(evaluations=0, seconds=0.0, front=[], ranks={}, device="")
    with join_processes(context.folder.name.partition(".")[0], splits) as processes:
        return _run(context, processes)


def _run(context: Context[Sections], processes: Processes) -> SearchMetrics:
    started = time.monotonic()
    adapted = context.inputs["adapt"].path / "adapter"
    device = device_of(context.recipe.device)
    model = load_adapted(context.base(), adapted, torch.float32).to(device)
    groups = groups_of(model, Checkpoint(context.model).family, context.recipe.training)
    chosen, evaluations = _choose_ranks(context, model, groups, processes)
    if processes.is_first:
        _write(context, model, groups, chosen)
    return SearchMetrics(
        evaluations=len(evaluations),
        seconds=time.monotonic() - started,
        front=[entry.size() for entry in evaluations],
        ranks=chosen,
        device=device_name(device),
    )


def _write(
    context: Context[Sections], model: nn.Module, groups: dict[str, list[str]], chosen: Ranks
) -> None:
    """Write the chosen sub-adapter, and what ``verify`` and ``merge`` read."""
    model.cpu()  # merge runs there; another device may round B A differently
    layers = elastic_layers(model)
    set_ranks(layers, groups, chosen)
    (context.folder / "configuration.json").write_text(json.dumps(chosen, indent=2) + "\n")
    updates = {name: layer.update() for name, layer in layers.items()}
    write_sub_adapter(peft_config(model), updates, context.folder / "adapter")
    _capture(context, model).write(context.folder)
    if context.recipe.training.trainable_scales:
        _write_trained_grids(context, model)
