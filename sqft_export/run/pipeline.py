"""Run a recipe: check everything first, key each pass, run it or reuse its artifact."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from sqft_export.artifacts.claims import Claim, ClaimLostError, claimed_folder
from sqft_export.artifacts.store import (
    Artifact,
    Facts,
    Store,
    environment,
    key_of,
    open_store,
    read_artifact,
)
from sqft_export.errors import HostError, UserError
from sqft_export.machine.device import device_of, use_own_accelerator
from sqft_export.machine.host import exhausted_resource, out_of_memory, require_space
from sqft_export.machine.launcher import (
    check_launcher,
    first_process_presence,
    first_process_works,
    local_rank,
    on_one_machine,
    process_count,
    process_rank,
    wait_for_first,
)
from sqft_export.machine.precision import resolve_precision
from sqft_export.machine.processes import Processes, join_processes
from sqft_export.machine.processors import (
    THREADS_FILE,
    Sample,
    busy_text,
    sample,
    used_by_others,
)
from sqft_export.machine.progress import Listener, Reporter, Start, report_progress, silent
from sqft_export.metrics import Metrics, read_metrics
from sqft_export.model.block_state import STATES
from sqft_export.model.hub import download_model, model_folder, planned_download
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.disk import check_disk
from sqft_export.plan.exporters import drop_unsupported
from sqft_export.plan.layout import Layout
from sqft_export.plan.memory import check_memory
from sqft_export.plan.warnings import plan_warnings
from sqft_export.plan.workload import workload_of
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.view import values_of, view_of
from sqft_export.report.loggers import RunLoggers, open_loggers
from sqft_export.run.base import base_folder
from sqft_export.run.digests import Digests, pin_revisions
from sqft_export.run.gates import QualityGates
from sqft_export.run.output import open_output, open_run_file
from sqft_export.stages import Context, stage_of

# Settings that lower the memory of a pass, for its out-of-memory message.
MEMORY_SETTINGS = {
    "sparsify": "calibration.samples or calibration.sequence_length",
    "reconstruct": "sparsify.reconstruct.batch or calibration.samples",
    "quantize": "calibration.samples or calibration.sequence_length",
    "adapt": "adapt.batch (and raise adapt.accumulation) or task.sequence_length, or set "
    "adapt.gradient_checkpointing: true",
    "verify": "verify.prompts",
    "benchmark": "benchmark.items",
}
MEMORY_SETTINGS["teacher"] = MEMORY_SETTINGS["adapt"]
_START = "start"  # name of the group of processes that agree on a run
_PREPARING_TURNS = 2  # the first process of every machine, then all others
# The comparison with other models may take as long as the model itself.
USABLE = "The deployments are verified and are measured now. Try one: sqft-export chat {root}"


@dataclass(frozen=True)
class Planned:
    """A pass of this recipe with its key, and its artifact if it is already sealed."""

    name: str
    facts: Facts
    artifact: Artifact | None

    @property
    def key(self) -> str:
        return key_of(self.facts)


def needed_passes(recipe: Recipe, last: tuple[str, ...]) -> list[str]:
    """List the passes of the recipe in order.

    :param last: only these passes and the passes that they depend on; empty: all passes.
    """
    names = pass_names(recipe)
    if not last:
        return names
    needed = set(last)
    for at, name in reversed(list(enumerate(names))):
        if name in needed:
            needed |= set(stage_of(name).CONSUMES) & set(names[:at])
    return [name for name in names if name in needed]


def plan_passes(
    recipe: Recipe,
    folder: Path | None,
    store: Store,
    last: tuple[str, ...] = (),
    online: bool = False,
) -> list[Planned]:
    """Return the passes of the recipe in order, each keyed by its facts.

    :param folder: folder of the base model; None if it is only on the hub.
    :param last: only these passes and the passes that they depend on; empty: all passes.
    :param online: query the hub for commits of datasets.
    """
    recipe = resolve_precision(pin_revisions(recipe, online), store.root)
    found = Digests(recipe, folder, store)
    planned: dict[str, Planned] = {}
    for name in needed_passes(recipe, last):
        stage = stage_of(name)
        facts: Facts = {
            "stage": name,
            "version": stage.VERSION,
            "options": values_of(recipe, stage.fields(recipe, name)),
            "reads": {source: found[source] for source in stage.READS},
            "parents": {p: planned[p].key for p in stage.CONSUMES if p in planned},
        }
        planned[name] = Planned(name, facts, store.find(name, key_of(facts)))
    store.hashes.save()
    return list(planned.values())


def _view_of(recipe: Recipe, name: str) -> Recipe:
    """Return the part of the recipe that a pass may read."""
    stage = stage_of(name)
    return view_of(recipe, (*stage.fields(recipe, name), *stage.FREE))


@contextlib.contextmanager
def _lock_run_folder(root: Path) -> Iterator[None]:
    """Lock the run's folder until the context or the process ends.

    :raises UserError: if another process holds the lock.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = root / ".lock"
    open_run_file(lock).close()
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{root}: another run is working here") from error
    with held, first_process_presence(root):
        yield


