"""Routed experts as separate Linears, in place of the batched matrices of transformers' classes.

A model class of transformers 5 has one parameter ``[experts, out, in]`` for all experts of a block.
Compression works on Linears, so that a model is built with one module per expert. The outputs are
equal up to the order of the sum over experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sqft_export.model.families import Experts

Combination = Callable[[Tensor, Tensor], Tensor]  # outputs of gate and up -> inputs of down


def gate_outputs(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """Return ``act(gate) * up``."""
    return act(gate) * up


def gate_clamped_outputs(alpha: float, limit: float, gate: Tensor, up: Tensor) -> Tensor:
    """Return ``(up + 1) * gate * sigmoid(alpha * gate)`` of clamped outputs (gpt-oss).

    Up is clamped on both sides, the gate above.
    """
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class Expert(nn.Module):
    """One expert: ``down(combine(gate(x), up(x)))``."""

    def __init__(self, hidden: int, inner: int, experts: Experts, combine: Combination):
        super().__init__()
        self.names, self.combine = experts.linears, combine
        gate, up, down = experts.linears
        self.add_module(gate, nn.Linear(hidden, inner, bias=experts.biases))
        self.add_module(up, nn.Linear(hidden, inner, bias=experts.biases))
        self.add_module(down, nn.Linear(inner, hidden, bias=experts.biases))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``[tokens, hidden]`` of inputs of the same shape."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.combine(gate(x), up(x)))


@dataclass(frozen=True)
class Routed:
    """Inputs of the experts of a block in one call.

    x: float ``[tokens, hidden]``. indices, weights: ``[tokens, chosen]``.
    """

    x: Tensor
    indices: Tensor
    weights: Tensor

    def inputs_of(self, number: int) -> Tensor:
        """Return the inputs of one expert, float ``[its tokens, hidden]``."""
        return self.x[torch.where(self.indices == number)[0]]

    def add_outputs(self, total: Tensor, expert: nn.Module, number: int) -> None:
        """Add the weighted outputs of one expert on its tokens to ``total``."""
        rows, columns = torch.where(self.indices == number)
        if len(rows):
            outputs = expert(self.x[rows]) * self.weights[rows, columns, None]
            total.index_add_(0, rows, outputs.to(total.dtype))


class RoutedExperts(nn.ModuleList):
    """All experts of a block, called as the class that they replace.

    computes_all: compute every expert on every token and weight the outputs, as traced graphs do,
        whose operations can't depend on the data. Otherwise an expert gets only its own tokens.
    """

    def __init__(self, count: int, hidden: int, inner: int, experts: Experts, combine: Combination):
        super().__init__(Expert(hidden, inner, experts, combine) for _ in range(count))
        self.computes_all = False
        self.recorded: list[Routed] | None = None
        self._replayed: Iterator[Tensor] | None = None

    def replay(self, outputs: list[Tensor]) -> None:
        """Return these outputs, each ``[tokens, hidden]``, in the next calls."""
        self._replayed = iter(outputs)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        :param x: float ``[tokens, hidden]``.
        :param indices: int64 ``[tokens, chosen]``, numbers of the experts of each token.
        :param weights: float ``[tokens, chosen]``.
        """
        if self.recorded is not None:
            self.recorded.append(Routed(x, indices, weights))
            return torch.zeros_like(x)
        if self._replayed is not None and (found := next(self._replayed, None)) is not None:
            return found
        if self.computes_all or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._all(x, indices, weights)
        total, routed = torch.zeros_like(x), Routed(x, indices, weights)
        for number in indices.unique().tolist():
            routed.add_outputs(total, self[number], number)
        return total

    def _all(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        shares = torch.zeros(x.shape[0], len(self), dtype=x.dtype, device=x.device)
        shares = shares.scatter(1, indices, weights.to(x.dtype))
        outputs = [expert(x) * shares[:, i : i + 1] for i, expert in enumerate(self)]
        return torch.stack(outputs).sum(dim=0)


@contextmanager
def recorded(experts: RoutedExperts | None) -> Iterator[list[Routed]]:
    """Record the inputs of a block's experts in place of computing them; outputs are zero.

    :param experts: None for a dense block, which is not changed.
    """
    found: list[Routed] = []
    if experts is not None:
        experts.recorded = found
    try:
        yield found
    finally:
        if experts is not None:
            experts.recorded = None


def find_experts(block: nn.Module) -> RoutedExperts | None:
    """Return the experts of a block; None for a dense block."""
    return next((m for m in block.modules() if isinstance(m, RoutedExperts)), None)


def compute_all_experts(model: nn.Module) -> None:
    """Compute every expert on every token from now on, so that each one runs."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.computes_all = True


class _GraniteBlock(nn.Module):
    """The router and the experts of GraniteMoe, whose class sorts tokens by expert."""

    def __init__(self, replaced: nn.Module, experts: RoutedExperts):
        super().__init__()
        self.router, self.experts = replaced.router, experts
        # optimum-intel patches the forward of these while it traces; they are not called.
        self.input_linear = self.output_linear = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[batch, length, hidden]`` of inputs of the same shape."""
        flat = x.reshape(-1, x.shape[-1])
        logits, indices = self.router.layer(flat).float().topk(self.router.top_k, dim=1)
        weights = torch.softmax(logits, dim=1).type_as(flat)
        return self.experts(flat, indices, weights).view(x.shape)


def separate_experts(model: nn.Module, experts: Experts) -> None:
    """Replace the batched experts of a model without weights by :class:`RoutedExperts`.

    Buffers that checkpoints store become parameters without gradients.
    """
    for name, module in list(model.named_modules()):
        for buffer in experts.stored_buffers:
            if buffer in dict(module.named_buffers(recurse=False)):
                meta = nn.Parameter(module.get_buffer(buffer).to("meta"), requires_grad=False)
                delattr(module, buffer)
                module.register_parameter(buffer, meta)
        with torch.device("meta"):
            made = _separated(module, experts)
        if made is not None:
            model.set_submodule(name, made)


def _separated(module: nn.Module, experts: Experts) -> nn.Module | None:
    """Return the module with separate experts; None if it has no batched ones."""
    both = getattr(module, "gate_up_proj", None)
    if isinstance(both, nn.Parameter) and both.dim() == 3 and experts.alternate:
        count, hidden, outputs = both.shape
        clamped = partial(gate_clamped_outputs, module.alpha, module.limit)
        return RoutedExperts(count, hidden, outputs // 2, experts, clamped)
    if isinstance(both, nn.Parameter) and both.dim() == 3:
        count, outputs, hidden = both.shape
        gated = partial(gate_outputs, module.act_fn)
        return RoutedExperts(count, hidden, outputs // 2, experts, gated)
    if hasattr(module, "input_linear") and hasattr(module.input_linear, "num_experts"):
        count, outputs, hidden = module.input_linear.weight.shape
        gated = partial(gate_outputs, module.activation)
        return _GraniteBlock(module, RoutedExperts(count, hidden, outputs // 2, experts, gated))
    return None
