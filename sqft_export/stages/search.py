"""search: choose a rank for every group and write that sub-adapter for stock peft."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from sqft_export.adapters import elastic_layers, load_adapted, set_ranks
from sqft_export.recipe import Recipe
from sqft_export.search import strategy
from sqft_export.stages import Context
from sqft_export.stages.adapt import groups_of

CONSUMES = ("sparsify", "quantize", "adapt")
READS = ()
VERSION = 1


def options(recipe: Recipe) -> dict:
    return {"search": recipe.search.model_dump(), "adapt": recipe.adapt.model_dump()}


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


def run(context: Context) -> dict:
    """Writes ``configuration.json`` (group -> rank) and ``adapter/``."""
    adapter = context.inputs["adapt"].path / "adapter"
    model = load_adapted(*context.base(), adapter, torch.float32)
    groups = groups_of(context, model)
    chosen = strategy(context.recipe.search.strategy).choose(
        list(groups), context.recipe.adapt.ranks
    )
    set_ranks(elastic_layers(model), groups, chosen)
    (context.folder / "configuration.json").write_text(json.dumps(chosen, indent=2) + "\n")
    write_sub_adapter(model, context.folder / "adapter")
    return {"evaluations": 0, "ranks": chosen}
