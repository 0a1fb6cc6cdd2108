"""Score and time one model in a process of its own, so that peak memory is that model's.

    python -m sqft_export.worker <job.json> <result.json>

The job holds token ids, so that a runtime's worker needs neither tokenizer nor torch.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from sqft_export.evaluate import latency, score
from sqft_export.targets import Session, target


def peak_memory() -> int:
    """Peak resident bytes of this process since it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux carries the parent's peak over into it.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_job(job: dict[str, Any]) -> Session:
    if job["kind"] != "adapted":
        return target(job["kind"]).open_session(Path(job["folder"]), False, job["threads"])
    import torch

    from sqft_export.adapters import Base, load_adapted
    from sqft_export.targets.torch import TorchSession

    masks, grids = (Path(job[k]) if job[k] else None for k in ("masks", "grids"))
    base = Base(Path(job["folder"]), masks, grids, job["apart"])
    torch.set_num_threads(job["threads"])
    return TorchSession(load_adapted(base, Path(job["adapter"]), torch.float32))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    session = open_job(job)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    result |= latency(session, job["latency_prompt"], job["new_tokens"], job["repeats"])
    result |= score(session, job["questions"])
    result["peak_memory_bytes"] = peak_memory()
    return result


if __name__ == "__main__":
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(measure(json.loads(job_file.read_text()))))
