"""Check everything, key each pass, skip or run it, seal what it made."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqft_export.errors import HostError, UserError
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
from sqft_export.run.artifact import Artifact, Store, environment, key_of, read_artifact
from sqft_export.run.digests import Digests, pin_revisions
from sqft_export.run.gates import QualityGates
from sqft_export.run.host import lacking, out_of_memory, require_space
from sqft_export.run.launcher import (
    check_launcher,
    first_process_presence,
    first_process_works,
    process_count,
    process_rank,
    wait_for_first,
)
from sqft_export.run.precision import resolve_precision
from sqft_export.run.processors import (
    THREADS_FILE,
    Sample,
    busy_text,
    sample,
    used_by_others,
)
from sqft_export.run.progress import Start, reporting, silent
from sqft_export.stages import Context, stage_of
from sqft_export.untrusted import fault_of_file

# What takes less memory, by pass.
LESS_MEMORY = {
    "sparsify": "calibration.samples or calibration.sequence_length",
    "reconstruct": "sparsify.reconstruct.batch or calibration.samples",
    "quantize": "calibration.samples or calibration.sequence_length",
    "adapt": "adapt.batch (and raise adapt.accumulation) or task.sequence_length, or set "
    "adapt.gradient_checkpointing: true",
    "verify": "verify.prompts",
    "benchmark": "benchmark.items",
}
LESS_MEMORY["teacher"] = LESS_MEMORY["adapt"]


@dataclass(frozen=True)
class Planned:
    """A pass of this recipe with its key, and its artifact if there is one already."""

    name: str
    facts: dict[str, Any]
    artifact: Artifact | None

    @property
    def key(self) -> str:
        return key_of(self.facts)


def needed_passes(recipe: Recipe, last: tuple[str, ...]) -> list[str]:
    """The passes of the recipe in order: all, or those that ``last`` are made from."""
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
    """Every pass of the recipe in order, keyed by its facts; up to ``last`` if given.

    :param online: the hub may be asked for commits of datasets.
    """
    recipe = resolve_precision(pin_revisions(recipe, online), store.root)
    found = Digests(recipe, folder, store)
    planned: dict[str, Planned] = {}
    for name in needed_passes(recipe, last):
        stage = stage_of(name)
        facts = {
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
    """What a pass may read of the recipe."""
    stage = stage_of(name)
    return view_of(recipe, (*stage.fields(recipe, name), *stage.FREE))


def _own(file: Path) -> IO[str]:
    """A file of ours, opened for appending; never what a link of its name leads to.

    :raises UserError: if it is one.
    """
    if file.is_symlink():
        raise UserError(f"{file}: is a link; a file of ours is written there")
    if os.path.lexists(file) and (fault := fault_of_file(file)):
        raise UserError(f"{file}: {fault}")
    return file.open("a")


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[IO[str]]:
    """Send what libraries print, from Python or native code, to ``log``; yield the real stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with _own(log) as file, os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, original in zip((1, 2), saved, strict=True):
                os.dup2(original, target)
                os.close(original)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Refuse a second run in the same folder; the lock goes with the process."""
    root.mkdir(parents=True, exist_ok=True)
    with _own(root / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{root}: another run is working here") from error
        with first_process_presence(root):
            yield


def _affordable(
    recipe: Recipe, folder: Path, layout: Layout, store: Store, last: tuple[str, ...]
) -> list[Planned]:
    """Every pass, once disk and memory are known to hold those that are to run."""
    steps = plan_passes(recipe, folder, store, last)
    wanted = [step.name for step in steps if step.artifact is None]
    check_disk(recipe, layout, store.root, wanted)
    if wanted:
        check_memory(recipe, layout, workload_of(recipe, folder), wanted)
    return steps


def _follow(
    recipe: Recipe, folder: Path, layout: Layout, store: Store, last: tuple[str, ...]
) -> dict[str, Artifact]:
    """Train along as another process of a launcher than the first; else wait for the first.

    Should the first one fail, the launcher ends the others.
    """
    artifacts: dict[str, Artifact] = {}
    store.root.mkdir(parents=True, exist_ok=True)
    recipe = resolve_precision(recipe, store.root)
    with _quiet(store.root / f"log-{process_rank()}.txt") as terminal:
        for step in _affordable(recipe, folder, layout, store, last):
            sealed = store.path_of(step.name, step.key)
            if not sealed.exists():
                said = f"process {process_rank()} of {process_count()} waits for the first one"
                print(f"{step.name:16} {said}", file=terminal, flush=True)
                _join(step, recipe, folder, artifacts, store)
            artifacts[step.name] = read_artifact(sealed)
    return artifacts


def _join(
    step: Planned, recipe: Recipe, folder: Path, artifacts: dict[str, Artifact], store: Store
) -> None:
    """Take part in a pass that several processes run, until the first one has sealed it."""
    stage, sealed = stage_of(step.name), store.path_of(step.name, step.key)
    wait_for_first(store.root, lambda: sealed.exists() or first_process_works(store.root))
    if stage.DISTRIBUTED and not sealed.exists():
        inputs = {n: artifacts[n] for n in stage.CONSUMES if n in artifacts}
        partial = store.partial_of(step.name, step.key)
        view, lineage = _view_of(recipe, step.name), {step.name: step.facts}
        stage.run(Context(step.name, view, folder, inputs, partial, silent, lineage))
    wait_for_first(store.root, sealed.exists)


def _checked(recipe: Recipe, root: Path) -> tuple[Recipe, Path, Layout]:
    """The recipe without targets that the model cannot have, the base model's folder, fetched if
    need be, and its layout.

    :raises UserError: if the recipe can't be run here.
    """
    folder = model_folder(recipe, download=False)
    if folder is None:
        folder = _fetched(recipe, root)
    layout = check_recipe(recipe, folder)
    return drop_unsupported(recipe, layout), folder, layout


def _fetched(recipe: Recipe, root: Path) -> Path:
    """The base model from the hub, once recipe and disk are known to be fit for it."""
    layout = check_recipe(recipe, None) if recipe.model.config else None
    download = planned_download(recipe)
    require_space(download.cache, download.bytes, f"; {download.hub} is downloaded there")
    if layout:
        check_disk(recipe, layout, root, pass_names(recipe), download)
    return download_model(recipe, download)


def _lineage(step: Planned, artifacts: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Facts of the passes that one is made from, in the order they ran, and its own."""
    wanted = set(stage_of(step.name).CONSUMES)
    for other in reversed(artifacts):
        if other in wanted:
            wanted |= set(stage_of(other).CONSUMES)
    found = {other: a.manifest["facts"] for other, a in artifacts.items() if other in wanted}
    return found | {step.name: step.facts}


