"""Send the figures of a run to TensorBoard, Weights & Biases, MLflow or trackio.

The callbacks are those of transformers' ``report_to``. One run of the tool is one run of each
logger. The steps of the training are ``train/loss`` and so on; the figures of a pass are
``eval/<pass>/<figure>``. Figures that a pass has per block or per candidate are a curve. Figures
per Linear are left in the pass's manifest.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft_export.adapters.files import TRAINING_LOG, read_training_log
from sqft_export.artifacts.store import Artifact
from sqft_export.errors import HostError, one_line
from sqft_export.measure.quality import quality_file, read_quality
from sqft_export.recipe.schema import Recipe
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from transformers import TrainerCallback

PROJECT = "sqft-export"  # project of Weights & Biases and trackio, experiment of MLflow
PROJECT_VARIABLES = ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME")
TRAINED_PASS = "adapt"  # its steps have the names of a plain Trainer, such as train/loss
CURVES = ("block_errors", "front")  # metrics with a value per block or per candidate
# Figures of a pass that are listed for each Linear.
FIGURES_PER_LINEAR = frozenset({"sparsity", "group_size", "bits", "calibration_tokens", "ranks"})
# Prefix that the callbacks replace with ``eval/``; all other names get ``train/``.
PASS_PREFIX = "eval_"

Figures = dict[str, float]


@dataclass(frozen=True)
class _RunArguments:
    """The attributes of ``TrainingArguments`` that the callbacks read.

    output_dir: folder of the run; TensorBoard's event files are in ``runs/`` there.
    config: recipe, which loggers show as the configuration.
    """

    output_dir: str
    run_name: str
    config: dict[str, object]
    project: str = PROJECT
    trackio_space_id: str | None = None
    hub_private_repo: bool | None = None
    load_best_model_at_end: bool = False

    def to_dict(self) -> dict[str, object]:
        return dict(self.config)

    def to_json_string(self) -> str:
        return json.dumps(self.config, indent=2)


@dataclass
class RunLoggers:
    """The loggers of one run; use it within :func:`open_loggers`.

    callbacks: one per logger; no callbacks log nothing.
    step: training step of the last figures.
    live: passes whose training steps were logged while they ran.
    """

    arguments: _RunArguments
    callbacks: "Sequence[TrainerCallback]" = ()
    step: int = 0
    live: set[str] = field(default_factory=set)

    def training_callbacks(self, name: str) -> "tuple[TrainerCallback, ...]":
        """Return callbacks that log the training steps of a pass while it trains."""
        if not self.callbacks:
            return ()
        from sqft_export.report.training_steps import TrainingSteps

        return (TrainingSteps(self, name),)

    def log_steps(self, name: str, step: int, figures: Mapping[str, object]) -> None:
        """Log the figures of a training step."""
        self.live.add(name)
        prefix = "" if name == TRAINED_PASS else f"{name}/"
        self._log({f"{prefix}{key}": value for key, value in figures.items()}, step)
        self.step = max(self.step, step)

    def log_pass(self, artifact: Artifact) -> None:
        """Log the metrics, the quality and the duration of a finished or cached pass."""
        if not self.callbacks:
            return
        name = artifact.manifest["stage"]
        if name not in self.live and (artifact.path / TRAINING_LOG).is_file():
            for entry in read_training_log(artifact.path):
                figures = {k: v for k, v in entry.items() if k not in ("step", "ranks")}
                self.log_steps(name, int(entry["step"]), figures)
        found = dict(figures_of(artifact.metrics)) | _quality(artifact) | _row_figures(artifact)
        found["seconds"] = artifact.manifest["seconds"]
        self._log({f"{PASS_PREFIX}{name}/{key}": value for key, value in found.items()}, self.step)
        for key, curve in curves_of(artifact.metrics):
            for number, value in enumerate(curve):
                self._log({f"{PASS_PREFIX}{name}/{key}": value}, number)

    def close(self) -> None:
        """End the run in every logger."""
        from transformers import TrainerControl, TrainerState

        state, control = TrainerState(global_step=self.step), TrainerControl()
        for callback in self.callbacks:
            callback.on_train_end(self.arguments, state, control)  # type: ignore[arg-type]

    def _log(self, figures: Mapping[str, object], step: int) -> None:
        from transformers import TrainerControl, TrainerState

        state, control = TrainerState(global_step=step), TrainerControl()
        for callback in self.callbacks:
            callback.on_log(self.arguments, state, control, logs=dict(figures))  # type: ignore


@contextlib.contextmanager
def open_loggers(recipe: Recipe, root: Path) -> Iterator[RunLoggers]:
    """Start a run in every logger that the recipe names, and end it with the context.

    :param root: folder of the run.
    """
    time = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    arguments = _RunArguments(str(root), f"{recipe.name} {time}", recipe.model_dump(mode="json"))
    if not recipe.log:  # the Trainer's module takes seconds to import
        yield RunLoggers(arguments)
        return
    from transformers.integrations import get_reporting_integration_callbacks

    callbacks = [kind() for kind in get_reporting_integration_callbacks(list(recipe.log))]
    loggers = RunLoggers(arguments, callbacks)
    with contextlib.ExitStack() as ends:
        if "wandb" in recipe.log:
            ends.enter_context(_wandb_run())
        ends.callback(loggers.close)
        for name, callback in zip(recipe.log, callbacks, strict=True):
            _start(name, callback, arguments)
        yield loggers


def _start(name: str, callback: "TrainerCallback", arguments: _RunArguments) -> None:
    """Start a run in one logger.

    :raises HostError: if it does not start, for example without an account.
    """
    from transformers import TrainerControl, TrainerState

    try:
        with _default_project():
            callback.on_train_begin(arguments, TrainerState(), TrainerControl())  # type: ignore
    except Exception as error:
        advice = "; WANDB_MODE=offline needs no account" if name == "wandb" else ""
        raise HostError(f"log: {name} does not start: {one_line(error)}{advice}") from error


@contextlib.contextmanager
def _wandb_run() -> Iterator[None]:
    """Finish the run of Weights & Biases that starts within the context.

    Its callback leaves it open. A run that the caller has started stays open.
    """
    import wandb

    started = wandb.run is None
    try:
        yield
    finally:
        if started:
            wandb.finish()


@contextlib.contextmanager
def _default_project() -> Iterator[None]:
    """Set the variables that name a project, where the user has not set them."""
    missing = [name for name in PROJECT_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, PROJECT))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def figures_of(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield path and value of every number of a pass's metrics.

    >>> list(figures_of({"bytes": 7, "packed": {"dense_bytes": 9}}))
    [('bytes', 7), ('packed/dense_bytes', 9)]
    """
    for name, value in metrics.items():
        if _is_figure(value):
            yield prefix + name, value
        elif name in FIGURES_PER_LINEAR:
            if isinstance(value, Mapping) and "all" in value:
                yield prefix + name, value["all"]
        elif isinstance(value, Mapping):
            yield from figures_of(value, f"{prefix}{name}/")


