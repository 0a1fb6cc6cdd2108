"""Latency and correctness of a run's deployments on one NVIDIA GPU, in at most ten minutes.

    python benchmarks/gpu.py runs/tiny

Torch with our INT4 products, torch with GPTQModel's kernels, llama.cpp on CUDA, ONNX Runtime on
CUDA; each one that is installed. What is missing is printed. Every session first answers the
deployment's self-test (``probe.json``): KL divergence from the reference and equal tokens. Passes
end with logits on the CPU, so that the clock stops after the device is done. Energy is NVML's.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from document import finish, table

from sqft_export.artifacts.store import MANIFEST
from sqft_export.errors import UserError
from sqft_export.machine.counters import energy_joules
from sqft_export.machine.host import installed
from sqft_export.measure.decode import profile
from sqft_export.measure.jobs import ProfileRequest
from sqft_export.probes.document import read_probe
from sqft_export.probes.running import compare_session
from sqft_export.targets import Session, runner
from sqft_export.targets.devices import find_device

LIMIT_SECONDS = 600
PROMPT_TOKENS, NEW_TOKENS, BATCHES = (32, 512), 64, (1, 8)
HEADER = ["", "KL", "same", "TTFT ms", "TPOT ms", "tokens/s", "load s", "J/token"]


@dataclass(frozen=True)
class Case:
    """A runtime to measure.

    folder: pass of the run and folder in its artifact.
    open: loads that folder; raises UserError if the runtime or the GPU is missing.
    """

    name: str
    folder: tuple[str, str]
    open: Callable[[Path], Session]


def in_runtime(runtime: str, device: str) -> Callable[[Path], Session]:
    def open_there(folder: Path) -> Session:
        find_device(runtime, device)
        return runner(runtime).open_session(folder, False, None, device)

    return open_there


def in_gptqmodel(folder: Path) -> Session:
    """The merged folder, unchanged, in the kernel that GPTQModel chooses, such as Marlin."""
    name = find_device("torch", "gpu").name
    if not installed("gptqmodel"):
        raise UserError("gptqmodel is not installed; pip install gptqmodel")
    from gptqmodel import GPTQModel

    from sqft_export.targets.torch import TorchSession

    return TorchSession(GPTQModel.load(str(folder), device=name).model, name)


CASES = (
    Case("torch, our INT4", ("merge", "model"), in_runtime("torch", "gpu")),
    Case("torch, GPTQModel", ("merge", "model"), in_gptqmodel),
    Case("llama.cpp, CUDA", ("export-gguf", "model"), in_runtime("gguf", "cuda")),
    Case("ONNX Runtime, CUDA", ("export-onnx", "model"), in_runtime("onnx", "gpu")),
)


def newest(run: Path, stage: str, folder: str) -> Path | None:
    """The folder of the newest artifact of a pass."""
    made = sorted(run.glob(f"{stage}-*/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    return made[-1].parent / folder if made else None


def measure(case: Case, folder: Path) -> list[Any]:
    started = time.perf_counter()
    session = case.open(folder)
    loaded = time.perf_counter() - started
    probe = read_probe(folder)
    short = [one for one in probe.prompts if one.beyond is None] if probe else []
    compared = compare_session(session, short)
    before = energy_joules("gpu")
    found = profile(
        session,
        ProfileRequest(
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            batches=BATCHES,
            vocabulary=session.vocabulary,
            device="gpu",
            cpus=None,
        ),
    )
    after = energy_joules("gpu")
    joules = "" if before is None or after is None else (after - before) / found.passes
    return [
        case.name,
        compared.mean_kl,
        f"{compared.same_top}/{len(compared.positions)}",
        sorted(found.ttft_ms[str(PROMPT_TOKENS[-1])])[0],
        sorted(found.tpot_ms)[len(found.tpot_ms) // 2],
        found.tokens_per_second[str(BATCHES[-1])],
        loaded,
        joules,
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    started, rows = time.monotonic(), []
    for case in CASES:
        folder = newest(run, *case.folder)
        if folder is None:
            print(f"{case.name}: missing: {run} has no artifact of {case.folder[0]}")
        elif time.monotonic() - started > LIMIT_SECONDS:
            print(f"{case.name}: left out: {LIMIT_SECONDS} s are over")
        else:
            try:
                rows.append(measure(case, folder))
            except UserError as error:
                print(f"{case.name}: missing: {error}")
    if rows:
        table(HEADER, rows)
    finish("gpu", {}, {row[0]: dict(zip(HEADER[1:], row[1:], strict=True)) for row in rows})


if __name__ == "__main__":
    main()
