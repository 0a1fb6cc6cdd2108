"""Find the likely cause of a failed self-test: run again with one setting changed at a time.

If no setting helps, the pattern of the differences names the part of the file. Needs no torch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sqft_export.probes.document import ProbePrompt
from sqft_export.probes.running import ProbeComparison, compare_session
from sqft_export.probes.setup import Change, Setup, machine_changes, rounding_changes
from sqft_export.targets.folder import kind_of

RERUN_PROMPTS = 2  # of the failed ones
NEGLIGIBLE = 1e-2  # of the largest divergence
PERMUTED_SHARE = 0.5  # of the failed positions
PERMUTED = (
    "output head: its rows are in another order; the probabilities are right, but those of other "
    "tokens"
)
INSTRUCTION_SETS = ("AVX2", "AVX")  # values of ONEDNN_MAX_CPU_ISA, fastest first
INSTRUCTION_SET_VARIABLE = "ONEDNN_MAX_CPU_ISA"


def find_causes(
    folder: Path,
    prompts: list[ProbePrompt],
    setup: Setup,
    failed: ProbeComparison,
    exact: bool,
    allowed: float,
) -> list[str]:
    """Return the likely causes of a failed mode, with what was changed to find them.

    :param failed: compared positions of the failed mode.
    :param allowed: KL divergence, see ``ModeResult``.
    """
    overflow = []
    if not all(one.finite for one in failed.positions):
        overflow.append("float16 overflow: logits are NaN or infinite")
    if _is_permuted(failed, allowed):
        return [PERMUTED]
    subset = _worst_prompts(prompts, failed)
    for name, value, after in _changed_runs(folder, subset, setup, exact):
        if after <= allowed:
            return [*overflow, f"{name}: with {value} the KL divergence is {after:.2g}"]
    return overflow or [_cause_in_file(prompts, failed, allowed)]


def _worst_prompts(prompts: list[ProbePrompt], failed: ProbeComparison) -> list[ProbePrompt]:
    """Return the prompts with the largest divergence, short ones first."""
    worst = sorted(failed.positions, key=lambda one: -one.kl)
    numbers = list(dict.fromkeys(one.prompt for one in worst))
    short = [
        number for number in numbers if prompts[number].beyond is None and _differs(failed, number)
    ]
    return [prompts[number] for number in (short or numbers)[:RERUN_PROMPTS]]


def _differs(failed: ProbeComparison, number: int) -> bool:
    """Return whether a prompt differs more than rounding explains."""
    largest = max(one.kl for one in failed.positions)
    return max(one.kl for one in failed.positions if one.prompt == number) > NEGLIGIBLE * largest


def _changed_runs(
    folder: Path, prompts: list[ProbePrompt], setup: Setup, exact: bool
) -> Iterator[tuple[str, str, float]]:
    """Yield name and value of each changed setting, and the KL divergence with it."""
    runtime = kind_of(folder)
    changes = [] if exact else rounding_changes(folder, runtime, setup)
    short = all(one.beyond is None for one in prompts)  # else token by token takes minutes
    for change in (*changes, *machine_changes(setup, exact, short)):
        yield change.name, change.value, _kl_with(folder, prompts, change, exact)
    if runtime == "openvino" and setup.device == "cpu":
        for name in INSTRUCTION_SETS:
            after = _kl_with_instructions(folder, prompts, setup, exact, name)
            yield "instruction set", f"{INSTRUCTION_SET_VARIABLE}={name}", after


def measure_kl(session_of: Change, folder: Path, prompts: list[ProbePrompt], exact: bool) -> float:
    """Return the KL divergence that decides in a mode, with a changed setting."""
    session = session_of.setup.open(folder, session_of.exact)
    found = compare_session(session, prompts, session_of.setup.by_token)
    return found.largest_kl if exact else found.mean_kl


def _kl_with(folder: Path, prompts: list[ProbePrompt], change: Change, exact: bool) -> float:
    """Return the KL divergence with a changed setting; infinite if the runtime refuses it."""
    try:
        return measure_kl(change, folder, prompts, exact)
    except (ImportError, MemoryError, OSError):
        raise
    except Exception:  # a runtime that refuses the setting does not show that it is the cause
        return float("inf")


def _kl_with_instructions(
    folder: Path, prompts: list[ProbePrompt], setup: Setup, exact: bool, name: str
) -> float:
    """Return the KL divergence in a process that is limited to an instruction set."""
    job = {
        "folder": str(folder.absolute()),
        "prompts": [one.to_json() for one in prompts],
        "threads": setup.threads,
        "exact": exact,
    }
    # -P: do not import from the current folder, which may be untrusted.
    command = [sys.executable, "-P", "-m", "sqft_export.probes.worker"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        env=os.environ | {INSTRUCTION_SET_VARIABLE: name},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return float("inf")
    return float(done.stdout.strip().splitlines()[-1])


def _cause_in_file(prompts: list[ProbePrompt], failed: ProbeComparison, allowed: float) -> str:
    """Return the part of the file that the differing positions point to."""
    wrong = [one for one in failed.positions if one.kl > allowed]
    long = [prompts[one.prompt].beyond for one in wrong]
    if long and all(long):
        return (
            f"positions beyond {min(filter(None, long))}: the rotary table, the rope scaling or "
            "the sliding window; short texts are right"
        )
    if wrong and all(one.position for one in wrong) and _starts_at_first(failed):
        return (
            "positions: the rotary table, rope theta or the attention mask; the first token of "
            "each prompt is right, later ones are not"
        )
    return "weights or graph of the file: all positions differ, with any setting"


def _is_permuted(failed: ProbeComparison, allowed: float) -> bool:
    """Return whether most wrong positions have the right probabilities, of other tokens."""
    wrong = [one.permuted for one in failed.positions if one.kl > allowed]
    return sum(wrong) > PERMUTED_SHARE * len(wrong)


def _starts_at_first(failed: ProbeComparison) -> bool:
    """Return whether the first token of a prompt was compared."""
    return any(one.position == 0 for one in failed.positions)