def _elsewhere(artifact: Artifact) -> str:
    """Says so where an artifact was made on another machine, whose rounding may differ."""
    made = artifact.manifest["environment"]
    name, threads = made.get("processor"), made.get("threads")
    here = environment()
    if (name, threads) == (here["processor"], here["threads"]):
        return ""
    return f" (made with {threads} threads on {name}; here bytes may come out otherwise)"


def _run_pass(
    step: Planned,
    recipe: Recipe,
    folder: Path,
    artifacts: dict[str, Artifact],
    store: Store,
    start: Start,
) -> Artifact:
    stage = stage_of(step.name)
    inputs = {n: artifacts[n] for n in stage.CONSUMES if n in artifacts}
    partial = store.open_partial(step.name, step.key, stage.RESUMES)
    started = time.monotonic()
    try:
        view, lineage = _view_of(recipe, step.name), _lineage(step, artifacts)
        metrics = stage.run(Context(step.name, view, folder, inputs, partial, start, lineage))
        return store.seal(partial, step.name, step.facts, metrics, time.monotonic() - started)
    except Exception as error:
        if reason := lacking(error, partial):
            lower = LESS_MEMORY.get(step.name) if out_of_memory(error) else None
            way_out = f"; lower {lower}" if lower else ""
            raise HostError(
                f"{step.name}: {reason}{way_out}. The passes before it are kept; run again to go on"
            ) from error
        raise


def _busy(before: Sample | None) -> str:
    """Says so where a pass shared the machine; processes of a launcher are no others."""
    found = busy_text(used_by_others(before)) if process_count() == 1 else None
    return f" (busy machine: {found})" if found else ""


def run_recipe(recipe: Recipe, root: Path, last: tuple[str, ...] = ()) -> dict[str, Artifact]:
    """Run or skip every pass; returns the artifacts by pass name.

    :param root: folder of this recipe's artifacts.
    :param last: passes to stop at; only these and what they are made from is run.
    :raises UserError: before any work if the recipe can't be run here.
    """
    check_launcher()
    recipe, folder, layout = _checked(recipe, root)
    recipe, store = pin_revisions(recipe, online=True), Store(root)
    if process_rank():
        return _follow(recipe, folder, layout, store, last)
    artifacts: dict[str, Artifact] = {}
    gates = QualityGates(recipe, folder, root)
    with _alone(root), _quiet(root / "log.txt") as terminal, reporting(terminal) as reporter:
        with _own(root / THREADS_FILE) as file:
            file.truncate(0)
            file.write(str(environment()["threads"]))
        recipe = resolve_precision(recipe, root)
        for warning in plan_warnings(recipe, layout):
            reporter.say(f"warning: {warning}")
        for step in _affordable(recipe, folder, layout, store, last):
            warnings = list[str]()
            if step.artifact is not None:
                artifacts[step.name] = step.artifact
                reporter.say(f"{step.name:16} cached{_elsewhere(step.artifact)}")
            else:
                start, before = reporter.start_of(step.name), sample()
                made = _run_pass(step, recipe, folder, artifacts, store, start)
                artifacts[step.name] = made
                line = f"{step.name:16} {made.manifest['seconds']:.1f} s{_busy(before)}"
                reporter.say(line)
                print(line, flush=True)  # in the log
                warnings = made.metrics.get("warnings", [])
            for warning in (*warnings, *gates.check(step.name, artifacts)):
                reporter.say(f"warning: {warning}")
    return artifacts
