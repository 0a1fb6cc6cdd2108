"""Which kernel is the fastest for a matrix on this machine: measured once, and remembered.

A product is measured in OpenVINO itself, as the runtime's own and as ours, over copies of the
weights that are as cold as they will be: as many bytes as the model has, 64 MiB at most. What was
found is kept for this user and machine, not beside the deployment: it is a fact of shapes and
processor, holds for every model of such shapes, and a deployment stays as it was sealed. It is
kept for 30 days, and for an hour where other processes used the processors meanwhile.

Kernels round activations differently, so another choice can give other tokens. The environment
variable ``SQFT_EXPORT_EXECUTION`` (sparse, dense or stock) takes the place of every ``auto``, so
that two machines run the same kernels.

    python -m sqft_export.kernels.choice            # what is kept, and until when
    python -m sqft_export.kernels.choice --clear    # forget it
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import UserError
from sqft_export.kernels.extension import kernels_used, openvino_extension
from sqft_export.kernels.ir import Product
from sqft_export.kernels.library import (
    Kept,
    Kernels,
    Matrix,
    aligned,
    lay_out,
    planned,
)
from sqft_export.kernels.rewrite import STOCK, form_for
from sqft_export.numerics.codes import round_up
from sqft_export.run.host import allowed_processors
from sqft_export.textfiles import read_json

FORMS = (STOCK, "dense", "sparse")
ONE, SEVERAL = 1, 32  # tokens: decoding, and a prompt
SLOWER = 1.1  # times the runtime's own prompt that is not worth a faster token
ROUNDS = 5
COLD_BYTES = 2**26
MEASURED_AS = 3
PINNED = "SQFT_EXPORT_EXECUTION"
QUIET_SECONDS, BUSY_SECONDS = 30 * 24 * 3600.0, 3600.0  # that a measurement is kept
BUSY_PROCESSORS = 0.25  # used by other processes while kernels were measured


@dataclass(frozen=True)
class Shape:
    """What the speed of a product depends on; density in twentieths."""

    rows: int
    inputs: int
    bits: int
    group: int
    asymmetric: bool
    pairs: bool
    density: float

    @classmethod
    def of(cls, matrix: Matrix, kept: Kept) -> "Shape":
        share = int(kept.counts.sum(dtype=np.int64)) / (matrix.rows * matrix.inputs)
        density = round(share * 20) / 20
        asymmetric = matrix.zero is not None
        return cls(
            *(matrix.rows, matrix.inputs, matrix.bits, matrix.group, asymmetric, kept.pairs),
            density,
        )


@dataclass(frozen=True)
class Choice:
    """seconds: of a product, by form and number of tokens. until: when it is to be measured again,
    in seconds since 1970."""

    form: str
    seconds: dict[str, dict[str, float]]
    until: float = 0.0

    def is_current(self) -> bool:
        """Whether it is not out of date; one from the future is of a clock that was set back."""
        return 0 <= self.until - time.time() <= QUIET_SECONDS

    def gain(self) -> float:
        """Times as fast as the runtime's own kernel, one token."""
        return self.seconds[STOCK][str(ONE)] / self.seconds[self.form][str(ONE)]


def fastest(seconds: dict[str, dict[str, float]]) -> str:
    """Of the forms whose prompts are about as fast as the runtime's, that of the fastest token."""
    limit = SLOWER * seconds[STOCK][str(SEVERAL)]
    fair = [form for form in seconds if seconds[form][str(SEVERAL)] <= limit or form == STOCK]
    return min(fair, key=lambda form: seconds[form][str(ONE)])


