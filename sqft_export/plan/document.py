"""The prediction of ``plan`` as a typed document."""

from pydantic import Field

from sqft_export.documents import Document
from sqft_export.plan.speeds import Speeds


class PlannedPass(Document):
    """A pass with its predicted cost.

    predicted_bytes: on disk.
    predicted_seconds, seconds_range, seconds_from: the time, its range and its source, see
        ``plan.history``; None if it depends on data that is not on this machine.
    key: beginning of the cache key.
    taken_seconds: measured duration of a cached pass.
    """

    name: str = Field(alias="pass")
    predicted_bytes: int
    predicted_seconds: float | None
    seconds_range: tuple[float, float] | None
    seconds_from: str | None
    predicted_memory_bytes: int
    key: str
    cached: bool
    taken_seconds: float | None


class Need(Document):
    """Bytes of a resource that the run needs, and that are free."""

    needed_bytes: int
    free_bytes: int


class GpuNeed(Document):
    """The smallest number of GPUs of one size; training is sharded with FSDP2.

    gpu_bytes: of each GPU.
    count: None if the bytes that each GPU needs do not fit, however many there are.
    needed_bytes: on each GPU, of the pass that needs most.
    too_large: pass that holds the whole model on a GPU, and does not fit -> its bytes.
    """

    gpu_bytes: int
    count: int | None
    needed_bytes: int
    too_large: dict[str, int]


class PlanDocument(Document):
    """The prediction for a recipe on this machine.

    model: folder or name of the base model.
    group_size_fallback: Linear -> its group size, if it is not the requested one.
    memory, device_memory: of the pass that needs most; None without an accelerator.
    gpus: the smallest number of GPUs of common sizes.
    lengths_counted: how the lengths of the data were counted, see ``plan.workload``.
    seconds, seconds_range: of all passes that are not cached.
    within_a_day: settings with which the run takes less than a day, if it takes longer.
    first_example: the first training example of a chat task, with its loss mask marked.
    expectation: which deployment the report will probably recommend; None without training.
    gguf, sparse_execution: notes about these deployments; None if they are not requested.
    accepted_by: device that this machine lacks -> whether it takes the codes, with the source.
    """

    recipe: str
    model: str
    weights: int
    passes: list[PlannedPass]
    group_size: int | None
    group_size_fallback: dict[str, int]
    disk: Need
    memory: Need
    device_memory: Need | None
    gpus: list[GpuNeed]
    machine: Speeds
    lengths_counted: str
    seconds: float
    seconds_range: tuple[float, float]
    within_a_day: str | None
    expectation: str | None
    gguf: str | None
    sparse_execution: str | None
    accepted_by: dict[str, str]
    first_example: str | None
    warnings: list[str]
