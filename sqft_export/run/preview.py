"""Preview a run: its passes, which of them are cached, and their predicted cost."""

from collections.abc import Iterable
from pathlib import Path

from sqft_export.artifacts.store import open_store
from sqft_export.data.first_example import first_example
from sqft_export.data.items import load_tokenizer
from sqft_export.kernels.extension import unavailable_reason
from sqft_export.kernels.library import find_kernels
from sqft_export.machine.launcher import check_launcher
from sqft_export.machine.limits import free_memory
from sqft_export.model.hub import model_folder
from sqft_export.numerics.codes import FLOAT16_BITS
from sqft_export.plan.budget import settings_for_a_day
from sqft_export.plan.chat import chat_of
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.disk import disk_bytes, predict_bytes
from sqft_export.plan.document import Need, PlanDocument, PlannedPass
from sqft_export.plan.exporters import drop_unsupported
from sqft_export.plan.gpus import gpu_needs
from sqft_export.plan.history import PassTime, pass_times
from sqft_export.plan.layout import Layout, fallback_sizes, group_sizes
from sqft_export.plan.memory import accelerator_bytes, predict_memory
from sqft_export.plan.peers import expectation
from sqft_export.plan.seconds import predict_seconds
from sqft_export.plan.speeds import Speeds, measure_speeds
from sqft_export.plan.warnings import plan_warnings
from sqft_export.plan.workload import Workload, workload_of
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import Planned, plan_passes
from sqft_export.targets.devices import why_not_run
from sqft_export.targets.grids import WeightGrid, describe_acceptance


def preview(recipe: Recipe, runs: Path) -> PlanDocument:
    """Return the document that `plan` prints.

    :param runs: folder of all runs.
    :raises UserError: if the recipe can't be run here.
    """
    recipe, folder, layout = _prepare_recipe(recipe)
    machine, workload = measure_speeds(layout, recipe.device), workload_of(recipe, folder)
    written, memory = predict_bytes(recipe, layout), predict_memory(recipe, layout, workload)
    steps = plan_passes(recipe, folder, open_store(runs / recipe.name))
    times = _pass_times(recipe, layout, machine, workload, steps, runs)
    wanted = [step.name for step in steps if step.artifact is None]
    needed, free = disk_bytes(recipe, layout, runs, wanted)
    needed += 0 if folder else (layout.weights + layout.others) * layout.width  # its download
    to_run = {name: time for name in wanted if (time := times[name])}
    to_run_seconds = {name: time.seconds for name, time in to_run.items()}
    return PlanDocument(
        recipe=recipe.name,
        model=str(folder or f"{recipe.model.hub} (not on this machine)"),
        weights=layout.weights + layout.others,
        passes=[_planned_pass(s, written[s.name], times[s.name], memory[s.name]) for s in steps],
        group_size=recipe.quantize.group_size,
        group_size_fallback=fallback_sizes(recipe, layout),
        disk=Need(needed_bytes=needed, free_bytes=free),
        memory=_largest_need(memory, wanted, free_memory()),
        device_memory=_device_memory(recipe, machine, memory, wanted),
        gpus=gpu_needs(recipe, layout, workload),
        machine=machine,
        lengths_counted=workload.counted,
        seconds=sum(to_run_seconds.values()),
        seconds_range=_total_range(to_run.values()),
        within_a_day=settings_for_a_day(recipe, dict(to_run_seconds), workload),
        expectation=expectation(recipe, workload),
        first_example=_first_example(recipe, layout),
        gguf=_gguf_text(recipe),
        sparse_execution=_kernels_text(recipe),
        accepted_by=_acceptance_of(recipe, layout),
        warnings=list(plan_warnings(recipe, layout)),
    )


def _prepare_recipe(recipe: Recipe) -> tuple[Recipe, Path | None, Layout]:
    """Return the recipe without unsupported targets, the base model's folder, and its layout.

    The folder is None if the model is not on this machine.

    :raises UserError: if the recipe can't be run here.
    """
    check_launcher()
    folder = model_folder(recipe, download=False)
    layout = check_recipe(recipe, folder)
    return drop_unsupported(recipe, layout), folder, layout


