"""Whether devices that we could not run on take the codes, by their documentation or source.

Marlin is the INT4 kernel of vLLM and GPTQModel on NVIDIA GPUs; it reads the merged GPTQ folder.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

ROW_GROUP = "one group per row"
OPENVINO_GPU_SOURCE = "https://github.com/openvinotoolkit/openvino/pull/29937"
OPENVINO_NPU_SOURCE = (
    "https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/"
    "inference-with-genai-on-npu.html"
)
MARLIN_SOURCE = (
    "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/quantization/utils/"
    "marlin_utils.py"
)
MARLIN_GROUPS = (32, 64, 128)
MARLIN_OUTPUTS, MARLIN_INPUTS = 64, 128  # each size is a multiple of it


@dataclass(frozen=True)
class WeightGrid:
    """Size and grid of a quantized weight ``[outputs, inputs]``."""

    layer: str
    outputs: int
    inputs: int
    bits: int
    group_size: int
    symmetric: bool

    @property
    def one_group(self) -> bool:
        return self.group_size >= self.inputs


@dataclass(frozen=True)
class GridNeeds:
    """The requirements of a device for every weight.

    source: its documentation or source code.
    fault: a weight -> the refused property and the allowed ones; None if the device takes it.
    """

    device: str
    source: str
    fault: Callable[[WeightGrid], str | None]


def _openvino_gpu(grid: WeightGrid) -> str | None:
    if grid.one_group or grid.group_size % 32 == 0:
        return None
    return f"groups of {grid.group_size}, it takes multiples of 32 or {ROW_GROUP}"


def _openvino_npu(grid: WeightGrid) -> str | None:
    if grid.bits == 8:  # embedding and head; NNCF leaves them at 8 bits too
        return None
    if grid.bits != 4:
        return f"{grid.bits} bits, it takes 4"
    if not grid.symmetric:
        return "an asymmetric grid, it takes symmetric ones"
    if not grid.one_group and grid.group_size != 128:
        return f"groups of {grid.group_size}, it takes 128 or {ROW_GROUP}"
    return None


def _marlin(grid: WeightGrid) -> str | None:
    if grid.bits not in (4, 8):
        return f"{grid.bits} bits, it takes 4 or 8"
    if not grid.symmetric:
        return "an asymmetric grid, it takes symmetric ones"
    if not grid.one_group and grid.group_size not in MARLIN_GROUPS:
        return f"groups of {grid.group_size}, it takes 32, 64, 128 or {ROW_GROUP}"
    if grid.outputs % MARLIN_OUTPUTS or grid.inputs % MARLIN_INPUTS:
        return (
            f"a matrix of {grid.outputs}x{grid.inputs}, it takes multiples of "
            f"{MARLIN_OUTPUTS}x{MARLIN_INPUTS}"
        )
    return None


GRID_NEEDS = {
    "openvino": (
        GridNeeds("OpenVINO GPU", OPENVINO_GPU_SOURCE, _openvino_gpu),
        GridNeeds("OpenVINO NPU", OPENVINO_NPU_SOURCE, _openvino_npu),
    ),
    "torch": (GridNeeds("Marlin (vLLM, GPTQModel)", MARLIN_SOURCE, _marlin),),
}


def describe_acceptance(runtime: str, grids: Iterable[WeightGrid]) -> dict[str, str]:
    """Return device -> whether it takes all weights of a deployment; {} without quantized weights.

    :param runtime: openvino, or torch for a merged GPTQ folder; others have no such devices.
    """
    weights = list(grids)
    needs = GRID_NEEDS.get(runtime, ()) if weights else ()
    return {one.device: f"{_verdict(one, weights)} ({one.source})" for one in needs}


def _verdict(needs: GridNeeds, weights: list[WeightGrid]) -> str:
    faults = [(weight, fault) for weight in weights if (fault := needs.fault(weight))]
    if not faults:
        return f"takes all {len(weights)} weights, not run by us"
    first, fault = faults[0]
    return f"does not take {len(faults)} of {len(weights)} weights: {first.layer} has {fault}"
