"""A sweep on Ray: the passes that combinations share run once, all others side by side."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft_export.artifacts.remote import url_of
from sqft_export.errors import HostError, UserError
from sqft_export.machine.host import allowed_processors, size_text
from sqft_export.run.combinations import Sweep
from sqft_export.run.ray_pass import PassOutcome, PassRequest, run_pass
from sqft_export.run.sweeps import TIMED_PASSES, PassTask, pass_tasks

if TYPE_CHECKING:
    from ray import ObjectRef

MAX_RETRIES = 3  # of a pass whose process or machine fails; the pass resumes
MAX_PROCESSORS = 8  # of a pass without --threads
STATUS_SECONDS = 60.0
_LOCAL = "local"


def run_passes(sweep: Sweep, runs: Path, threads: int | None, address: str | None) -> None:
    """Run the unique passes of all combinations on a cluster.

    :param runs: absolute path of a folder that all machines of the cluster reach, or local copy of
        an object store that they reach.
    :param threads: processors of each pass; None takes at most ``MAX_PROCESSORS``.
    :param address: of a running cluster; None starts one on this machine.
    :raises UserError: the first error of a pass, after all passes that do not depend on it.
    """
    import ray

    tasks = pass_tasks(sweep, runs)
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address:
        ray.init(address, **quiet)
    else:
        ray.init(_LOCAL, num_cpus=allowed_processors(), include_dashboard=False, **quiet)
    try:
        outcomes = dict(_finish_passes(sweep, runs, threads, tasks))
    finally:
        ray.shutdown()
    print(_table(tasks, outcomes), file=sys.stderr)
    failed = [(key, found) for key, found in outcomes.items() if found.code and not found.skipped]
    for key, found in failed:
        error = UserError(f"{tasks[key].label}: {found.error}")
        error.code = found.code
        raise error


def _finish_passes(
    sweep: Sweep, runs: Path, threads: int | None, tasks: dict[str, PassTask]
) -> Iterator[tuple[str, PassOutcome]]:
    """Submit all passes and yield key and outcome of each as it ends; print a line per pass."""
    import ray

    cached = [task for task in tasks.values() if task.sealed]
    for task in cached:
        print(f"{task.label:32} cached", file=sys.stderr)
    pending = _submit(sweep, runs, threads, tasks)
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=STATUS_SECONDS)
        for reference in done:
            key = pending.pop(reference)
            outcome = _outcome_of(reference)
            left = f"{len(pending)} of {len(tasks) - len(cached)} passes left"
            print(f"{tasks[key].label:32} {_state_text(outcome)}; {left}", file=sys.stderr)
            yield key, outcome


def _submit(
    sweep: Sweep, runs: Path, threads: int | None, tasks: dict[str, PassTask]
) -> "dict[ObjectRef[Any], str]":
    """Submit every pass that is not sealed, after its parents; return reference -> key."""
    import ray

    # A process per pass, which sets its threads before it imports torch.
    remote = ray.remote(max_calls=1)(run_pass)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    references: dict[str, ObjectRef[Any]] = {}
    for key, task in tasks.items():
        if task.sealed:
            continue
        options = _resources(task, threads, nodes)
        request = PassRequest(
            sweep.recipe.absolute() if sweep.recipe.exists() else sweep.recipe,
            task.settings,
            sweep.model_path,
            task.name,
            task.label,
            url_of(runs) or str(runs),
            int(options["num_cpus"]),
        )
        parents = [references[parent] for parent in task.parents if parent in references]
        chosen = remote.options(max_retries=MAX_RETRIES, **options)
        references[key] = chosen.remote(request, *parents)
    return {reference: key for key, reference in references.items()}


def _resources(
    task: PassTask, threads: int | None, nodes: list[dict[str, float]]
) -> dict[str, float]:
    """Return the processors, accelerators and memory that a pass reserves.

    A pass that times deployments reserves all processors of a machine.

    :raises HostError: if no machine of the cluster has them.
    """
    largest = max(int(node.get("CPU", 0)) for node in nodes)
    count = largest if task.name in TIMED_PASSES else min(threads or MAX_PROCESSORS, largest)
    accelerators = int(task.on_device and any(node.get("GPU") for node in nodes))
    fits = [node for node in nodes if node.get("CPU", 0) >= count]
    fits = [node for node in fits if node.get("GPU", 0) >= accelerators]
    memory = max((int(node.get("memory", 0)) for node in fits), default=0)
    if memory < task.memory:
        raise HostError(
            f"--ray: memory: {task.label} needs {size_text(task.memory)}; the machines of the "
            f"cluster with {count} processors have at most {size_text(memory)}"
        )
    return {"num_cpus": count, "num_gpus": accelerators, "memory": task.memory}


def _outcome_of(reference: "ObjectRef[Any]") -> PassOutcome:
    """Return the outcome of a pass; a failure of its process or of an earlier one is an error."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        text = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {text[-1] if text else 'no message'}"
        return PassOutcome("", error=message, code=HostError.code)


def _state_text(outcome: PassOutcome) -> str:
    if outcome.skipped:
        return "skipped, a pass before it failed"
    if outcome.code:
        return f"failed: {outcome.error}"
    return f"{outcome.seconds:.1f} s on {outcome.node}"


def _table(tasks: dict[str, PassTask], outcomes: dict[str, PassOutcome]) -> str:
    """Return a table of all passes: combinations that share it, state, seconds and machine."""
    rows = [("pass", "combinations", "state")]
    for key, task in tasks.items():
        state = _state_text(outcomes[key]) if key in outcomes else "cached"
        rows.append((task.label, str(task.combinations), state))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)
