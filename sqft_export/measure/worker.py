"""Score and time one model in a separate process, so that peak memory is that of this model.

    python -m sqft_export.measure.worker <job.json> <result.json>

The job holds token ids, so the worker of a runtime needs no tokenizer and no torch.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeVar

import numpy as np

from sqft_export.data.scoring import ScoringRequest
from sqft_export.errors import HostError, UserError
from sqft_export.libraries.transformers import import_without_sklearn
from sqft_export.machine.counters import (
    device_memory,
    energy_joules,
    memory_now,
    peak_memory,
)
from sqft_export.machine.host import LESS_MEMORY, die_with_parent, exhausted_resource, out_of_memory
from sqft_export.machine.processes import ALONE, Processes, child_variables, join_processes
from sqft_export.machine.processors import deployed_environment
from sqft_export.measure.decode import measure_latency, profile
from sqft_export.measure.jobs import (
    AdapterParts,
    Job,
    LmEvalRequest,
    MeasuredModel,
    Profile,
    ProfileRequest,
    Requests,
    TimedScores,
    WorkerResult,
)
from sqft_export.measure.likelihood import distributions, score
from sqft_export.measure.results import TaskMetrics
from sqft_export.targets import Session
from sqft_export.targets.execution import open_on_kernels
from sqft_export.targets.faults import RUN_AGAIN, device_fault, ended_by_signal
from sqft_export.telemetry import disable_telemetry

_Number = TypeVar("_Number", int, float)
LOWER_ON_DEVICE = f"lower --prompt-tokens, --new-tokens or --batch, {LESS_MEMORY}"


def open_measured(model: MeasuredModel) -> Session:
    """Open the session of a job's model."""
    if model.kind in ("torch", "adapted"):
        import_without_sklearn()
        from sqft_export.machine.device import use_own_accelerator

        use_own_accelerator()
    if model.parts is not None:
        return _open_adapted(model, model.parts)
    folder, threads, device = model.folder, model.threads, model.device
    if model.kind == "torch":
        from sqft_export.targets import torch as in_torch

        return in_torch.open_session(folder, False, threads, device, model.precision)
    return open_on_kernels(folder, False, threads, device, model.execution)


def _open_adapted(model: MeasuredModel, parts: AdapterParts) -> Session:
    """Open a base model with an adapter in torch."""
    import torch

    from sqft_export.adapters.elastic import cache_effective_weights
    from sqft_export.adapters.files import Base
    from sqft_export.adapters.loading import load_adapted
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.targets.devices import find_device
    from sqft_export.targets.torch import TorchSession, fast_dtype

    base = Base(model.folder, parts.masks, parts.grids, parts.unmerged)
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    name = find_device("torch", model.device).name
    dtype = fast_dtype(Checkpoint(base.folder), name, model.precision)
    adapted = load_adapted(base, parts.adapter, dtype).to(name)
    cache_effective_weights(adapted)
    return TorchSession(adapted, name)


def measure(model: MeasuredModel, requests: Requests, processes: Processes = ALONE) -> WorkerResult:
    """Open a model and run the requested measurements.

    :param processes: workers that split the scoring. The first one measures everything else before,
        while the others wait: they would change its figures.
    """
    if not processes.is_first:
        return _help_scoring(model, requests, processes)
    if requests.profile and requests.profile.cpus:
        os.sched_setaffinity(0, requests.profile.cpus)
    unloaded = device_memory(model.device)
    started = time.perf_counter()
    session = open_measured(model)
    load_seconds = time.perf_counter() - started
    profiled = _profile(session, requests.profile) if requests.profile else None
    latency = measure_latency(session, requests.latency) if requests.latency else None
    processes.gather(None)
    scores = _score(session, requests.questions, processes) if requests.questions else None
    steady, peak = memory_now(), peak_memory()
    on_device = _difference(unloaded, device_memory(model.device))
    # Memory is read here: the measurements below need memory that a deployment does not need.
    if wanted := requests.distributions:
        np.save(wanted.file, distributions(session, wanted.ids))
    lm_eval, warnings = None, list[str]()
    if requests.lm_eval:
        lm_eval, warnings = _score_with_lm_eval(session, model.folder, requests.lm_eval, processes)
    return WorkerResult(
        load_seconds=load_seconds,
        placement=session.placement,
        steady_memory_bytes=steady,
        peak_memory_bytes=peak,
        device_memory_bytes=on_device,
        profile=profiled,
        latency=latency,
        scores=scores,
        lm_eval=lm_eval,
        lm_eval_warnings=warnings,
    )