class Chooser:
    """Chooses forms for one model, measuring shapes that were not met before.

    :param model_bytes: of its compressed weights.
    """

    def __init__(self, model_bytes: int):
        self.kernels, self.model_bytes = kernels_used(), model_bytes
        self.memory = Remembered()

    def __call__(self, product: Product, matrix: Matrix, kept: Kept) -> str:
        shape = Shape.of(matrix, kept)
        known = self.memory.get(shape)
        if known is None:
            known = self._measured(matrix, kept)
            self.memory.put(shape, known)
        return known.form

    def _measured(self, matrix: Matrix, kept: Kept) -> Choice:
        before = _processor_seconds()
        size = max(1, len(matrix.codes))
        copies = max(1, min(self.model_bytes, COLD_BYTES) // size)
        models = {STOCK: stock_model(matrix, copies)}
        holders = []
        for form in FORMS[1:]:
            chosen = form_for(form, kept, matrix, self.kernels)
            made = kernel_model(matrix, kept, chosen, copies, self.kernels)
            if made is not None and (form == "dense" or chosen != "dense"):
                models[form], held = made
                holders.append(held)
        seconds = _timed(models, matrix.inputs, copies)
        busy = used_meanwhile(before, _processor_seconds()) > BUSY_PROCESSORS
        until = time.time() + (BUSY_SECONDS if busy else QUIET_SECONDS)
        return Choice(fastest(seconds), seconds, until)


@dataclass(frozen=True)
class ProcessorSeconds:
    """at: of a clock. busy: of all processors that this process may run on. own: of this process
    alone."""

    at: float
    busy: float
    own: float


def _processor_seconds() -> ProcessorSeconds:
    import psutil

    every = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user's time already
    busy = sum(
        seconds
        for number, times in enumerate(every)
        if number in allowed
        for kind, seconds in times._asdict().items()
        if kind not in idle
    )
    mine = psutil.Process().cpu_times()
    return ProcessorSeconds(time.monotonic(), busy, mine.user + mine.system)


def used_meanwhile(before: ProcessorSeconds, after: ProcessorSeconds) -> float:
    """Processors that other processes used between two moments, on average."""
    others = after.busy - before.busy - (after.own - before.own)
    return max(0.0, others) / max(after.at - before.at, 1e-9)


def pinned_execution() -> str | None:
    """The kernel that the environment sets in place of ``auto``, or None.

    :raises UserError: if that is no kernel.
    """
    found = os.environ.get(PINNED, "").strip()
    if found in ("", "auto"):
        return None
    if found not in FORMS:
        raise UserError(f"{PINNED}: found {found!r}; allowed are auto, {', '.join(FORMS)}")
    return found


def stock_model(matrix: Matrix, copies: int) -> Any:
    """An ``openvino.Model`` of so many products of one input, on the runtime's own kernels."""
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, matrix.inputs], ov.Type.f32)
    groups, products = matrix.scale.shape[1], []
    signed, bits = matrix.zero is None, matrix.bits
    kind = {(4, True): "i4", (4, False): "u4", (8, True): "i8", (8, False): "u8"}[bits, signed]
    shape = [matrix.rows, groups, matrix.group]
    flip = matrix.flip ^ (2 ** (bits - 1) if signed else 0)
    stored = matrix.codes ^ np.uint8(flip * (17 if bits == 4 else 1))
    for _ in range(copies):
        tensor = ov.Tensor(stored, ov.Shape(shape), getattr(ov.Type, kind))
        weight = ops.convert(ops.constant(tensor, shared_memory=False), "f16")
        if matrix.zero is not None:
            zero = ops.constant(matrix.zero.reshape(*shape[:2], 1).astype(np.float16))
            weight = ops.subtract(weight, zero)
        weight = ops.multiply(weight, ops.constant(matrix.scale.reshape(*shape[:2], 1)))
        both = np.array([matrix.rows, matrix.inputs], np.int64)
        weight = ops.convert(ops.reshape(weight, both, special_zero=False), "f32")
        products.append(ops.result(ops.matmul(x, weight, False, True)))
    return ov.Model(products, [x], "stock")


