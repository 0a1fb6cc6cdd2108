"""search: choose a rank for every group and write that sub-adapter for stock peft.

Scored on items set aside from the training data, never on the test split.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from sqft_export import tasks
from sqft_export.adapters import compressed_layers, elastic_layers, load_adapted, set_ranks
from sqft_export.compressed import GridWriter, load_grids
from sqft_export.errors import UserError
from sqft_export.evaluate import score
from sqft_export.recipe import Recipe
from sqft_export.search import Ranks, Score, Space, strategy
from sqft_export.stages import Context
from sqft_export.stages.adapt import groups_of
from sqft_export.targets.torch import TorchSession

CONSUMES = ("sparsify", "quantize", "adapt")
READS = ("model", "train")
VERSION = 2
RESUMES = True
EVALUATIONS = "evaluations.jsonl"


def options(recipe: Recipe) -> dict:
    return {
        "search": recipe.search.model_dump(),
        "adapt": recipe.adapt.model_dump(),
        "seed": recipe.seed,
    }


def write_sub_adapter(model: PeftModel, folder: Path) -> None:
    """The adapter at its active ranks, as stock peft loads it.

    ``rank_pattern`` and ``alpha_pattern`` carry what each layer's rank and scaling are; the
    scaling stays ``alpha / max_rank``.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in elastic_layers(model).items():
        lora_a, lora_b, scaling = layer.update()
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.detach().contiguous()
        ranks[name], alphas[name] = layer.active_rank, scaling * layer.active_rank
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def _write_trained_grids(context: Context, model: nn.Module) -> None:
    """All grids of the model, with the scales that training ended with."""
    for layer in elastic_layers(model).values():
        layer.settle_scales()
    trained = {name: layer.grid for name, (layer, _) in compressed_layers(model).items()}
    with GridWriter(context.folder) as writer:
        for name, grid in load_grids(context.path("quantize")).items():
            writer.add(name, trained.get(name) or grid)


class _Validation:
    """Scores a configuration on the validation items, and keeps every score on disk."""

    def __init__(self, context: Context, model: nn.Module, groups: dict[str, list[str]]):
        self.context, self.groups, self.layers = context, groups, elastic_layers(model)
        self.session = TorchSession(model)
        self.file = context.folder / EVALUATIONS
        self.tokenizer = tasks.load_tokenizer(context.model)
        self.items = tasks.load(context.recipe, self.tokenizer).validation
        self.questions = tasks.questions(context.recipe, self.items, self.tokenizer)
        self.advance = context.start(context.recipe.search.budget)

    def known(self) -> list[dict[str, Any]]:
        """What was evaluated before, by an interrupted run too; a torn last line is not."""
        lines = self.file.read_text().split("\n")[:-1] if self.file.is_file() else []
        return [json.loads(line) for line in lines]

    def parameters(self, ranks: Ranks) -> int:
        set_ranks(self.layers, self.groups, ranks)
        updates = (layer.update() for layer in self.layers.values())
        return sum(lora_a.numel() + lora_b.numel() for lora_a, lora_b, _ in updates)

    def score(self, ranks: Ranks) -> Score:
        size = self.parameters(ranks)
        recipe = self.context.recipe
        found = score(self.session, self.questions)
        judged = tasks.judge(recipe, self.items, found, self.tokenizer)
        accuracy = tasks.accuracy_of(judged, found)
        scored = Score(accuracy, -math.log(found["perplexity"]), -size)
        entry = {"ranks": ranks, "accuracy": accuracy, "likelihood": scored.likelihood}
        with self.file.open("a") as log:
            log.write(json.dumps(entry | {"parameters": size}) + "\n")
        self.advance()
        return scored


def _given(context: Context, groups: list[str]) -> Ranks:
    """The configuration file of the recipe, checked against the groups there are."""
    recipe = context.recipe
    if recipe.search.configuration is None:
        return {}
    file = recipe.resolve(recipe.search.configuration)
    ranks = json.loads(file.read_text())
    strangers = [g for g in groups if ranks.get(g) not in recipe.adapt.ranks]
    if set(ranks) != set(groups) or strangers:
        raise UserError(
            f"{file}: expected a rank of {list(recipe.adapt.ranks)} for each of {', '.join(groups)}"
        )
    return ranks


def run(context: Context) -> dict:
    """Writes ``configuration.json`` (group -> rank), ``adapter/``, and trained grids if any."""
    started = time.monotonic()
    recipe, adapted = context.recipe, context.inputs["adapt"].path
    model = load_adapted(context.base(), adapted / "adapter", torch.float32)
    groups = groups_of(context, model)
    log = [json.loads(line) for line in (adapted / "training.jsonl").read_text().splitlines()]
    space = Space(
        list(groups),
        tuple(sorted(recipe.adapt.ranks, reverse=True)),
        log,
        recipe.search.budget,
        recipe.seed,
        _given(context, list(groups)),
        lambda ranks: Score(0, 0, 0),
    )
    evaluations: list[dict[str, Any]] = []
    if recipe.search.evaluates and groups:
        validation = _Validation(context, model, groups)
        for entry in validation.known():
            known = Score(entry["accuracy"], entry["likelihood"], -entry["parameters"])
            space.seen[space.key(entry["ranks"])] = known
        space.score = validation.score
        chosen = strategy(recipe.search.strategy).search(space)
        evaluations = validation.known()
    else:
        chosen = strategy(recipe.search.strategy).search(space) if groups else {}
    set_ranks(elastic_layers(model), groups, chosen)
    (context.folder / "configuration.json").write_text(json.dumps(chosen, indent=2) + "\n")
    write_sub_adapter(model, context.folder / "adapter")
    if recipe.adapt.trainable_scales:
        _write_trained_grids(context, model)
    return {
        "evaluations": len(evaluations),
        "seconds": time.monotonic() - started,
        "front": [{k: v for k, v in e.items() if k != "ranks"} for e in evaluations],
        "ranks": chosen,
    }
