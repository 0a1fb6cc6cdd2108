"""Calibration tokens and largest activations of every Linear; warnings about float16."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sqft_export.model.coverage import coverage_warnings

# float16 ends at 65,504. Other texts than the calibration's reach higher values.
LARGEST_SAFE_ACTIVATION = 3e4
LARGEST_USUAL_SCALE = 100.0  # of a grid; the product of scale and code is a weight


@contextlib.contextmanager
def watch_activations(
    linears: Mapping[str, nn.Linear], largest: dict[str, float]
) -> Iterator[None]:
    """Record the largest absolute input or output of each Linear while the context is open.

    :param largest: receives them; a larger value replaces a smaller one.
    """
    found = dict[str, Tensor]()

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for one in (inputs[0], output):
                if one.numel():
                    low, high = torch.aminmax(one)
                    value = torch.maximum(-low, high)
                    found[name] = torch.maximum(found.get(name, value), value)

        return record

    hooks = [linear.register_forward_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in found.items():
            record_largest(largest, name, float(value))


def record_largest(largest: dict[str, float], name: str, value: float) -> None:
    """Keep the largest value of a name."""
    largest[name] = max(largest.get(name, 0.0), value)


def _above(values: Mapping[str, float], limit: float) -> tuple[int, str]:
    """Return how many values exceed a limit, and the name of the largest value."""
    high = [name for name, value in values.items() if value > limit]
    return len(high), max(high, key=values.__getitem__, default="")


def overflow_warnings(largest: Mapping[str, float]) -> list[str]:
    """Return at most one warning about activations close to the end of float16."""
    count, worst = _above(largest, LARGEST_SAFE_ACTIVATION)
    if not count:
        return []
    return [
        f"activations: {count} of {len(largest)} modules exceed {LARGEST_SAFE_ACTIVATION:,.0f} "
        f"on the calibration data, {worst} reaches {largest[worst]:,.0f}; float16 ends at 65,504, "
        "so devices that compute in float16 (GPU, NPU) may overflow; run these in float32 or "
        "bfloat16 (OpenVINO: INFERENCE_PRECISION_HINT=f32)"
    ]


def scale_warnings(scales: Mapping[str, float]) -> list[str]:
    """Return at most one warning about grids with very large scales.

    :param scales: module -> its largest scale.
    """
    count, worst = _above(scales, LARGEST_USUAL_SCALE)
    if not count:
        return []
    return [
        f"scales: {count} of {len(scales)} grids have scales above {LARGEST_USUAL_SCALE:g}, "
        f"{worst} has {scales[worst]:,.1f}; products in float16 may overflow"
    ]


@dataclass
class CalibrationStatistics:
    """Statistics of a walk over all blocks.

    tokens: Linear -> number of calibration tokens that it saw.
    largest: Linear or block -> its largest absolute activation, after its weights were changed.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, dict]:
        """Return the metrics of a pass that calibrates."""
        return {"calibration_tokens": self.tokens, "largest_activations": self.largest}

    def warnings(self, shapes: dict[str, tuple[int, int]], has_hessian: bool) -> list[str]:
        """Return warnings about few tokens and about large activations.

        :param shapes: Linear -> ``(out, in)``.
        :param has_hessian: a Hessian is factored.
        """
        return [
            *coverage_warnings(self.tokens, shapes, has_hessian),
            *overflow_warnings(self.largest),
        ]
