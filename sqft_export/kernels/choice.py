"""Measure once which kernel is the fastest for a matrix on this machine, and cache the result.

A product is timed in OpenVINO, on the runtime's kernel and on ours. Copies of the weights, as many
bytes as the model has and at most 64 MiB, keep them as cold in the caches as in the model.

Results are cached per user and machine, not in the deployment: they depend on shapes and processor
only, hold for every model with these shapes, and a sealed deployment must not change. A result is
valid for 30 days, or for one hour if other processes used the processors during the measurement.

Kernels round activations differently, so another choice can give other tokens. The environment
variable ``SQFT_EXPORT_EXECUTION`` (sparse, dense or stock) replaces every ``auto``, so that two
machines run the same kernels.

    python -m sqft_export.kernels.choice            # list cached results and their expiry
    python -m sqft_export.kernels.choice --clear    # delete them
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
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.errors import UserError
from sqft_export.kernels.extension import openvino_extension, require_kernels
from sqft_export.kernels.ir import Product
from sqft_export.kernels.library import (
    KeptCounts,
    Kernels,
    Matrix,
    allocate_aligned,
    pack_matrix,
    plan_matrix,
)
from sqft_export.kernels.rewrite import STOCK, resolve_format
from sqft_export.machine.host import allowed_processors
from sqft_export.machine.processors import MIN_BUSY_PROCESSORS, sample, used_by_others
from sqft_export.numerics.codes import round_up
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    import openvino as ov

FORMS = (STOCK, "dense", "sparse")
DECODE_TOKENS, PREFILL_TOKENS = 1, 32  # tokens per call
MAX_PREFILL_SLOWDOWN = 1.1  # a kernel with a slower prefill than this ratio to stock is rejected
DECODE_ROUNDS, PREFILL_ROUNDS = 5, 2  # timed calls per kernel, after one warmup call
MAX_COLD_BYTES = 2**26  # of weight copies per kernel
MEASUREMENT_VERSION = 3  # raise it when the measurement changes; older results are then ignored
EXECUTION_VARIABLE = "SQFT_EXPORT_EXECUTION"
MAX_AGE_SECONDS, BUSY_MAX_AGE_SECONDS = 30 * 24 * 3600.0, 3600.0  # a result is valid


@dataclass(frozen=True)
class Shape:
    """The properties that determine the speed of a product.

    group: inputs per scale. asymmetric: whether there are zero points.
    pairs: whether the mask is 2:4. density: share of kept codes, rounded to a twentieth.
    """

    rows: int
    inputs: int
    bits: int
    group: int
    asymmetric: bool
    pairs: bool
    density: float

    @classmethod
    def of(cls, matrix: Matrix, kept: KeptCounts) -> "Shape":
        """Return the shape of a matrix."""
        share = int(kept.counts.sum(dtype=np.int64)) / (matrix.rows * matrix.inputs)
        density = round(share * 20) / 20
        asymmetric = matrix.zero is not None
        return cls(
            *(matrix.rows, matrix.inputs, matrix.bits, matrix.group, asymmetric, kept.pairs),
            density,
        )


@dataclass(frozen=True)
class Choice:
    """The fastest kernel for a shape.

    form: stock, dense or sparse.
    seconds: per product, by form and number of tokens.
    until: time of expiry, in seconds since 1970.
    """

    form: str
    seconds: dict[str, dict[str, float]]
    until: float = 0.0

    def is_current(self) -> bool:
        """Return whether it has not expired. A date too far ahead means that a clock was reset."""
        return 0 <= self.until - time.time() <= MAX_AGE_SECONDS

    def gain(self) -> float:
        """Return the speed-up over the runtime's own kernel at one token."""
        return self.seconds[STOCK][str(DECODE_TOKENS)] / self.seconds[self.form][str(DECODE_TOKENS)]


def fastest_form(seconds: dict[str, dict[str, float]]) -> str:
    """Return the form with the fastest decode whose prefill is not much slower than stock."""
    limit = MAX_PREFILL_SLOWDOWN * seconds[STOCK][str(PREFILL_TOKENS)]
    fair = [
        form for form in seconds if seconds[form][str(PREFILL_TOKENS)] <= limit or form == STOCK
    ]
    return min(fair, key=lambda form: seconds[form][str(DECODE_TOKENS)])


