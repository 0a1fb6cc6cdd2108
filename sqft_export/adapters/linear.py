"""The layer that replaces Linear: mask, elastic rank, fake quantization.

    W_eff = FQ( W_base + M * (B[:, :r] A[:r, :]) * alpha / max_rank )

is the only definition of the effective weight. FQ is fake quantization, the identity without a
grid. M is the pruning mask, all True without SparsePEFT. Forward computes with this weight, and
merge stores it. Both compute in float32, in this order of operations, for every dtype of the base
weight. A model is therefore stored with the codes that it was trained with.

Backward recomputes the effective weight instead of keeping it. Between forward and backward the
input, the base weight in its own dtype, one mask bit per weight, the adapter and the grid are in
memory. The gradient passes FQ unchanged (straight-through). It is zero where the code is clamped or
the weight pruned. Trainable scales are ``s * exp(d)``, rounded to float16 as in the stored model.
With ``W`` the input of FQ and ``inside`` 1 where the code is not clamped, else 0, their gradient is
``dW_eff / dd = W_eff - W * inside``. This is the step size gradient of LSQ (arXiv 1902.08153) times
the step.

Two of the four pipelines leave the adapter unmerged. This is plain LoRA on a sparse or quantized
base: ``y = x FQ(W_base)^T + dropout(x) (B A)^T * alpha / max_rank``.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from sqft_export.libraries.torch import MovableLinear, version_of
from sqft_export.numerics import fused
from sqft_export.numerics.affine import quantize, shift_scales, split_groups, widen_to_4_bits
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.numerics.gptq_layout import to_gptq

PEFT_NAME = "default"
Update = tuple[Tensor, Tensor, float]  # A [rank, in], B [out, rank], alpha / max_rank


def product(update: Update | None) -> Tensor | None:
    """Return ``B A``, float32 ``[out, in]``, in new memory; None without an update."""
    if update is None:
        return None
    lora_a, lora_b, _ = update
    # Contiguous copies give a slice of the super-adapter and its extracted copy the same bits:
    # the matrix product depends on strides.
    return lora_b.float().contiguous() @ lora_a.float().contiguous()


class Merged(NamedTuple):
    """A merged Linear as files store it.

    tensors: suffix of the tensor's name, such as ``qweight`` -> tensor.
    zeros: number of weights that are zero.
    grid: grid of the stored codes; None if the weight is stored as floats.
    """

    tensors: dict[str, Tensor]
    zeros: int
    grid: Grid | None


class WeightCache:
    """Caches the last effective weight of a layer until one of its source tensors changes.

    A tensor is unchanged if it has the same address and the same version; torch raises the version
    at every change in place. The cache keeps references to the source tensors, so that no new
    tensor can get their addresses.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop the weight and the references to its source tensors."""
        self.key: object = None
        self.held: list[Tensor] = []
        self.weight: Tensor | None = None

    def get(
        self,
        sources: Iterable[Tensor | None],
        facts: tuple[object, ...],
        make: Callable[[], Tensor],
    ) -> Tensor:
        """Return the cached weight; call ``make`` first if a source or a fact has changed.

        :param sources: tensors that the weight is computed from.
        :param facts: other values that it depends on: dtype and scaling.
        """
        tensors = [None if source is None else source.detach() for source in sources]
        key = facts, [t if t is None else (t.data_ptr(), version_of(t), t.shape) for t in tensors]
        if self.weight is None or key != self.key:
            self.clear()  # before make, so that only one weight is in memory
            self.weight = make()
            self.key, self.held = key, [t for t in tensors if t is not None]
        return self.weight


class CompressedLinear(MovableLinear):
    """A frozen Linear with its mask bits and grid.

    weight: ``[out, in]`` in the checkpoint's dtype.
    mask_bits: uint8 ``[out, ceil(in / 8)]``; None if nothing is pruned or masked.
    scale, zero_point, bits: the grid; None if the weight is not quantized.
    unmerged: True if the adapter's output is added to this layer's output.
    holds_effective: True if ``weight`` has been replaced by the effective weight permanently.
    cache: the last effective weight, for forwards without gradient; None: they compute it again.
    """

    cache: WeightCache | None
    mask_bits: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask_bits: Tensor | None,
        grid: Grid | None,
        unmerged: bool = False,
    ) -> "CompressedLinear":
        """Return a frozen layer with the weight and bias of ``linear``; nothing is copied."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.register_buffer("mask_bits", mask_bits, persistent=False)
        new.register_buffer("scale", grid.scale if grid else None, persistent=False)
        new.register_buffer("zero_point", grid.zero_point if grid else None, persistent=False)
        new.bits, new.unmerged = grid.bits if grid else None, unmerged
        new.holds_effective, new.cache = False, None
        return new.requires_grad_(False)

    @property
    def grid(self) -> Grid | None:
        """The stored grid, or None if the weight is not quantized."""
        return self.shifted_grid(None)

    def shifted_grid(self, shift: Tensor | None) -> Grid | None:
        """Return the grid with its scales multiplied by ``exp(shift)`` and rounded to float16.

        :param shift: float32 ``[out, groups]``; None returns the stored grid.
        """
        if self.scale is None:
            return None
        group_size = self.in_features // self.scale.shape[1]
        grid = Grid(self.scale, self.zero_point, self.bits, group_size)
        return grid if shift is None else shift_scales(grid, shift)

    def frozen_part(self, shift: Tensor | None) -> fused.Frozen:
        """Return weight, mask and grid, with the scales shifted by ``shift``."""
        return fused.Frozen(self.weight, self.mask_bits, self.shifted_grid(shift))

    def codes(self, update: Update | None) -> Tensor:
        """Return the codes of the effective weight, uint8 ``[out, in]``; needs a grid."""
        assert self.grid is not None
        base, scaling = self.frozen_part(None), update[2] if update else 0.0
        return quantize(fused.adapted_weight(base, product(update), scaling), self.grid)

    def effective_weight(
        self,
        update: Update | None,
        shift: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the effective weight ``[out, in]`` in ``dtype``, computed in float32."""
        scaling = update[2] if update else 0.0
        return fused.effective_weight(self.frozen_part(shift), product(update), scaling, dtype)

    @property
    def uses_cache(self) -> bool:
        """True if a forward takes its weight from the cache; never in training."""
        return self.cache is not None and not self.training and not torch.is_grad_enabled()

    def cached_weight(
        self, update: Update | None, shift: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Return :meth:`effective_weight` from the cache, computed again only after a change."""
        assert self.cache is not None
        lora_a, lora_b, scaling = update or (None, None, 0.0)
        base = (self.weight, self.mask_bits, self.scale, self.zero_point)
        return self.cache.get(
            (*base, lora_a, lora_b, shift),
            (dtype, scaling),
            lambda: self.effective_weight(update, shift, dtype),
        )

    def before_move(self) -> None:
        if self.cache is not None:
            self.cache.clear()

    @torch.no_grad()
    def store_effective_weight(self, dtype: torch.dtype) -> None:
        """Replace the weight by the effective weight; only for a layer that no adapter changes.

        Does nothing without a grid, or if ``dtype`` needs more memory than the stored weight.

        :param dtype: dtype of the activations.
        """
        if self.grid is not None and dtype.itemsize <= self.weight.itemsize:
            self.weight.data = self.effective_weight(None, None, dtype)
            self.holds_effective = True

    def merged(self, update: Update | None) -> Merged:
        """Return the effective weight as a merged model stores it.

        With a grid these are codes in the GPTQ layout, without one floats in the base's dtype.
        """
        if self.grid is None:
            weight = self.effective_weight(update).to(self.weight.dtype)
            return Merged({"weight": weight}, int((weight == 0).sum()), None)
        weight = widen_to_4_bits(QuantizedWeight(self.codes(update), self.grid))
        zeros = int(np.count_nonzero(weight.numpy().steps == 0))
        return Merged(to_gptq(weight), zeros, weight.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W_eff^T + bias`` without an adapter, in the dtype of ``x``."""
        if self.holds_effective or (self.grid is None and self.weight.dtype == x.dtype):
            weight = self.weight
        elif self.uses_cache:
            weight = self.cached_weight(None, None, x.dtype)
        else:
            weight = self.effective_weight(None, None, x.dtype)
        return self.with_bias(nn.functional.linear(x, weight.to(x.dtype)))

    def with_bias(self, y: Tensor) -> Tensor:
        """Return ``y`` plus the bias, if there is a bias."""
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Adapted(torch.autograd.Function):
    """``x W_eff^T``; forward and backward compute W_eff, and neither keeps it."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, shift, layer: CompressedLinear, scaling: float):
        ctx.save_for_backward(x, lora_a, lora_b, shift)
        ctx.layer, ctx.scaling = layer, scaling
        weight = layer.effective_weight((lora_a, lora_b, scaling), shift, x.dtype)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, lora_a, lora_b, shift = ctx.saved_tensors
        layer: CompressedLinear = ctx.layer
        base, update = layer.frozen_part(shift), product((lora_a, lora_b, ctx.scaling))
        grad_effective = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        back = fused.backward(base, update, ctx.scaling, grad_effective, shift is not None)
        grad_x, grad_shift, grad_update = None, None, back.update_gradient
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ back.effective
        if back.scale_gradient is not None:
            assert base.grid is not None
            grad_shift = split_groups(back.scale_gradient, base.grid.group_size).sum(dim=2)
        grad_a = ((lora_b.float() * ctx.scaling).T @ grad_update).to(lora_a.dtype)
        grad_b = (grad_update @ (lora_a.float() * ctx.scaling).T).to(lora_b.dtype)
        return grad_x, grad_a, grad_b, grad_shift, None, None


class ElasticLoraLinear(PeftLinear):
    """peft's LoRA layer on a :class:`CompressedLinear`, with a variable rank.

    active_rank: rank of the forward. The trainer sets it before a step and search before an
        evaluation. The scaling is ``alpha / max_rank`` at every rank.
    """

    def __init__(self, base_layer, adapter_name: str, **kwargs):
        super().__init__(base_layer, adapter_name, **kwargs)
        self.active_rank: int = self.r[adapter_name]
        # peft saves and loads every parameter dictionary whose name starts with lora_.
        self.lora_shift = nn.ParameterDict()

    def train_scales(self) -> None:
        """Make the scales of the base's grid trainable; call this before training or loading."""
        scale = self.get_base_layer().scale
        self.lora_shift[PEFT_NAME] = nn.Parameter(torch.zeros(scale.shape, device=scale.device))

    @torch.no_grad()
    def apply_trained_scales(self) -> None:
        """Replace the scales of the base by the trained scales; does nothing without them."""
        if PEFT_NAME in self.lora_shift:
            base = self.get_base_layer()
            base.scale = base.shifted_grid(self.lora_shift.pop(PEFT_NAME)).scale

    def update(self) -> Update:
        """Return ``A [rank, in]``, ``B [out, rank]`` at the active rank, and the scaling."""
        lora_a = self.lora_A[PEFT_NAME].weight[: self.active_rank]
        lora_b = self.lora_B[PEFT_NAME].weight[:, : self.active_rank]
        return lora_a, lora_b, self.scaling[PEFT_NAME]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of base and adapter at the active rank."""
        base, dropout = self.get_base_layer(), self.lora_dropout[PEFT_NAME]
        lora_a, lora_b, scaling = self.update()
        if base.unmerged:
            low = nn.functional.linear(dropout(x), lora_a.to(x.dtype))
            return base(x) + nn.functional.linear(low, lora_b.to(x.dtype)) * scaling
        shift = self.lora_shift.get(PEFT_NAME, None)
        if base.uses_cache:
            weight = base.cached_weight((lora_a, lora_b, scaling), shift, x.dtype)
            return base.with_bias(nn.functional.linear(x, weight))
        # Dropout applies to input columns of A, not to single activations of x: the update is one
        # matrix for all tokens of a step, because it is quantized together with the base.
        lora_a = lora_a * dropout(lora_a.new_ones(self.in_features))
        return base.with_bias(_Adapted.apply(x, lora_a, lora_b, shift, base, scaling))