def _help_scoring(model: MeasuredModel, requests: Requests, processes: Processes) -> WorkerResult:
    """Score a part of the batches once the first worker has timed the model."""
    processes.gather(None)
    session = open_measured(model)
    if requests.questions:
        score(session, requests.questions, processes)
    if requests.lm_eval:
        _score_with_lm_eval(session, model.folder, requests.lm_eval, processes)
    return WorkerResult(
        load_seconds=0.0, steady_memory_bytes=memory_now(), peak_memory_bytes=peak_memory()
    )


def _profile(session: Session, request: ProfileRequest) -> Profile:
    """Profile a session and add the energy that its passes took."""
    started, before = time.perf_counter(), energy_joules(request.device)
    found = profile(session, request)
    taken = _difference(before, energy_joules(request.device))
    seconds = time.perf_counter() - started
    return found.model_copy(update={"energy_joules": taken, "seconds": seconds})


def _difference(before: _Number | None, after: _Number | None) -> _Number | None:
    """Return the difference of two readings of a counter; None if one is missing."""
    return None if before is None or after is None else after - before


def _score(session: Session, questions: ScoringRequest, processes: Processes) -> TimedScores:
    started = time.perf_counter()
    found = score(session, questions, processes)
    return TimedScores(**dict(found), seconds=time.perf_counter() - started)


def _score_with_lm_eval(
    session: Session, folder: Path, request: LmEvalRequest, processes: Processes
) -> tuple[TaskMetrics, list[str]]:
    """Return the metrics of lm-eval's tasks, and warnings."""
    from sqft_export.measure.harness import SessionLM, evaluate

    model = SessionLM(folder, session=session, processes=processes)
    return evaluate(model, request.tasks, request.folder, request.items), model.warnings


def measure_in_process(
    model: MeasuredModel, requests: Requests, scratch: Path | None = None, group: str = ""
) -> WorkerResult:
    """Run :func:`measure` in a child process, which ends if this process ends.

    :param scratch: folder for temporary files; None: the system's.
    :param group: of ``Job``.
    :raises UserError: if the child fails; the message ends with the child's error.
    :raises HostError: if it fails because the machine lacks memory or disk.
    """
    job = Job(model=model, requests=requests, parent=os.getpid(), group=group)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(job.model_dump_json())
        # -P: do not import from the current folder, which may be untrusted.
        command = [sys.executable, "-P", "-m", "sqft_export.measure.worker"]
        done = subprocess.run(
            [*command, str(job_file), str(result_file)],
            env=deployed_environment() | child_variables() | {"TMPDIR": folder},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise failure_of(model, _error_message(done))
        where = f"{model.folder}: the result of the measurement"
        return WorkerResult.parse(result_file.read_text(), where)


def failure_of(model: MeasuredModel, message: str) -> UserError:
    """Return the error of a failed worker; one of a device is one line with what helps."""
    message = message.removesuffix(f"; {LESS_MEMORY}")
    error, place = RuntimeError(message), f"{model.folder}: {model.device}"
    reason = exhausted_resource(error, None)
    if model.device != "cpu" and out_of_memory(error):
        return HostError(f"{place}: {reason}; {LOWER_ON_DEVICE}")
    if model.device != "cpu" and (fault := device_fault(place, error)):
        return HostError(f"{place}: {message}") if RUN_AGAIN in message else fault
    kind = HostError if reason else UserError
    return kind(f"{model.folder}: the measurement failed:\n{message}")


def _error_message(done: subprocess.CompletedProcess) -> str:
    """Return the error message of a failed worker, without its traceback."""
    if done.returncode < 0:
        return ended_by_signal(-done.returncode, done.stderr)
    lines = done.stderr[-2000:].strip().splitlines()
    messages = [line for line in lines if "UserError: " in line or "Error: " in line]
    return messages[-1].partition("Error: ")[2] if messages else "\n".join(lines[-5:])


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    job = Job.parse(job_file.read_text(), str(job_file))
    die_with_parent(job.parent)
    disable_telemetry()
    with join_processes(job.group, bool(job.group)) as processes:
        found = measure(job.model, job.requests, processes)
    result_file.write_text(found.model_dump_json())
