"""Training throughput with and without a busy process, for several settings of OpenMP's threads.

    python benchmarks/busy_machine.py [--seconds 8] [--rounds 5] [--busy 1] [--hidden 1024]
        [--settings ours default ...] [--small]

Trains two Mistral-shaped blocks through mask and INT4 grid, each measurement in a separate process.
A round measures every setting quiet and busy, interleaved; the next round reverses the order. Busy
means `--busy` processes that spin on any processor. The goal is a busy throughput of at least 45 %
of the quiet one.

    ours        what `sqft-export run` does: threads by free processors, a short spin
    default     all processors; libgomp's long spin
    passive     all processors; OMP_WAIT_POLICY=passive, no spin
    spin-<n>    all processors; GOMP_SPINCOUNT=<n>
    fewer       one thread less than processors; libgomp's long spin

Run it on an idle machine. The column `others` shows how many processors other programs used.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from document import finish, spread, table

from sqft_export.machine.host import THREADS_VARIABLE, allowed_processors
from sqft_export.machine.processors import (
    OPENMP_THREADS,
    SPIN_VARIABLES,
    limit_openmp_spinning,
    sample,
    set_threads,
    used_by_others,
)

OURS, GOAL, WARM_STEPS = "ours", 0.45, 2


def settings() -> dict[str, dict[str, str]]:
    """Name -> environment; None of ours, which is decided in the process."""
    processors = allowed_processors()
    every = {OPENMP_THREADS: str(processors)}
    return {
        OURS: {},
        "default": every,
        "passive": every | {"OMP_WAIT_POLICY": "passive"},
        **{f"spin-{n}": every | {"GOMP_SPINCOUNT": str(n)} for n in (0, 1000, 10_000, 100_000)},
        "fewer": {OPENMP_THREADS: str(max(1, processors - 1))},
    }


def train(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of the steps that fit into a time, after two that are not counted."""
    if arguments.child == OURS:
        set_threads(None)
        limit_openmp_spinning()
    import torch
    from training_step import VOCABULARY, build

    shape = arguments.batch, arguments.length
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    model = build("qa", folder, ids, torch.float32).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    steps, started = -WARM_STEPS, 0.0
    while steps <= 0 or time.perf_counter() - started < arguments.seconds:
        if steps == 0:
            started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    taken = time.perf_counter() - started
    return {"tokens_per_second": steps * ids.numel() / taken, "threads": torch.get_num_threads()}


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(name: str, busy: int, scratch: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One process of a setting, while ``busy`` processes spin."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--folder", scratch]
    for option in ("seconds", "batch", "length"):
        command += [f"--{option}", str(getattr(arguments, option))]
    unset = {THREADS_VARIABLE, OPENMP_THREADS, *SPIN_VARIABLES}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | settings()[name]
    with spinning(busy):
        before = sample()
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        others = used_by_others(before)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"others": max(0.0, others - busy)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="processes that spin")
    parser.add_argument("--settings", nargs="+", choices=settings(), default=list(settings()))
    parser.add_argument("--small", action="store_true", help="to see that it runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(arguments.folder, arguments)))
        return
    if arguments.small:
        arguments.hidden, arguments.seconds, arguments.rounds = 256, 1.0, 1
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {"quiet": [], "busy": []} for name in arguments.settings
    }
    with tempfile.TemporaryDirectory() as scratch:
        from training_step import compress_base, write_base

        write_base(Path(scratch), arguments.hidden)
        compress_base(Path(scratch) / "whole", Path(scratch))
        for number in range(arguments.rounds):
            order = list(found.items())[:: -1 if number % 2 else 1]
            for name, runs in order:
                for state, count in (("quiet", 0), ("busy", arguments.busy)):
                    runs[state].append(measure(name, count, scratch, arguments))
    report(found, arguments)


def report(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    ratios, rows = {}, []
    for name, runs in found.items():
        quiet, busy = ([run["tokens_per_second"] for run in runs[s]] for s in ("quiet", "busy"))
        ratios[f"{name}: busy / quiet"] = spread([b / q for q, b in zip(quiet, busy, strict=True)])
        if "default" in found:  # compared with libgomp's own settings
            before = [run["tokens_per_second"] for run in found["default"]["quiet"]]
            pairs = zip(before, busy, strict=True)
            ratios[f"{name}: busy / default quiet"] = spread([b / q for q, b in pairs])
        threads = [runs[state][-1]["threads"] for state in ("quiet", "busy")]
        share = median(b / q for q, b in zip(quiet, busy, strict=True))
        others = max(run["others"] for state in runs.values() for run in state)
        goal = "reached" if share >= GOAL else "missed"
        rows.append([name, *threads, median(quiet), median(busy), share, goal, others])
    header = ["setting", "threads", "busy", "quiet tok/s", "busy tok/s", "busy/quiet"]
    table([*header, f"{GOAL:.0%}", "others"], rows)
    sizes = {k: str(v) for k, v in vars(arguments).items() if k not in ("child", "folder")}
    finish("busy_machine", ratios, {"runs": found, "goal": GOAL, "sizes": sizes})


if __name__ == "__main__":
    main()