def kernel_model(
    matrix: Matrix, kept: Kept, form: str, copies: int, kernels: Kernels
) -> tuple[Any, np.ndarray] | None:
    """The same on our kernels, and the memory it reads; None if the shape can't be laid out."""
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.utils.node_factory import NodeFactory

    header = planned(matrix, form, kernels.lanes, kept.counts)
    if header is None:
        return None
    header.resident = 1
    size = round_up(header.bytes, 64)
    memory = aligned(size * copies)
    lay_out(header, matrix, kept.counts, memory[: header.bytes])
    factory = NodeFactory()
    factory.add_extension(openvino_extension())
    x, products = ops.parameter([-1, matrix.inputs], ov.Type.f32), []
    for index in range(copies):
        blob = memory[index * size : index * size + header.bytes]
        blob[:] = memory[: header.bytes]
        weight = ov.op.Constant(ov.Tensor(blob, shared_memory=True), shared_memory=True)
        attributes = {"rows": matrix.rows, "activations": "int8"}
        inputs = [x.output(0), weight.output(0)]
        products.append(ops.result(factory.create("SqftMatMul", inputs, attributes)))
    return ov.Model(products, [x], "kernel"), memory


def _timed(models: dict[str, Any], inputs: int, copies: int) -> dict[str, dict[str, float]]:
    """Seconds of one product, by form and number of tokens.

    Forms take turns, and the best of each counts: other work on the machine slows single calls
    tenfold, and what was found is remembered.
    """
    import openvino as ov

    properties, core = {"PERFORMANCE_HINT": "LATENCY"}, ov.Core()
    requests = {
        form: core.compile_model(model, "CPU", properties).create_infer_request()
        for form, model in models.items()
    }
    found: dict[str, dict[str, float]] = {form: {} for form in models}
    random = np.random.default_rng(0)
    for tokens in (ONE, SEVERAL):
        x = ov.Tensor(random.standard_normal((tokens, inputs), np.float32))
        taken: dict[str, list[float]] = {form: [] for form in models}
        for _ in range(1 + (ROUNDS if tokens == ONE else 2)):
            for form, request in requests.items():
                request.set_input_tensor(x)
                started = time.perf_counter()
                request.infer()
                taken[form].append(time.perf_counter() - started)
        for form, seconds in taken.items():
            found[form][str(tokens)] = min(seconds[1:]) / copies  # the first is not like the others
    return found


@functools.cache
def machine_key() -> str:
    """What else the speed depends on: processor, its allowed number, kernels, runtime, and the
    version of this package."""
    import openvino as ov

    from sqft_export.measure.machine import machine_facts

    facts = [machine_facts()["processor"], allowed_processors(), kernels_used().name]
    version = importlib.metadata.version("sqft-export")
    return json.dumps([MEASURED_AS, version, ov.__version__, *facts])


def cache_file() -> Path:
    """``execution.json`` in the user's folder for caches (``XDG_CACHE_HOME``)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sqft_export" / "execution.json"


class Remembered:
    """What was measured before, on this machine with these versions."""

    def __init__(self) -> None:
        self.file = cache_file()
        try:
            document = read_json(self.file) if self.file.is_file() else {}
            mine = document.get(self._key(), {})
            self.known = {name: Choice(**entry) for name, entry in mine.items()}
        except (UserError, TypeError, AttributeError):  # damaged: measured again
            document, self.known = {}, {}
        self.document = document

    def _key(self) -> str:
        return hashlib.sha256(machine_key().encode()).hexdigest()[:16]

    def get(self, shape: Shape) -> Choice | None:
        """What was found, if it is not out of date."""
        found = self.known.get(json.dumps(asdict(shape)))
        return found if found and found.is_current() else None

    def put(self, shape: Shape, choice: Choice) -> None:
        """Kept where that is possible; a read-only home means measuring again."""
        self.known[json.dumps(asdict(shape))] = choice
        mine = {name: asdict(known) for name, known in self.known.items()}
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.document | {self._key(): mine}, indent=1))
            partial.replace(self.file)
        except OSError:
            return


def _show_or_clear(arguments: list[str]) -> None:
    """The command ``python -m sqft_export.kernels.choice``."""
    file = cache_file()
    if arguments == ["--clear"]:
        file.unlink(missing_ok=True)
        print(f"{file}: cleared; kernels are measured again")
        return
    for shape, known in Remembered().known.items():
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(known.until))
        print(f"{known.form:6} until {until}  {shape}")
    print(f"{file}; --clear forgets it, {PINNED} pins a kernel")


if __name__ == "__main__":
    _show_or_clear(sys.argv[1:])
