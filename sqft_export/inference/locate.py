"""Find the deployment that a folder stands for: itself, or the best one of a run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.artifacts.store import MANIFEST, Artifact, Store, read_artifact
from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.kernels.choice import STOCK
from sqft_export.measure.rows import ON_KERNELS
from sqft_export.targets.folder import is_deployment, kind_of

if TYPE_CHECKING:
    from sqft_export.measure.results import BenchmarkRow


@dataclass(frozen=True)
class Deployment:
    """A deployment folder.

    name: of its row in the report; the runtime for a folder outside of a run.
    row: its row in the report; None if it was not measured.
    execution: the kernels of its row, see ``targets/execution.py``.
    """

    name: str
    path: Path
    row: "BenchmarkRow | None" = None
    execution: str = STOCK

    @property
    def tokens_per_second(self) -> float | None:
        """Return the decode speed that the run measured; None if it was not measured."""
        return self.row.tokens_per_second if self.row else None


def is_model(folder: Path) -> bool:
    """Return whether a folder is a deployment or a Hugging Face model."""
    return is_deployment(folder) or (folder / "config.json").is_file()


def find_deployment(folder: Path) -> Deployment:
    """Return the deployment in a folder, or the best one of a run.

    :raises UserError: if the folder is neither, or the run has no deployment.
    """
    if not folder.is_dir():
        raise UserError(f"{one_line(folder)}: no such folder{_hub_hint(folder)}")
    if is_model(folder):
        return Deployment(kind_of(folder), folder)
    if best := best_of(deployments_of_run(folder)):
        return best
    raise UserError(f"{folder}: the run has no deployment; set export.targets and run it again")


def _hub_hint(folder: Path) -> str:
    """Return what helps if a name on the hub was given in place of a folder."""
    if len(folder.parts) != 2 or folder.parts[0] in ("runs", ".", ".."):
        return ""
    return (
        f"; if it is a model on the hub, compile it first: sqft-export run {one_line(folder)} "
        "--data <file>"
    )


def refuse_run(folder: Path, command: str) -> None:
    """Refuse a run's folder where a deployment is needed.

    :raises UserError: listing the deployments of the run.
    """
    sealed = [*folder.glob(f"report-*/{MANIFEST}"), *folder.glob(f"verify-*/{MANIFEST}")]
    if is_deployment(folder) or not sealed:
        return
    paths = dict.fromkeys(one.path for one in deployments_of_run(folder))
    found = "".join(f"\n  {path}" for path in paths)
    raise UserError(f"{folder}: is a run; {command} takes one of its deployments:{found}")


def best_of(found: list[Deployment]) -> Deployment | None:
    """Return the recommended deployment, see ``report.recommendation``.

    If none is measured, return the first one; None for an empty list.
    """
    from sqft_export.report.recommendation import recommended_row
    from sqft_export.report.verdict import best_deployment

    rows = [one.row for one in found if one.row is not None]
    best = recommended_row(rows, best_deployment(rows))
    return next((one for one in found if one.row is best), None)


def deployments_of_run(run: Path) -> list[Deployment]:
    """Return the deployments of a run, measured and unmeasured.

    Before the run has a report, these are the deployments that are verified. A folder that was
    also measured on our kernels in llama.cpp is listed twice.

    :raises UserError: if the folder has no run with a report or a certificate.
    """
    from sqft_export.report.runs import latest_report, newest_artifact, read_run
    from sqft_export.report.terminal import deployment_folders

    report = latest_report(run)
    rows = {row.id: row for row in read_run(report).report.rows} if report else {}
    record = report or newest_artifact(run, "verify") or require_report(run)
    folders = deployment_folders(_parents_of(record, run))
    found = [Deployment(one.name, one.folder, rows.get(one.id)) for one in folders]
    on_kernels = [(one.folder, rows.get(f"{one.id}{ON_KERNELS}")) for one in folders]
    return found + [Deployment(row.name, path, row, "auto") for path, row in on_kernels if row]


def require_report(run: Path) -> Path:
    """Return the newest sealed report of a run.

    :raises UserError: if the folder has none.
    """
    from sqft_export.report.runs import latest_report

    if found := latest_report(run):
        return found
    raise UserError(
        f"{run}: neither a deployment nor a finished run; expected openvino_model.xml, "
        "model.onnx, model.gguf or report-*; an unfinished run resumes with the same command"
    )


def _parents_of(record: Path, run: Path) -> dict[str, Artifact]:
    """Return the artifacts that a report or certificate was made from and that still exist.

    :raises DamagedError: if a name could lead out of the run's folder.
    """
    parents = read_artifact(record).manifest["facts"].get("parents")
    if not isinstance(parents, dict) or not all(
        re.fullmatch(r"[a-z-]+", name) and re.fullmatch(r"[0-9a-f]{64}", str(key))
        for name, key in parents.items()
    ):
        raise DamagedError(f"{record / MANIFEST}: facts: parents: expected stages and keys")
    store = Store(run)
    paths = {name: store.path_of(name, key) for name, key in parents.items()}
    return {name: read_artifact(path) for name, path in paths.items() if path.is_dir()}
