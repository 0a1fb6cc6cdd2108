"""A sweep whose combinations Optuna chooses. Its storage is the record of all trials."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.errors import UserError
from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.document import REPORT, read_report
from sqft_export.run.combinations import Sweep
from sqft_export.run.pipeline import run_recipe

if TYPE_CHECKING:
    import optuna

JOURNAL = "trials.journal"
_REPORT = "report"  # attribute of a trial: the folder of its report

# Goal -> its figure in a row of the report.
GOALS = {
    "accuracy": lambda row: row.accuracy,
    "size": lambda row: float(row.file_bytes),
    "tpot": lambda row: row.tpot.median_ms,
    "memory": lambda row: float(row.peak_memory_bytes),
    "perplexity": lambda row: row.perplexity,
}


@dataclass(frozen=True)
class TriedCombinations:
    """Lines that describe the best trials, and the reports of all combinations tried."""

    lines: list[str]
    reports: list[Path]


def run_trials(
    sweep: Sweep, runs: Path, folder: Path, sampler: str, trials: int, goals: dict[str, str]
) -> TriedCombinations:
    """Run combinations until ``trials`` have finished; a repeated call continues the record.

    :param folder: the record ``trials.journal`` is written there.
    :param goals: goal -> minimize or maximize.
    """
    import optuna

    study = _open_study(sweep, folder, sampler, goals)

    def objective(trial: "optuna.Trial") -> tuple[float, ...]:
        settings = (*sweep.overrides, *(_choose(trial, axis) for axis in sweep.axes))
        recipe = sweep.load(settings)
        report = run_recipe(recipe, runs / recipe.name, redirect=True)["report"].path
        trial.set_user_attr(_REPORT, str(report))
        return tuple(GOALS[goal](_measured_row(report)) for goal in goals)

    finished = optuna.trial.TrialState.COMPLETE
    missing = trials - len(study.get_trials(states=(finished,)))
    if missing > 0:
        study.optimize(objective, n_trials=missing)
    done = study.get_trials(states=(finished,))
    reports = dict.fromkeys(Path(trial.user_attrs[_REPORT]) for trial in done)
    lines = dict.fromkeys(_line_of(trial, goals) for trial in study.best_trials)
    return TriedCombinations([*lines], [*reports])


def _choose(trial: "optuna.Trial", axis: tuple[str, ...]) -> str:
    """Return the setting of one axis that Optuna chooses."""
    path = axis[0].partition("=")[0]
    values = [setting.partition("=")[2] for setting in axis]
    return f"{path}={trial.suggest_categorical(path, values)}"


def _open_study(sweep: Sweep, folder: Path, sampler: str, goals: dict[str, str]) -> "optuna.Study":
    """Open the record of these axes and goals, or create it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    seed = sweep.load(sweep.combinations[0]).seed
    samplers = {
        "tpe": optuna.samplers.TPESampler(seed=seed),
        "random": optuna.samplers.RandomSampler(seed=seed),
    }
    parts = (*sweep.overrides, *(setting for axis in sweep.axes for setting in axis))
    wanted = (f"{way} {goal}" for goal, way in goals.items())
    return optuna.create_study(
        storage=storage,
        sampler=samplers[sampler],
        study_name="; ".join((" ".join(parts), *wanted)),
        directions=[optuna.study.StudyDirection[way.upper()] for way in goals.values()],
        load_if_exists=True,
    )


def _measured_row(report: Path) -> BenchmarkRow:
    """Return the recommended deployment of a report.

    :raises UserError: if no deployment was measured.
    """
    row = read_report(report / REPORT).best
    if row is None:
        raise UserError(
            f"{report}: no deployment was measured, so --search has no figures; add a target, "
            "such as export.targets=[openvino]"
        )
    return row


def _line_of(trial: "optuna.trial.FrozenTrial", goals: dict[str, str]) -> str:
    settings = " ".join(f"{path}={value}" for path, value in trial.params.items())
    figures = ", ".join(
        f"{goal} {value:,.4g}" if goal != "size" else f"size {value:,.0f} bytes"
        for goal, value in zip(goals, trial.values, strict=True)
    )
    return f"best: {settings}: {figures}"