def _plan_within_limits(
    recipe: Recipe, folder: Path, layout: Layout, store: Store, last: tuple[str, ...]
) -> list[Planned]:
    """Return the passes, after checking that disk and memory suffice for those to be run."""
    steps = plan_passes(recipe, folder, store, last)
    wanted = [step.name for step in steps if step.artifact is None]
    check_disk(recipe, layout, store.root, wanted)
    if wanted:
        check_memory(recipe, layout, workload_of(recipe, folder), wanted)
    return steps


@dataclass(frozen=True)
class _Decision:
    """The choices of the first of several processes, which hold for all.

    recipe: with the commits of its datasets, its precision, and without unsupported targets.
    device: kind of the device that torch computes on.
    steps: passes with their keys, and which of them are sealed.
    """

    recipe: Recipe
    device: str
    steps: list[Planned]


def _decide(
    processes: Processes,
    recipe: Recipe,
    folder: Path,
    layout: Layout,
    store: Store,
    last: tuple[str, ...],
) -> tuple[Recipe, list[Planned]]:
    """Return the recipe with its precision, and its passes, after all processes have got them."""
    if store.remote and not on_one_machine():
        raise UserError(
            f"--runs: {store.remote.url}: found a launcher with processes on several machines, "
            "which need a shared folder; a URL goes with processes on one machine, --ray and "
            "--shard"
        )
    undecided, recipe = recipe, resolve_precision(recipe, store.root)
    if store.share_records():  # another machine was faster
        recipe = resolve_precision(undecided, store.root)
    steps = _plan_within_limits(recipe, folder, layout, store, last)
    if store.share_records():
        steps = _plan_within_limits(recipe, folder, layout, store, last)
    if processes.count > 1:
        processes.gather(_Decision(recipe, device_of(recipe.device).type, steps))
        for _ in range(_PREPARING_TURNS):
            processes.gather(None)
    return recipe, steps


def _accept_decision(processes: Processes, root: Path) -> tuple[_Decision, Path]:
    """Return the first process's decision, and the folder of the base model on this machine.

    The first process of each machine downloads a missing model.

    :raises UserError: if this process can't do what was decided; all processes get the error.
    """
    decided: _Decision = processes.gather(None)[0]  # type: ignore[assignment]
    device = device_of(decided.recipe.device).type
    if device != decided.device:
        raise HostError(
            f"device: process {processes.number} found {device}, process 0 has {decided.device}; "
            "set device=cpu, or start processes only where there is such a device"
        )
    folder = root
    for turn in range(_PREPARING_TURNS):
        if turn == min(local_rank(), _PREPARING_TURNS - 1):
            folder = prepare_recipe(decided.recipe, root)[1]
        processes.gather(None)
    return decided, folder


def _run_as_other_rank(recipe: Recipe, root: Path, redirect: bool) -> dict[str, Artifact]:
    """Run as a launcher's process with a rank above 0.

    Such a process takes part in distributed passes and otherwise waits for the first process. If
    the first process fails, the launcher ends the others.
    """
    artifacts: dict[str, Artifact] = {}
    root.mkdir(parents=True, exist_ok=True)
    with join_processes(_START) as processes:
        decided, folder = _accept_decision(processes, root)
    store = Store(root)
    with open_output(root / f"log-{process_rank()}.txt", redirect) as output:
        for step in decided.steps:
            sealed = store.path_of(step.name, step.key)
            if not sealed.exists():
                note = f"process {process_rank()} of {process_count()} waits for the first one"
                print(f"{step.name:16} {note}", file=output.terminal, flush=True)
                _join_pass(step, decided.recipe, folder, artifacts, store)
            artifacts[step.name] = read_artifact(sealed)
    return artifacts


