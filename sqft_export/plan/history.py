"""Times of passes that this machine has run before, from the manifests of their artifacts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqft_export.artifacts.store import MANIFEST, Artifact, Facts, environment, read_artifact
from sqft_export.errors import DamagedError

# All times in benchmarks/notes/speed.md are within this factor of the prediction.
PREDICTION_FACTOR = 1.5
REPEAT_FACTOR = 1.2  # the same pass again
MACHINE_FIELDS = ("processor", "threads", "platform")
# Settings that do not change how much work a pass has.
FREE_OF_WORK = frozenset(
    (
        *("seed", "adapt.learning_rate", "adapt.schedule", "adapt.warmup_steps", "adapt.alpha"),
        *("adapt.dropout", "adapt.weight_decay", "adapt.scale_learning_rate"),
        *("sparsify.sparsity", "sparsify.pattern", "sparsify.at_most", "sparsify.overrides"),
        *("quantize.symmetric", "quantize.damping", "scale_bits"),
        *("verify.tolerance", "verify.divergence", "verify.tokenizers"),
    )
)


@dataclass(frozen=True)
class PassTime:
    """Predicted seconds of a pass, with their range and source."""

    seconds: float
    source: Literal["model", "earlier run"]

    @property
    def range(self) -> tuple[float, float]:
        factor = PREDICTION_FACTOR if self.source == "model" else REPEAT_FACTOR
        return self.seconds / factor, self.seconds * factor


def pass_times(
    predicted: dict[str, float | None], facts: Mapping[str, Facts], runs: Path
) -> dict[str, PassTime | None]:
    """Return the time of every pass; None if it is unknown.

    :param predicted: seconds of the model in ``plan/seconds.py``.
    :param facts: facts of each pass, which its cache key is computed from.
    :param runs: folder of all runs, whose manifests take precedence over the model.
    """
    found = dict[str, PassTime | None]()
    for name, seconds in predicted.items():
        earlier = earlier_seconds(facts[name], runs) if name in facts else None
        found[name] = None if seconds is None else PassTime(seconds, "model")
        if earlier is not None:
            found[name] = PassTime(earlier, "earlier run")
    return found


def earlier_seconds(facts: Facts, runs: Path) -> float | None:
    """Return the seconds of the newest artifact of the same work on this machine; else None.

    The same work: the same pass, model, data and device, and equal settings except those in
    ``FREE_OF_WORK``.
    """
    same = [
        artifact.manifest
        for artifact in _artifacts(facts["stage"], runs)
        if _on_this_machine(artifact) and _work_of(artifact.manifest["facts"]) == _work_of(facts)
    ]
    newest = max(same, key=lambda manifest: manifest["environment"]["time"], default=None)
    return None if newest is None else newest["seconds"]


def _artifacts(stage: str, runs: Path) -> list[Artifact]:
    """Read the manifests of a pass in all runs. A damaged one is left to the run that needs it."""
    found = []
    for file in sorted(runs.glob(f"*/{stage}-*/{MANIFEST}")):
        try:
            found.append(read_artifact(file.parent))
        except DamagedError:
            continue
    return [artifact for artifact in found if artifact.manifest["stage"] == stage]


def _on_this_machine(artifact: Artifact) -> bool:
    made, here = artifact.manifest["environment"], environment()
    return [made.get(field) for field in MACHINE_FIELDS] == [here.get(f) for f in MACHINE_FIELDS]


def _work_of(facts: Facts) -> tuple[object, ...]:
    options = {k: v for k, v in facts.get("options", {}).items() if k not in FREE_OF_WORK}
    return facts.get("version"), facts.get("reads"), options