class Chooser:
    """Choose a form for each product of one model; measure shapes that are not cached.

    :param model_bytes: bytes of the model's compressed weights.
    """

    def __init__(self, model_bytes: int):
        self.kernels, self.model_bytes = require_kernels(), model_bytes
        self.memory = MeasurementCache()

    def __call__(self, product: Product, matrix: Matrix, kept: KeptCounts) -> str:
        shape = Shape.of(matrix, kept)
        known = self.memory.get(shape)
        if known is None:
            known = self._measure(matrix, kept)
            self.memory.put(shape, known)
        return known.form

    def _measure(self, matrix: Matrix, kept: KeptCounts) -> Choice:
        """Time all forms of a matrix."""
        before = sample()
        size = max(1, len(matrix.codes))
        copies = max(1, min(self.model_bytes, MAX_COLD_BYTES) // size)
        models = {STOCK: stock_model(matrix, copies)}
        holders = []
        for form in FORMS[1:]:
            chosen = resolve_format(form, kept, matrix, self.kernels)
            made = kernel_model(matrix, kept, chosen, copies, self.kernels)
            if made is not None and (form == "dense" or chosen != "dense"):
                models[form], held = made
                holders.append(held)
        seconds = _time_models(models, matrix.inputs, copies)
        busy = used_by_others(before) > MIN_BUSY_PROCESSORS
        until = time.time() + (BUSY_MAX_AGE_SECONDS if busy else MAX_AGE_SECONDS)
        return Choice(fastest_form(seconds), seconds, until)


def pinned_execution() -> str | None:
    """Return the kernel that ``SQFT_EXPORT_EXECUTION`` sets for ``auto``; None if it sets none.

    :raises UserError: if the value is unknown.
    """
    found = os.environ.get(EXECUTION_VARIABLE, "").strip()
    if found in ("", "auto"):
        return None
    if found not in FORMS:
        raise UserError(
            f"{EXECUTION_VARIABLE}: found {found!r}; allowed are auto, {', '.join(FORMS)}"
        )
    return found


def stock_model(matrix: Matrix, copies: int) -> "ov.Model":
    """Return a model with ``copies`` products of one input, on OpenVINO's kernels."""
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
    matrix: Matrix, kept: KeptCounts, form: str, copies: int, kernels: Kernels
) -> "tuple[ov.Model, np.ndarray] | None":
    """Return the same model on our kernels and the memory that it reads.

    None if the kernels do not support the shape.
    """
    import openvino as ov
    from openvino import opset13 as ops
    from openvino.utils.node_factory import NodeFactory

    header = plan_matrix(matrix, form, kernels.lanes, kept.counts)
    if header is None:
        return None
    header.resident = 1
    size = round_up(header.bytes, 64)
    memory = allocate_aligned(size * copies)
    pack_matrix(header, matrix, kept.counts, memory[: header.bytes])
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


def _time_models(
    models: "dict[str, ov.Model]", inputs: int, copies: int
) -> dict[str, dict[str, float]]:
    """Return the seconds of one product, by form and number of tokens.

    Calls of the forms are interleaved and the fastest call of each counts: other work on the
    machine can slow a single call tenfold, and the result is cached.
    """
    import openvino as ov

    properties, core = {"PERFORMANCE_HINT": "LATENCY"}, ov.Core()
    requests = {
        form: core.compile_model(model, "CPU", properties).create_infer_request()
        for form, model in models.items()
    }
    found: dict[str, dict[str, float]] = {form: {} for form in models}
    random = np.random.default_rng(0)
    for tokens in (DECODE_TOKENS, PREFILL_TOKENS):
        x = ov.Tensor(random.standard_normal((tokens, inputs), np.float32))
        taken: dict[str, list[float]] = {form: [] for form in models}
        for _ in range(1 + (DECODE_ROUNDS if tokens == DECODE_TOKENS else PREFILL_ROUNDS)):
            for form, request in requests.items():
                request.set_input_tensor(x)
                started = time.perf_counter()
                request.infer()
                taken[form].append(time.perf_counter() - started)
        for form, seconds in taken.items():
            found[form][str(tokens)] = min(seconds[1:]) / copies  # without the warmup
    return found


@functools.cache
def machine_key() -> str:
    """Return the machine's part of the cache key.

    It has the processor, number of allowed processors, kernels, and the versions of OpenVINO and of
    this package.
    """
    import openvino as ov

    from sqft_export.machine.counters import machine_facts

    facts = [machine_facts().processor, allowed_processors(), require_kernels().name]
    version = importlib.metadata.version("sqft-export")
    return json.dumps([MEASUREMENT_VERSION, version, ov.__version__, *facts])


def cache_file() -> Path:
    """Return ``execution.json`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sqft_export" / "execution.json"


class MeasurementCache:
    """The cached results of this machine and these versions."""

    def __init__(self) -> None:
        self.file = cache_file()
        try:
            document = read_json(self.file) if self.file.is_file() else {}
            mine = document.get(self._key(), {})
            self.known = {name: Choice(**entry) for name, entry in mine.items()}
        except (UserError, TypeError, AttributeError):  # a damaged cache is measured again
            document, self.known = {}, {}
        self.document = document

    def _key(self) -> str:
        return hashlib.sha256(machine_key().encode()).hexdigest()[:16]

    def get(self, shape: Shape) -> Choice | None:
        """Return the cached choice for a shape; None if it is missing or expired."""
        found = self.known.get(json.dumps(asdict(shape)))
        return found if found and found.is_current() else None

    def put(self, shape: Shape, choice: Choice) -> None:
        """Store a choice. With a read-only home it is measured again next time."""
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
    """Run the command ``python -m sqft_export.kernels.choice``."""
    file = cache_file()
    if arguments == ["--clear"]:
        file.unlink(missing_ok=True)
        print(f"{file}: cleared; kernels are measured again")
        return
    for shape, known in MeasurementCache().known.items():
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(known.until))
        print(f"{known.form:6} until {until}  {shape}")
    print(f"{file}; --clear deletes it, {EXECUTION_VARIABLE} fixes the kernel")


if __name__ == "__main__":
    _show_or_clear(sys.argv[1:])