def curves_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield name and values of the metrics in ``CURVES``.

    The errors of blocks are pairs: before and after their training.

    >>> list(curves_of({"front": [{"accuracy": 0.5}, {"accuracy": 0.6}]}))
    [('front/accuracy', [0.5, 0.6])]
    """
    for name in CURVES:
        found = metrics.get(name)
        if not found:
            continue
        if name == "block_errors":
            yield f"{name}/before", [pair[0] for pair in found]
            yield f"{name}/after", [pair[1] for pair in found]
        else:
            for key in (key for key, value in found[0].items() if _is_figure(value)):
                yield f"{name}/{key}", [entry[key] for entry in found]


def _quality(artifact: Artifact) -> Figures:
    """Return KL divergence and perplexity of the model after the pass, if they were measured."""
    name = artifact.manifest["stage"]
    record = read_quality(quality_file(artifact.path.parent, name, artifact.key))
    if record is None:
        return {}
    return {"kl_nats": record.kl_nats, "perplexity": record.perplexity}


def _row_figures(artifact: Artifact) -> Figures:
    """Return the figures of every row of the benchmark, and the passed checks of verify."""
    found: Figures = {}
    if checks := artifact.metrics.get("checks"):
        assert isinstance(checks, list)
        found["passed_checks"] = sum(check["passed"] for check in checks)
        found["failed_checks"] = len(checks) - found["passed_checks"]
    if artifact.manifest["stage"] == "benchmark":
        for row in read_json(artifact.path / "results.json")["rows"]:
            found |= dict(figures_of(row, f"{row['id']}/"))
    return found
