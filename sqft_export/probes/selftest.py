"""Run the self-test of a deployment in the installed runtime. Needs no torch.

Exact mode computes in float32, so it tests graph, weights and kernels. Users run default mode. If a
mode fails, ``causes.py`` runs it again with one setting changed.
"""

from dataclasses import dataclass
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.kernels.choice import STOCK
from sqft_export.packed.folders import dense_size, packed_file
from sqft_export.probes.causes import find_causes
from sqft_export.probes.document import PROBE, Probe, ProbePrompt
from sqft_export.probes.results import Mode, ModeResult, SelfTest, TextResult, TokenDifference
from sqft_export.probes.running import ProbeComparison, compare_session
from sqft_export.probes.setup import Setup
from sqft_export.probes.texts import compare_chat, compare_texts
from sqft_export.targets import Session
from sqft_export.targets.devices import find_device, why_not_exact, why_not_run
from sqft_export.targets.execution import kernels_title
from sqft_export.targets.folder import ADAPTER_FOLDER, kind_of

EXACT_KL = 1e-3  # nats; in float32 runtimes differ by less than 1e-6, with tables of GELU by 1e-4
# The certificate takes the mean over all tokens of a prompt; a few positions vary more.
FEW_POSITIONS = 2
GGUF_KL = 0.02  # nats per token; llama.cpp rounds activations less than the other runtimes


@dataclass(frozen=True)
class ModeRun:
    """A mode with its compared positions; None if the runtime failed."""

    result: ModeResult
    comparison: ProbeComparison | None


def test_deployment(
    folder: Path, probe: Probe, files: int, setup: Setup, long: bool = False
) -> SelfTest:
    """Compare tokenizers, templates and both modes of a deployment with its probe.

    :param files: number of files that match the seal.
    :param long: run the long prompts too.
    :raises UserError: if the runtime or the device is missing.
    """
    runtime = kind_of(folder)
    find_device(runtime, setup.device)
    prompts = [one for one in probe.prompts if long or one.beyond is None]
    runs = {mode: _run_mode(folder, probe, prompts, setup, mode) for mode in _MODES}
    texts = _compare_texts(probe, runtime, folder)
    results = [run.result for run in runs.values()]
    causes = [one.cause for one in texts if one.cause]
    failed = [run for run in runs.values() if not run.result.passed]
    if failed:
        causes += _causes_of(folder, prompts, setup, failed[0])
    found = {
        "folder": str(folder),
        "runtime": runtime,
        "device": setup.device,
        "kernels": kernels_title(runtime, setup.execution),
        "files": files,
        "modes": results,
        "texts": texts,
        "causes": list(dict.fromkeys(causes)),
        "passed": not failed and all(one.passed for one in texts),
    }
    return SelfTest.model_validate(found | ({"threads": setup.threads} if setup.threads else {}))


_MODES: tuple[Mode, ...] = ("exact", "default")


def _compare_texts(probe: Probe, runtime: str, folder: Path) -> list[TextResult]:
    """Compare tokenizers and templates; ids of messages also depend on the tokenizer."""
    if packed_file_of(folder, runtime):
        return []  # the tokenizer files are those of the dense folder
    texts = list(compare_texts(probe, runtime, folder))
    chats = list(compare_chat(probe, runtime, folder))
    if any(not one.passed for one in texts):
        chats = [one.model_copy(update={"cause": ""}) for one in chats]
    return texts + chats


def packed_file_of(folder: Path, runtime: str) -> Path | None:
    """Return the packed weight file of a deployment; None for a dense one and for torch."""
    return None if runtime == "torch" else packed_file(folder)


def _why_skipped(folder: Path, runtime: str, mode: Mode, execution: str) -> str | None:
    """Return why a mode cannot run here; None if it can."""
    if runtime == "torch":
        return None
    if mode == "exact" and execution == STOCK:
        # A weight takes at least four bits.
        return why_not_exact(runtime, 2 * dense_size(folder)) if runtime == "gguf" else None
    return why_not_run(runtime, (folder / ADAPTER_FOLDER).is_dir())


def _allowed(probe: Probe, runtime: str, mode: Mode) -> float:
    if mode == "exact":
        return EXACT_KL
    limit = min(probe.divergence, GGUF_KL) if runtime == "gguf" else probe.divergence
    return FEW_POSITIONS * limit


def _run_mode(
    folder: Path, probe: Probe, prompts: list[ProbePrompt], setup: Setup, mode: Mode
) -> ModeRun:
    """Run prompts in one mode."""
    runtime = kind_of(folder)
    allowed = _allowed(probe, runtime, mode)
    if skipped := _why_skipped(folder, runtime, mode, setup.execution):
        result = _result(mode, ProbeComparison(), allowed, True)
        return ModeRun(result.model_copy(update={"skipped": skipped}), None)
    try:
        session = setup.open(folder, mode == "exact")
        _check_vocabulary(folder, probe, session)
        found = compare_session(session, prompts)
    except (UserError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # each runtime has its own exception classes
        result = _result(mode, ProbeComparison(), allowed, False)
        text = f"{runtime} fails: {one_line(error)}"
        return ModeRun(result.model_copy(update={"error": text}), None)
    value = found.largest_kl if mode == "exact" else found.mean_kl
    result = _result(mode, found, allowed, value <= allowed)
    if session.placement:
        result = result.model_copy(update={"placement": session.placement})
    return ModeRun(result, found)


def _check_vocabulary(folder: Path, probe: Probe, session: Session) -> None:
    """Refuse the probe of a model with more tokens, whose ids the runtime would not check."""
    if session.vocabulary < probe.vocabulary:
        raise UserError(
            f"{folder}: computes {session.vocabulary} logits per token, but {PROBE} is of a "
            f"model with {probe.vocabulary}; copy or export the deployment again"
        )


def _result(mode: Mode, found: ProbeComparison, allowed: float, passed: bool) -> ModeResult:
    result = ModeResult(
        mode=mode,
        positions=len(found.positions),
        same_top=found.same_top,
        mean_kl=found.mean_kl,
        largest_kl=found.largest_kl,
        allowed=allowed,
        passed=passed,
    )
    if (first := found.first_difference) is None or first.step is None:
        return result
    difference = TokenDifference(
        prompt=first.prompt,
        step=first.step,
        expected=first.expected,
        found=first.found,
        margin=first.margin,
    )
    return result.model_copy(update={"first_difference": difference})


def _causes_of(
    folder: Path, prompts: list[ProbePrompt], setup: Setup, failed: ModeRun
) -> list[str]:
    """Return the likely causes of a failed mode."""
    if failed.comparison is None:
        return []
    exact = failed.result.mode == "exact"
    return find_causes(folder, prompts, setup, failed.comparison, exact, failed.result.allowed)
