"""Private parts of torch: INT4 products, versions of tensors, moves of modules, OpenMP threads."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

DISTRIBUTION = "torch"
PRIVATE = (
    "torch:Tensor._version",
    "torch:nn.Module._apply",
    "torch:ops.aten._convert_weight_to_int4pack",
    "torch:ops.aten._convert_weight_to_int4pack_for_cpu",
    "torch:ops.aten._weight_int4pack_mm",
    "torch:ops.aten._weight_int4pack_mm_for_cpu",
)
INNER_K_TILES = {"cpu": 2, "cuda": 8}  # tiles of 16 inputs per block of the INT4 layout
# x [tokens, in], stored codes, group size, table of scale and shift -> [tokens, out]
Int4Product = Callable[[Tensor, Tensor, int, Tensor], Tensor]


def version_of(tensor: Tensor) -> int:
    """Return the number of changes of a tensor in place."""
    return tensor._version


def pack_int4(codes: Tensor, device: str) -> tuple[Tensor, Int4Product]:
    """Return codes uint8 ``[out, in]`` in torch's INT4 layout, and the product that reads them.

    :param device: cpu or cuda.
    """
    aten = torch.ops.aten
    if device == "cpu":
        stored = aten._convert_weight_to_int4pack_for_cpu(codes.int(), INNER_K_TILES[device])
        return stored, aten._weight_int4pack_mm_for_cpu
    pairs = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
    return aten._convert_weight_to_int4pack(pairs, INNER_K_TILES[device]), aten._weight_int4pack_mm


class MovableLinear(nn.Linear):
    """A Linear that is notified before its tensors change device or dtype."""

    def before_move(self) -> None:
        """Called before the tensors change; does nothing here."""

    def _apply(self, fn, recurse=True):
        self.before_move()
        return super()._apply(fn, recurse)


@functools.cache
def openmp_parallel() -> ctypes.c_void_p | None:
    """Return ``GOMP_parallel`` of torch's OpenMP, whose threads are running already.

    None if torch uses another library of threads.
    """
    for file in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        if file.suffix in (".so", ".dylib"):
            found = getattr(ctypes.CDLL(str(file)), "GOMP_parallel", None)
            return ctypes.cast(found, ctypes.c_void_p) if found else None
    return None
