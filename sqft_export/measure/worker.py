"""Score and time one model in a separate process, so that peak memory is that of this model.

    python -m sqft_export.measure.worker <job.json> <result.json>

The job holds token ids, so the worker of a runtime needs no tokenizer and no torch.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import HostError, UserError
from sqft_export.measure.decode import measure_latency, profile
from sqft_export.measure.likelihood import distributions, score
from sqft_export.measure.machine import energy_joules, memory_now, peak_memory
from sqft_export.run.host import die_with_parent, exhausted_resource
from sqft_export.run.processors import deployed_environment
from sqft_export.targets import Session, runner


def open_job(job: dict[str, Any]) -> Session:
    """Open the session of a job's model; kind ``adapted`` is a base with an adapter in torch."""
    if job["kind"] != "adapted":
        folder, threads, device = Path(job["folder"]), job["threads"], job["device"]
        if job["kind"] == "openvino":
            from sqft_export.targets import openvino

            execution = job.get("execution", "stock")
            return openvino.open_session(folder, False, threads, device, execution)
        if job["kind"] == "torch":
            from sqft_export.targets import torch as in_torch

            return in_torch.open_session(folder, False, threads, device, job.get("precision"))
        return runner(job["kind"]).open_session(folder, False, threads, device)
    import torch

    from sqft_export.adapters.elastic import cache_effective_weights
    from sqft_export.adapters.files import Base
    from sqft_export.adapters.loading import load_adapted
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.targets.devices import find_device
    from sqft_export.targets.torch import TorchSession, fast_dtype

    masks, grids = (Path(job[k]) if job[k] else None for k in ("masks", "grids"))
    base = Base(Path(job["folder"]), masks, grids, job["unmerged"])
    torch.set_num_threads(job["threads"])
    name = find_device("torch", job["device"]).name
    dtype = fast_dtype(Checkpoint(base.folder), name, job.get("precision"))
    model = load_adapted(base, Path(job["adapter"]), dtype).to(name)
    cache_effective_weights(model)
    return TorchSession(model, name)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run the measurements that the job requests and return their results.

    Keys of a job that request one: ``profile``, ``latency_prompt``, ``questions``,
    ``distributions``, ``lm_eval``.
    """
    settings = job.get("profile") or {}
    if settings.get("cpus"):
        os.sched_setaffinity(0, settings["cpus"])
    started = time.perf_counter()
    session = open_job(job)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    if settings:
        before = energy_joules(settings["device"])
        sizes = settings["prompt_tokens"], settings["new_tokens"], settings["batches"]
        result |= profile(session, *sizes, job["vocabulary"])
        after = energy_joules(settings["device"])
        result["energy_joules"] = None if before is None or after is None else after - before
    if "latency_prompt" in job:
        result |= measure_latency(session, job["latency_prompt"], job["new_tokens"], job["repeats"])
    if "questions" in job:
        started = time.perf_counter()
        result |= score(session, job["questions"])
        result["score_seconds"] = time.perf_counter() - started
    result["steady_memory_bytes"] = memory_now()
    result["peak_memory_bytes"] = peak_memory()
    # The rest takes memory that a deployment does not need, so memory is read before it.
    if "distributions" in job:
        np.save(job["distributions"]["file"], distributions(session, job["distributions"]["ids"]))
    if "lm_eval" in job:
        result |= _score_with_lm_eval(session, job)
    return result


def _score_with_lm_eval(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    from sqft_export.measure.harness import SessionLM, evaluate

    request, folder = job["lm_eval"], Path(job["folder"])
    include = Path(request["folder"]) if request["folder"] else None
    model = SessionLM(folder, session=session)
    found = evaluate(model, request["tasks"], include, request["items"])
    return {"lm_eval": found, "lm_eval_warnings": model.warnings}


def measure_in_process(job: dict[str, Any], scratch: Path | None = None) -> dict[str, Any]:
    """Run :func:`measure` in a child process, which ends if this process ends.

    :param scratch: folder for temporary files; None: the system's.
    :raises UserError: if the child fails; the message ends with the child's error.
    :raises HostError: if it fails because the machine lacks memory or disk.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job | {"parent": os.getpid()}))
        # -P: do not import from the current folder, which may be untrusted.
        command = [sys.executable, "-P", "-m", "sqft_export.measure.worker"]
        done = subprocess.run(
            [*command, str(job_file), str(result_file)],
            env=deployed_environment() | {"TMPDIR": folder},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            message = _error_message(done)
            kind = HostError if exhausted_resource(RuntimeError(message), None) else UserError
            raise kind(f"{job['folder']}: the measurement failed:\n{message}")
        return json.loads(result_file.read_text())


def _error_message(done: subprocess.CompletedProcess) -> str:
    """Return the error message of a failed worker, without its traceback."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}; the machine may be out of memory"
    lines = done.stderr[-2000:].strip().splitlines()
    messages = [line for line in lines if "UserError: " in line or "Error: " in line]
    return messages[-1].partition("Error: ")[2] if messages else "\n".join(lines[-5:])


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    die_with_parent(job["parent"])
    result_file.write_text(json.dumps(measure(job)))
