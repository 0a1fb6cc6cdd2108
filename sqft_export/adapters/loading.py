"""Load a base with :class:`CompressedLinear` layers: one layer, or a model with adapters."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from sqft_export.adapters.elastic import train_scales
from sqft_export.adapters.files import AdapterConfig, AdapterFiles, Base
from sqft_export.adapters.linear import PEFT_NAME, CompressedLinear, ElasticLoraLinear, Update
from sqft_export.errors import UserError
from sqft_export.libraries.peft import register_adapter
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import adapted
from sqft_export.model.floats import load_model
from sqft_export.model.storage import MASKS, load_grids, load_mask_bits, read_quantized
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.numerics.affine import (
    dequantize,
    fake_quantize_rows,
)
from sqft_export.recipe.sections import TrainingSections


class Layers:
    """Reads the decoder Linears of a base and their adapter updates, one at a time.

    :param adapter: folder in peft's format; None adds nothing.
    """

    def __init__(self, base: Base, adapter: Path | None = None):
        self.checkpoint, self.unmerged = Checkpoint(base.folder), base.unmerged
        self.names, self.quantized_linears = (
            list(self.checkpoint.linears),
            set(self.checkpoint.quantized_linears),
        )
        self.grids = load_grids(base.grids)
        self.masks = TensorFiles(base.masks, MASKS) if base.masks else None
        self.adapter = AdapterFiles(adapter) if adapter and not self.unmerged else None
        self.adapted = set(self.adapter.linears) if self.adapter else set()

    def layer(self, name: str) -> tuple[CompressedLinear, Update | None]:
        """Return the Linear without its bias, and the update of its weight or None."""
        if name in self.quantized_linears:
            weight = dequantize(*read_quantized(self.checkpoint, name))
        else:
            weight = self.checkpoint.tensor(f"{name}.weight")
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bits = self.masks.tensor(name) if self.masks and name in self.masks.headers else None
        layer = CompressedLinear.from_linear(linear, bits, self.grids.get(name), self.unmerged)
        update = self.adapter.update(name) if self.adapter and name in self.adapted else None
        return layer, update


def load_compressed(base: Base, dtype: torch.dtype) -> nn.Module:
    """Return a model whose decoder Linears are :class:`CompressedLinear`.

    The Linears keep the checkpoint's dtype. All other parameters are in ``dtype``, the dtype of
    activations.
    """
    checkpoint = Checkpoint(base.folder)
    linears = checkpoint.linears
    # Weights stay mapped from their files, in the stored dtype, until they are used.
    model = load_model(checkpoint, None)
    mask_bits = load_mask_bits(base.masks)
    grid_of = load_grids(base.grids)
    for name in linears:
        parent, _, child = name.rpartition(".")
        linear = CompressedLinear.from_linear(
            model.get_submodule(name), mask_bits.get(name), grid_of.get(name), base.unmerged
        )
        setattr(model.get_submodule(parent), child, linear)
    for name in grid_of.keys() - linears.keys():  # embedding and head are quantized, not trained
        weight = model.get_submodule(name).weight
        weight.data = fake_quantize_rows(weight.data, grid_of[name])
    for module in model.modules():
        if not isinstance(module, CompressedLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.requires_grad_(False)


def add_adapters(
    model: nn.Module, target_modules: tuple[str, ...], rank: int, alpha: float, dropout: float
) -> PeftModel:
    """Put an :class:`ElasticLoraLinear` on every target, through peft's custom-module hook.

    :raises UserError: naming the target modules that match no Linear.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, CompressedLinear)]
    ends = {name.rsplit(".", 1)[1] for name in names}
    if unknown := sorted(set(target_modules) - ends):
        raise UserError(
            f"adapt.target_modules: found {', '.join(unknown)}, which is the name of no decoder "
            f"Linear; allowed are {', '.join(sorted(ends))}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[n for n in names if n.rsplit(".", 1)[1] in target_modules],
        bias="none",
        task_type="CAUSAL_LM",
    )
    register_adapter(config, CompressedLinear, ElasticLoraLinear)
    return _store_effective_weights(get_peft_model(model, config))


def _store_effective_weights(model: PeftModel) -> PeftModel:
    """Store the effective weights of all Linears that no adapter changes; return the model."""
    for name, module in model.named_modules():
        adapted = name.endswith(".base_layer")
        if isinstance(module, CompressedLinear) and (module.unmerged or not adapted):
            module.store_effective_weight(model.config.dtype)
    return model


def load_adapted(base: Base, adapter: Path, dtype: torch.dtype) -> nn.Module:
    """Load a base with an adapter folder that adapt or search wrote."""
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = False
    register_adapter(config, CompressedLinear, ElasticLoraLinear)
    adapted = _store_effective_weights(get_peft_model(load_compressed(base, dtype), config))
    state = load_file(adapter / "adapter_model.safetensors")
    if any(".lora_shift" in name for name in state):
        train_scales(adapted)
    outcome = set_peft_model_state_dict(adapted, state, adapter_name=PEFT_NAME)
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    return adapted.eval()


def new_adapter(recipe: TrainingSections, base: Base, dtype: torch.dtype) -> PeftModel:
    """Return a model with a new, seeded super-adapter; activations in ``dtype``."""
    config = recipe.training
    model = load_compressed(base, dtype)
    torch.manual_seed(recipe.seed)
    family = Checkpoint(base.folder).family
    targets, _ = adapted(family, config.target_modules, config.elastic_groups)
    return add_adapters(model, targets, config.max_rank, config.alpha, config.dropout)


def peft_config(model: nn.Module) -> AdapterConfig:
    """Return the adapter's config as peft writes it."""
    return model.peft_config[PEFT_NAME].to_dict()  # type: ignore[union-attr, operator, index]
