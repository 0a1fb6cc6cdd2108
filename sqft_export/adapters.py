"""The layer that replaces Linear: mask, elastic rank, fake quantization.

    W_eff = FQ( W_base + M * (B[:, :r] A[:r, :]) * alpha / max_rank )

is the only definition of the effective weight. Without a grid FQ is the identity; without
SparsePEFT M is all True. Forward uses it, merge stores it, in float32 and in one order of
operations, whatever dtype the base weight is stored in: the codes a model was trained with are
the codes that are written.

Backward recomputes the effective weight instead of keeping it: what stays alive between forward
and backward is the input, the base weight in its own dtype and one mask bit per weight. The
gradient passes FQ straight through, and is zero where the code is clamped or the weight pruned.
Trainable scales are ``s * exp(d)`` rounded to float16 as they will be stored, with
``dW_eff / dd = W_eff - W * inside`` (the step size gradient of LSQ, arXiv 1902.08153, per relative
step).

Two of the four pipelines keep the adapter apart: ``y = x FQ(W_base)^T + dropout(x) (B A)^T *
alpha / max_rank``, plain LoRA beside a sparse or quantized base, never merged.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sqft_export.checkpoint import Checkpoint
from sqft_export.compressed import (
    MASKS,
    load_float_model,
    load_grids,
    load_packed_masks,
    read_quantized,
)
from sqft_export.errors import UserError
from sqft_export.machine import process_rank
from sqft_export.numerics.affine import (
    Grid,
    dequantize,
    fake_quantize,
    fake_quantize_inside,
    grouped,
    quantize,
)
from sqft_export.numerics.masks import unpack_mask
from sqft_export.tensorfiles import TensorFiles

ADAPTER = "default"
Update = tuple[Tensor, Tensor, float]  # A [rank, in], B [out, rank], alpha / max_rank


class CompressedLinear(nn.Linear):
    """A frozen Linear with its mask bits and grid.

    weight: ``[out, in]`` in the checkpoint's dtype.
    mask_bits: uint8 ``[out, ceil(in / 8)]``, or None: nothing is pruned or masked.
    grid: or None: the weight is used as it is.
    apart: an adapter on it works beside it.
    """

    mask_bits: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask_bits: Tensor | None,
        grid: Grid | None,
        apart: bool = False,
    ) -> "CompressedLinear":
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.register_buffer("mask_bits", mask_bits, persistent=False)
        new.register_buffer("scale", grid.scale if grid else None, persistent=False)
        new.register_buffer("zero_point", grid.zero_point if grid else None, persistent=False)
        new.bits, new.apart = grid.bits if grid else None, apart
        return new.requires_grad_(False)

    @property
    def grid(self) -> Grid | None:
        return self.grid_at(None)

    def grid_at(self, shift: Tensor | None) -> Grid | None:
        """The grid, its scales moved by ``exp(shift)`` and rounded as they are stored.

        :param shift: float32 ``[out, groups]``, or None.
        """
        if self.scale is None:
            return None
        scale = self.scale if shift is None else (self.scale.float() * shift.exp()).half()
        return Grid(scale, self.zero_point, self.bits, self.in_features // scale.shape[1])

    def adapted_weight(self, update: Update | None) -> Tensor:
        """``W + M * (B A) * scaling`` in float32, before the grid."""
        weight = self.weight.float()
        if update is None:
            return weight
        lora_a, lora_b, scaling = update
        # Contiguous, so that a slice of the super-adapter and its extracted copy take the same
        # path through the matrix product, to the last bit.
        delta = (lora_b.float().contiguous() @ lora_a.float().contiguous()).mul_(scaling)
        if self.mask_bits is not None:
            delta.mul_(unpack_mask(self.mask_bits, self.in_features))
        return delta.add_(weight)

    def codes(self, update: Update | None) -> Tensor:
        """Codes uint8 ``[out, in]`` of the effective weight; only with a grid."""
        assert self.grid is not None
        return quantize(self.adapted_weight(update), self.grid)

    def effective_weight(self, update: Update | None, shift: Tensor | None = None) -> Tensor:
        """float32 ``[out, in]``."""
        adapted, grid = self.adapted_weight(update), self.grid_at(shift)
        return fake_quantize(adapted, grid) if grid else adapted

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(nn.functional.linear(x, self.effective_weight(None).to(x.dtype)))

    def with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Adapted(torch.autograd.Function):
    """``x W_eff^T``; W_eff is made in forward and again in backward, never kept."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, shift, layer: CompressedLinear, scaling: float):
        ctx.save_for_backward(x, lora_a, lora_b, shift)
        ctx.layer, ctx.scaling = layer, scaling
        weight = layer.effective_weight((lora_a, lora_b, scaling), shift)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, lora_a, lora_b, shift = ctx.saved_tensors
        layer: CompressedLinear = ctx.layer
        adapted, grid = layer.adapted_weight((lora_a, lora_b, ctx.scaling)), layer.grid_at(shift)
        effective, unclamped = fake_quantize_inside(adapted, grid) if grid else (adapted, None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ effective.to(gradient.dtype)
        grad_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        grad_shift = None
        if grid:
            if shift is not None:
                moved = grad_weight * (effective - adapted * unclamped)
                grad_shift = grouped(moved, grid.group_size).sum(dim=2)
            grad_weight.mul_(unclamped)
        if layer.mask_bits is not None:
            grad_weight.mul_(unpack_mask(layer.mask_bits, layer.in_features))
        grad_a = ((lora_b.float() * ctx.scaling).T @ grad_weight).to(lora_a.dtype)
        grad_b = (grad_weight @ (lora_a.float() * ctx.scaling).T).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, grad_shift, None, None


class ElasticLoraLinear(PeftLinear):
    """peft's LoRA layer over a :class:`CompressedLinear`, at an active rank.

    ``active_rank`` is set from outside (the trainer before a step, search before an evaluation);
    nothing here changes it. The scaling stays ``alpha / max_rank`` at every rank.
    """

    def __init__(self, base_layer, adapter_name: str, **kwargs):
        super().__init__(base_layer, adapter_name, **kwargs)
        self.active_rank: int = self.r[adapter_name]
        # peft saves and loads whatever is called lora_ and keyed by the adapter's name.
        self.lora_shift = nn.ParameterDict()

    def train_scales(self) -> None:
        """Let the scales of the base's grid move; to be called before training or loading."""
        scale = self.get_base_layer().scale
        self.lora_shift[ADAPTER] = nn.Parameter(torch.zeros(scale.shape, device=scale.device))

    @torch.no_grad()
    def settle_scales(self) -> None:
        """Make the trained scales those of the base."""
        if ADAPTER in self.lora_shift:
            base = self.get_base_layer()
            base.scale = base.grid_at(self.lora_shift.pop(ADAPTER)).scale

    def update(self) -> Update:
        """``A [rank, in]``, ``B [out, rank]`` at the active rank, and the scaling."""
        lora_a = self.lora_A[ADAPTER].weight[: self.active_rank]
        lora_b = self.lora_B[ADAPTER].weight[:, : self.active_rank]
        return lora_a, lora_b, self.scaling[ADAPTER]

    def forward(self, x: Tensor) -> Tensor:
        base, dropout = self.get_base_layer(), self.lora_dropout[ADAPTER]
        lora_a, lora_b, scaling = self.update()
        if base.apart:
            low = nn.functional.linear(dropout(x), lora_a.to(x.dtype))
            return base(x) + nn.functional.linear(low, lora_b.to(x.dtype)) * scaling
        # Dropout acts on the adapter alone: whole input columns of A, the same for all tokens of
        # a step, since the update is one matrix that goes through the grid.
        lora_a = lora_a * dropout(lora_a.new_ones(self.in_features))
        shift = self.lora_shift.get(ADAPTER, None)
        return base.with_bias(_Adapted.apply(x, lora_a, lora_b, shift, base, scaling))


@dataclass(frozen=True)
class Base:
    """What an adapter is trained on.

    folder: Hugging Face folder.
    masks, grids: folders with the masks that an update is kept in and the grids; None without.
    apart: the adapter stays beside the base instead of entering its weight.
    """

    folder: Path
    masks: Path | None = None
    grids: Path | None = None
    apart: bool = False


class Layers:
    """The decoder Linears of a base and what an adapter adds to each, read one at a time.

    :param adapter: folder in peft's format; None: nothing is added.
    """

    def __init__(self, base: Base, adapter: Path | None = None):
        self.checkpoint, self.apart = Checkpoint(base.folder), base.apart
        self.names, self.packed = list(self.checkpoint.linears), set(self.checkpoint.packed)
        self.grids = load_grids(base.grids)
        self.masks = TensorFiles(base.masks, MASKS) if base.masks else None
        self.adapter = TensorFiles(adapter, "adapter_model") if adapter else None
        self.config = LoraConfig.from_pretrained(adapter) if adapter else None

    def layer(self, name: str) -> tuple[CompressedLinear, Update | None]:
        """The Linear without its bias, and the update that enters its weight, if any."""
        if name in self.packed:
            weight = dequantize(*read_quantized(self.checkpoint, name))
        else:
            weight = self.checkpoint.tensor(f"{name}.weight")
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bits = self.masks.tensor(name) if self.masks and name in self.masks.headers else None
        layer = CompressedLinear.from_linear(linear, bits, self.grids.get(name), self.apart)
        return layer, self._update(name)

    def _update(self, name: str) -> Update | None:
        prefix = f"base_model.model.{name}"
        if self.adapter is None or self.config is None or self.apart:
            return None
        if f"{prefix}.lora_A.weight" not in self.adapter.headers:
            return None
        lora_a, lora_b = (self.adapter.tensor(f"{prefix}.lora_{x}.weight") for x in "AB")
        alpha = self.config.alpha_pattern.get(name, self.config.lora_alpha)
        return lora_a, lora_b, alpha / len(lora_a)


def load_compressed(base: Base, dtype: torch.dtype) -> nn.Module:
    """A model whose decoder Linears are :class:`CompressedLinear`.

    The Linears keep the checkpoint's dtype; all else is in ``dtype``, the dtype of activations.
    """
    checkpoint = Checkpoint(base.folder)
    linears = checkpoint.linears
    if checkpoint.packed:
        model = load_float_model(base.folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype="auto", attn_implementation=checkpoint.family.attention
        ).eval()
    mask_bits = load_packed_masks(base.masks)
    grid_of = load_grids(base.grids)
    for name in linears:
        parent, _, child = name.rpartition(".")
        linear = CompressedLinear.from_linear(
            model.get_submodule(name), mask_bits.get(name), grid_of.get(name), base.apart
        )
        setattr(model.get_submodule(parent), child, linear)
    for name in grid_of.keys() - linears.keys():  # embedding and head: not trained, only rounded
        weight = model.get_submodule(name).weight
        weight.data = fake_quantize(weight.data, grid_of[name])
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
    if strangers := sorted(set(target_modules) - ends):
        raise UserError(
            f"adapt.target_modules: found {', '.join(strangers)}, which no decoder Linear is "
            f"called; allowed are {', '.join(sorted(ends))}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=[n for n in names if n.rsplit(".", 1)[1] in target_modules],
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({CompressedLinear: ElasticLoraLinear})
    return get_peft_model(model, config)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in peft's format, from the first process of a launcher.

    To be called on all of them: parameters that FSDP (its second version) has spread over the
    processes are gathered here.
    """
    whole = {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if process_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)


def load_adapted(base: Base, adapter: Path, dtype: torch.dtype) -> nn.Module:
    """A trained model: its base and an adapter folder written by adapt or search."""
    config = LoraConfig.from_pretrained(adapter)
    config.inference_mode = False
    config._register_custom_module({CompressedLinear: ElasticLoraLinear})
    adapted = get_peft_model(load_compressed(base, dtype), config)
    state = load_file(adapter / "adapter_model.safetensors")
    if any(".lora_shift" in name for name in state):
        train_scales(adapted)
    outcome = set_peft_model_state_dict(adapted, state, adapter_name=ADAPTER)
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    return adapted.eval()


def train_scales(model: nn.Module) -> None:
    """Give every adapted layer on a grid scales that move."""
    for layer in elastic_layers(model).values():
        layer.train_scales()


def elastic_layers(model: nn.Module) -> dict[str, ElasticLoraLinear]:
    """Name in the base model -> adapted layer."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ElasticLoraLinear)
    }


def rank_groups(
    layers: dict[str, ElasticLoraLinear], blocks: str, groups: tuple[tuple[str, ...], ...]
) -> dict[str, list[str]]:
    """Group name, such as ``3.q_proj,k_proj`` -> layers that share one rank, in block order."""
    grouped: dict[str, list[str]] = {}
    for name in layers:
        block, _, path = name.removeprefix(f"{blocks}.").partition(".")
        for group in groups:
            if path.rsplit(".", 1)[-1] in group:
                grouped.setdefault(f"{block}.{','.join(group)}", []).append(name)
    return grouped


def set_ranks(
    layers: dict[str, ElasticLoraLinear], groups: dict[str, list[str]], ranks: dict[str, int]
) -> None:
    """Set the active rank of every group; layers in no group keep the highest."""
    for group, names in groups.items():
        for name in names:
            layers[name].active_rank = ranks[group]


def compressed_layers(model: nn.Module) -> dict[str, tuple[CompressedLinear, Update | None]]:
    """Name in the base model -> the base Linear and the update that enters its weight, if any."""
    found: dict[str, tuple[CompressedLinear, Update | None]] = {}
    adapted = elastic_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            merges = name in adapted and not module.apart
            found[name] = (module, adapted[name].update() if merges else None)
    return found