def _pass_times(
    recipe: Recipe,
    layout: Layout,
    machine: Speeds,
    workload: Workload,
    steps: list[Planned],
    runs: Path,
) -> dict[str, PassTime | None]:
    """Return the predicted time of every pass; earlier runs correct the prediction."""
    predicted = predict_seconds(recipe, layout, machine, workload)
    return pass_times(predicted, {step.name: step.facts for step in steps}, runs)


def _total_range(times: Iterable[PassTime]) -> tuple[float, float]:
    """Return the range of the total time of passes, in seconds."""
    low, high = 0.0, 0.0
    for time in times:
        low, high = low + time.range[0], high + time.range[1]
    return low, high


def _planned_pass(step: Planned, written: int, time: PassTime | None, memory: float) -> PlannedPass:
    """Return a pass with its predicted cost, and the seconds that it took if it is cached."""
    made = step.artifact
    return PlannedPass(
        name=step.name,
        predicted_bytes=written,
        predicted_seconds=time.seconds if time else None,
        seconds_range=time.range if time else None,
        seconds_from=time.source if time else None,
        predicted_memory_bytes=int(memory),
        key=step.key[:16],
        cached=made is not None,
        taken_seconds=made.manifest["seconds"] if made else None,
    )


def _largest_need(memory: dict[str, float], wanted: list[str], free: int) -> Need:
    most = max((memory[name] for name in wanted), default=0)
    return Need(needed_bytes=int(most), free_bytes=free)


def _device_memory(
    recipe: Recipe, machine: Speeds, memory: dict[str, float], wanted: list[str]
) -> Need | None:
    """Return the needed and free bytes on the accelerator; None without an accelerator."""
    if machine.device.memory is None:
        return None
    on_device = accelerator_bytes(recipe, memory, wanted)
    return _largest_need(on_device, list(on_device), machine.device.memory)


def _first_example(recipe: Recipe, layout: Layout) -> str | None:
    """Return the first training example of a chat task; None if it is not on this machine."""
    if chat_of(recipe, layout) is None or layout.folder is None:
        return None
    return first_example(recipe, load_tokenizer(layout.folder))


def _gguf_text(recipe: Recipe) -> str | None:
    """Return how llama.cpp's format changes scales and head, and why the file can't be run here.

    None if it is no target.
    """
    if "gguf" not in recipe.export.targets:
        return None
    notes = []
    if recipe.scale_bits < FLOAT16_BITS:
        notes.append(
            f"scales have {recipe.scale_bits} significant bits, so that GGUF blocks can store them "
            "with their zero points"
        )
    if recipe.export.gguf_head != "float":
        notes.append("codes bit for bit; a float head may become Q8_0 (export.gguf_head)")
    if missing := why_not_run("gguf", recipe.unmerged):
        notes.append(f"not run in the deployed form: {missing}")
    return "; ".join(notes) or "bit for bit"


def _acceptance_of(recipe: Recipe, layout: Layout) -> dict[str, str]:
    """Return which devices take the decoder's codes; {} if they are not known before the run."""
    quantize = recipe.quantize
    if quantize.method not in ("gptq", "rtn"):
        return {}
    sizes = group_sizes(recipe, layout)
    grids = [
        WeightGrid(name, *layout.linears[name], quantize.bits, size, quantize.symmetric)
        for name, size in sizes.items()
    ]
    runtimes = [name for name in ("openvino",) if name in recipe.export.targets]
    found: dict[str, str] = {}
    for runtime in (*runtimes, "torch"):  # the merged folder is written by every run
        found |= describe_acceptance(runtime, grids)
    return found


def _kernels_text(recipe: Recipe) -> str | None:
    """Return which kernels execute sparse weights here, or why none can; None if not requested."""
    if not recipe.export.sparse_execution:
        return None
    found = find_kernels()
    missing = unavailable_reason()
    return f"not here: {missing}" if missing or not found else f"on {found.name} kernels"
