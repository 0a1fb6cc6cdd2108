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

Two of the four pipelines leave the adapter unmerged: ``y = x FQ(W_base)^T + dropout(x) (B A)^T *
alpha / max_rank``, plain LoRA beside a sparse or quantized base.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from sqft_export.numerics import fused
from sqft_export.numerics.affine import Grid, grouped, quantize, stored
from sqft_export.numerics.codes import codes_to_steps
from sqft_export.numerics.gptq_layout import to_gptq

PEFT_NAME = "default"
Update = tuple[Tensor, Tensor, float]  # A [rank, in], B [out, rank], alpha / max_rank


def product(update: Update | None) -> Tensor | None:
    """``B A``, float32 ``[out, in]``, its own memory."""
    if update is None:
        return None
    lora_a, lora_b, _ = update
    # Contiguous, so that a slice of the super-adapter and its extracted copy take the same path
    # through the matrix product, to the last bit.
    return lora_b.float().contiguous() @ lora_a.float().contiguous()


class Merged(NamedTuple):
    """tensors: by the part of the name that follows the Linear's. zeros: how many weights are.
    grid: that stored codes are on; None where there are none."""

    tensors: dict[str, Tensor]
    zeros: int
    grid: Grid | None


class WeightCache:
    """The last effective weight of a layer, valid while the tensors that it is made from stand.

    A tensor stands while it is the same memory at the same version; a change in place raises the
    version. The cache holds the old tensors, so that no new one is placed at their addresses.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.key: Any = None
        self.held: list[Tensor] = []
        self.weight: Tensor | None = None

    def weight_of(
        self, sources: Iterable[Tensor | None], facts: tuple[Any, ...], make: Callable[[], Tensor]
    ) -> Tensor:
        """The cached weight, or that of ``make`` where a source or a fact is another one.

        :param facts: numbers that the weight depends on too.
        """
        tensors = [None if source is None else source.detach() for source in sources]
        key = facts, [t if t is None else (t.data_ptr(), t._version, t.shape) for t in tensors]
        if self.weight is None or key != self.key:
            self.clear()  # first, so that one weight is in memory
            self.weight = make()
            self.key, self.held = key, [t for t in tensors if t is not None]
        return self.weight


class CompressedLinear(nn.Linear):
    """A frozen Linear with its mask bits and grid.

    weight: ``[out, in]`` in the checkpoint's dtype.
    mask_bits: uint8 ``[out, ceil(in / 8)]``, or None: nothing is pruned or masked.
    grid: or None: the weight is used as it is.
    unmerged: an adapter on it works beside it.
    cache: of the effective weight, for forwards without gradient; None: there is none.
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
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        new.weight, new.bias = linear.weight, linear.bias
        new.register_buffer("mask_bits", mask_bits, persistent=False)
        new.register_buffer("scale", grid.scale if grid else None, persistent=False)
        new.register_buffer("zero_point", grid.zero_point if grid else None, persistent=False)
        new.bits, new.unmerged = grid.bits if grid else None, unmerged
        new.settled, new.cache = False, None
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
        group_size = self.in_features // self.scale.shape[1]
        grid = Grid(self.scale, self.zero_point, self.bits, group_size)
        return grid if shift is None else grid.moved(shift)

    def base_at(self, shift: Tensor | None) -> fused.Frozen:
        """What an update enters, on the grid that ``shift`` makes of the stored one."""
        return fused.Frozen(self.weight, self.mask_bits, self.grid_at(shift))

    def codes(self, update: Update | None) -> Tensor:
        """Codes uint8 ``[out, in]`` of the effective weight; only with a grid."""
        assert self.grid is not None
        base, scaling = self.base_at(None), update[2] if update else 0.0
        return quantize(fused.adapted_weight(base, product(update), scaling), self.grid)

    def effective_weight(
        self,
        update: Update | None,
        shift: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """``[out, in]`` in ``dtype``, computed in float32."""
        scaling = update[2] if update else 0.0
        return fused.effective_weight(self.base_at(shift), product(update), scaling, dtype)

    @property
    def caches(self) -> bool:
        """Whether a forward now takes its weight from the cache; never one in training."""
        return self.cache is not None and not self.training and not torch.is_grad_enabled()

    def cached_weight(
        self, update: Update | None, shift: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """:meth:`effective_weight`, computed anew only after a change of what it is made from."""
        assert self.cache is not None
        lora_a, lora_b, scaling = update or (None, None, 0.0)
        base = (self.weight, self.mask_bits, self.scale, self.zero_point)
        return self.cache.weight_of(
            (*base, lora_a, lora_b, shift),
            (dtype, scaling),
            lambda: self.effective_weight(update, shift, dtype),
        )

    def _apply(self, fn, recurse=True):  # a move to another device or dtype
        if self.cache is not None:
            self.cache.clear()
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def settle(self, dtype: torch.dtype) -> None:
        """Keep the weight as forward multiplies with it: no adapter will enter it.

        Not where that would take more memory; forward then makes it again each time.

        :param dtype: of the activations.
        """
        if self.grid is not None and dtype.itemsize <= self.weight.itemsize:
            self.weight.data = self.effective_weight(None, None, dtype)
            self.settled = True

    def merged(self, update: Update | None) -> Merged:
        """The Linear that forward runs, as a merged model stores it: the weight in the base's
        dtype, or its codes in the GPTQ layout."""
        if self.grid is None:
            weight = self.effective_weight(update).to(self.weight.dtype)
            return Merged({"weight": weight}, int((weight == 0).sum()), None)
        codes, grid = stored(self.codes(update), self.grid)
        steps = codes_to_steps(codes.numpy(), grid.zero_point.numpy())
        return Merged(to_gptq(codes, grid), int(np.count_nonzero(steps == 0)), grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.settled or (self.grid is None and self.weight.dtype == x.dtype):
            weight = self.weight
        elif self.caches:
            weight = self.cached_weight(None, None, x.dtype)
        else:
            weight = self.effective_weight(None, None, x.dtype)
        return self.with_bias(nn.functional.linear(x, weight.to(x.dtype)))

    def with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Adapted(torch.autograd.Function):
    """``x W_eff^T``; W_eff is made in forward and again in backward, never kept."""

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
        base, update = layer.base_at(shift), product((lora_a, lora_b, ctx.scaling))
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        back = fused.backward(base, update, ctx.scaling, of_weight, shift is not None)
        grad_x, grad_shift, grad_weight = None, None, back.passed
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ back.effective
        if back.moved is not None:
            assert base.grid is not None
            grad_shift = grouped(back.moved, base.grid.group_size).sum(dim=2)
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
        self.lora_shift[PEFT_NAME] = nn.Parameter(torch.zeros(scale.shape, device=scale.device))

    @torch.no_grad()
    def settle_scales(self) -> None:
        """Make the trained scales those of the base."""
        if PEFT_NAME in self.lora_shift:
            base = self.get_base_layer()
            base.scale = base.grid_at(self.lora_shift.pop(PEFT_NAME)).scale

    def update(self) -> Update:
        """``A [rank, in]``, ``B [out, rank]`` at the active rank, and the scaling."""
        lora_a = self.lora_A[PEFT_NAME].weight[: self.active_rank]
        lora_b = self.lora_B[PEFT_NAME].weight[:, : self.active_rank]
        return lora_a, lora_b, self.scaling[PEFT_NAME]

    def forward(self, x: Tensor) -> Tensor:
        base, dropout = self.get_base_layer(), self.lora_dropout[PEFT_NAME]
        lora_a, lora_b, scaling = self.update()
        if base.unmerged:
            low = nn.functional.linear(dropout(x), lora_a.to(x.dtype))
            return base(x) + nn.functional.linear(low, lora_b.to(x.dtype)) * scaling
        shift = self.lora_shift.get(PEFT_NAME, None)
        if base.caches:
            weight = base.cached_weight((lora_a, lora_b, scaling), shift, x.dtype)
            return base.with_bias(nn.functional.linear(x, weight))
        # Dropout acts on the adapter alone: whole input columns of A, the same for all tokens of
        # a step, since the update is one matrix that goes through the grid.
        lora_a = lora_a * dropout(lora_a.new_ones(self.in_features))
        return base.with_bias(_Adapted.apply(x, lora_a, lora_b, shift, base, scaling))