def _join_pass(
    step: Planned, recipe: Recipe, folder: Path, artifacts: dict[str, Artifact], store: Store
) -> None:
    """Wait until an artifact is sealed; take part in its pass if that is distributed."""
    stage, sealed = stage_of(step.name), store.path_of(step.name, step.key)
    if step.artifact is None:
        wait_for_first(store.root, lambda: sealed.exists() or first_process_works(store.root))
    if step.artifact is None and stage.DISTRIBUTED and not sealed.exists():
        inputs = {n: artifacts[n] for n in stage.CONSUMES if n in artifacts}
        partial = claimed_folder(sealed)
        base = base_folder(folder, store.root, store.hashes.sha256_of, write=False)
        wait_for_first(store.root, base.is_dir)
        view, lineage = _view_of(recipe, step.name), {step.name: step.facts}
        stage.run(Context(step.name, view, base, inputs, partial, silent, lineage))
    wait_for_first(store.root, sealed.exists)


def prepare_recipe(recipe: Recipe, root: Path) -> tuple[Recipe, Path, Layout]:
    """Return the recipe without unsupported targets, the base model's folder, and its layout.

    A missing base model is downloaded.

    :raises UserError: if the recipe can't be run here.
    """
    folder = model_folder(recipe, download=False)
    if folder is None:
        folder = _download_base(recipe, root)
    layout = check_recipe(recipe, folder)
    return drop_unsupported(recipe, layout), folder, layout


def _download_base(recipe: Recipe, root: Path) -> Path:
    """Download the base model, after checking the recipe and the disk; return its folder."""
    layout = check_recipe(recipe, None) if recipe.model.config else None
    download = planned_download(recipe)
    require_space(download.cache, download.bytes, f"; {download.hub} is downloaded there")
    if layout:
        check_disk(recipe, layout, root, pass_names(recipe), download)
    return download_model(recipe, download)


def _lineage(step: Planned, artifacts: dict[str, Artifact]) -> dict[str, Facts]:
    """Return the facts of a pass and of all passes it depends on, in the order they ran."""
    wanted = set(stage_of(step.name).CONSUMES)
    for other in reversed(artifacts):
        if other in wanted:
            wanted |= set(stage_of(other).CONSUMES)
    found = {other: a.manifest["facts"] for other, a in artifacts.items() if other in wanted}
    return found | {step.name: step.facts}


def _machine_note(artifact: Artifact) -> str:
    """Return a note if an artifact comes from another processor or number of threads."""
    made = artifact.manifest["environment"]
    name, threads = made.get("processor"), made.get("threads")
    here = environment()
    if (name, threads) == (here["processor"], here["threads"]):
        return ""
    return f" (made with {threads} threads on {name}; results may differ on this machine)"


def _run_pass(
    step: Planned,
    recipe: Recipe,
    folder: Path,
    artifacts: dict[str, Artifact],
    store: Store,
    start: Start,
    loggers: RunLoggers,
    claim: Claim | None = None,
) -> Artifact:
    """Run a pass and seal its artifact.

    :raises ClaimLostError: if another worker has taken over the pass.
    :raises HostError: naming the pass and a setting that helps, if a resource is exhausted.
    """
    stage = stage_of(step.name)
    inputs = {n: artifacts[n] for n in stage.CONSUMES if n in artifacts}
    partial = store.open_partial(step.name, step.key, stage.RESUMES, claim)
    started = time.monotonic()
    try:
        base = base_folder(folder, store.root, store.hashes.sha256_of, write=True)
        view, lineage = _view_of(recipe, step.name), _lineage(step, artifacts)
        callbacks = loggers.training_callbacks(step.name)
        context = Context(step.name, view, base, inputs, partial, start, lineage, callbacks)
        metrics = stage.run(context)
        seconds = time.monotonic() - started
        made = (partial, step.name, step.facts, metrics.to_json(), seconds)
        return store.seal(*made, claim, STATES)
    except Exception as error:
        if claim and claim.is_lost():  # its files may have been deleted
            raise ClaimLostError(f"{partial}: another worker has taken over this pass") from error
        if reason := exhausted_resource(error, partial):
            lower = MEMORY_SETTINGS.get(step.name) if out_of_memory(error) else None
            advice = f"; lower {lower}" if lower else ""
            raise HostError(
                f"{step.name}: {reason}{advice}. Finished passes are kept; run again to resume"
            ) from error
        raise


def _busy_note(before: Sample | None) -> str:
    """Return a note if other programs used the processors during a pass.

    There is no note under a launcher: its processes would count as other programs.
    """
    found = busy_text(used_by_others(before)) if process_count() == 1 else None
    return f" (busy machine: {found})" if found else ""


def _run_or_wait(
    step: Planned,
    recipe: Recipe,
    folder: Path,
    artifacts: dict[str, Artifact],
    store: Store,
    reporter: Reporter,
    loggers: RunLoggers,
) -> tuple[Artifact, bool]:
    """Return the artifact of a pass, and whether another worker has made it meanwhile."""
    path = store.path_of(step.name, step.key)

    def report_wait(owner: str) -> None:
        reporter.say(f"{step.name:16} waits for {owner}", step.name)

    while True:
        with store.claim(step.name, step.key, report_wait) as claim:
            if claim is None:
                return read_artifact(path), True
            start = reporter.start_of(step.name)
            with contextlib.suppress(ClaimLostError):
                parts = (step, recipe, folder, artifacts, store, start, loggers, claim)
                return _run_pass(*parts), False


def _obtain(
    step: Planned,
    recipe: Recipe,
    folder: Path,
    artifacts: dict[str, Artifact],
    store: Store,
    reporter: Reporter,
    log: IO[str],
    loggers: RunLoggers,
) -> list[str]:
    """Add the artifact of a pass, cached or new, to ``artifacts``; return a new one's warnings."""
    if step.artifact is not None:
        artifacts[step.name] = store.fetch(step.artifact)
        reporter.say(f"{step.name:16} cached{_machine_note(step.artifact)}", step.name)
        return []
    before = sample()
    made, by_other = _run_or_wait(step, recipe, folder, artifacts, store, reporter, loggers)
    artifacts[step.name] = made
    note = " (another worker)" if by_other else _busy_note(before)
    line = f"{step.name:16} {made.manifest['seconds']:.1f} s{note}"
    reporter.say(line, step.name)
    print(line, file=log, flush=True)
    return read_metrics(made, Metrics).warnings


@contextlib.contextmanager
def _open_run(
    root: Path, redirect: bool, listener: Listener | None, worker: str
) -> Iterator[tuple[Reporter, IO[str]]]:
    """Open the run's folder and record the threads; yield the reporter and the log.

    The folder is locked, unless it is shared with other workers.
    """
    root.mkdir(parents=True, exist_ok=True)
    log = root / (f"log-{worker}.txt" if worker else "log.txt")
    with (
        contextlib.nullcontext() if worker else _lock_run_folder(root),
        open_output(log, redirect) as output,
        report_progress(output.terminal, output.log, output.for_caller(listener)) as reporter,
    ):
        with open_run_file(root / THREADS_FILE) as file:
            file.truncate(0)
            file.write(str(environment()["threads"]))
        yield reporter, output.log


def run_recipe(
    recipe: Recipe,
    root: Path,
    last: tuple[str, ...] = (),
    redirect: bool = False,
    listener: Listener | None = None,
    worker: str = "",
) -> dict[str, Artifact]:
    """Run every pass that has no artifact yet, and return all artifacts by pass name.

    :param root: folder of this recipe's artifacts.
    :param last: only these passes and the passes that they depend on; empty: all passes.
    :param redirect: redirect this process's file descriptors to the log (``run/output.py``).
    :param listener: called with the progress of every pass, in place of lines on stderr.
    :param worker: name of this process among several that share the folder, for its log. Empty: no
        other process uses the folder.
    :raises UserError: before any work, if the recipe can't be run here.
    """
    check_launcher()
    use_own_accelerator()
    if process_rank():
        return _run_as_other_rank(recipe, root, redirect)
    artifacts = dict[str, Artifact]()
    with contextlib.ExitStack() as run:
        with join_processes(_START) as processes:
            recipe, folder, layout = prepare_recipe(recipe, root)
            recipe, store = pin_revisions(recipe, online=True), open_store(root)
            reporter, log = run.enter_context(_open_run(root, redirect, listener, worker))
            loggers = run.enter_context(open_loggers(recipe, root))
            _say_warnings(reporter, plan_warnings(recipe, layout))
            recipe, steps = _decide(processes, recipe, folder, layout, store, last)
        gates = QualityGates(recipe, folder, store)
        for step in steps:
            warnings = _obtain(step, recipe, folder, artifacts, store, reporter, log, loggers)
            warnings += _judge(step, artifacts, gates, loggers, store)
            _say_warnings(reporter, warnings)
            if step.name == "verify" and step.artifact is None and step is not steps[-1]:
                reporter.say(USABLE.format(root=root))
    return artifacts


def _judge(
    step: Planned,
    artifacts: dict[str, Artifact],
    gates: QualityGates,
    loggers: RunLoggers,
    store: Store,
) -> list[str]:
    """Measure and log what a pass costs, also if a gate stops the run; return warnings."""
    try:
        return gates.check(step.name, artifacts)
    finally:
        loggers.log_pass(artifacts[step.name])
        store.share_records()


def _say_warnings(reporter: Reporter, warnings: Iterable[str]) -> None:
    for warning in warnings:
        reporter.say(f"warning: {warning}")
