"""The Python interface: compile, plan, benchmark, and talk to the result.

    run = sqft_export.compile("HuggingFaceTB/SmolLM2-135M-Instruct", data="chats.jsonl")
    print(run.report.best.name, run.report.best.tokens_per_second, run.certificate.passed)
    print(run.deployments["gguf"].path)
    print(sqft_export.load(run.folder).generate([{"role": "user", "content": "Hello"}]))

Importing it loads no torch and no runtime; each function loads its libraries. Errors are the
classes of ``sqft_export.errors``. Nothing here redirects output or ends the process.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft_export.artifacts.remote import runs_folder
from sqft_export.machine.progress import PassProgress
from sqft_export.plan.presets import DEFAULT_PRESET

if TYPE_CHECKING:
    from sqft_export.inference.locate import Deployment
    from sqft_export.inference.text import TextSession
    from sqft_export.measure.own_data import ScoredData
    from sqft_export.measure.results import DeploymentResults
    from sqft_export.plan.document import PlanDocument, PlannedPass
    from sqft_export.recipe.schema import Recipe
    from sqft_export.report.document import Report
    from sqft_export.verify.results import CheckResult

RecipeSource = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class RunCertificate:
    """The certificate of a run: the checks that deployments compute what was trained."""

    checks: "list[CheckResult]"

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a run; printing it shows the text of ``sqft-export plan``.

    document: the document of ``sqft-export plan --json``.
    """

    document: "PlanDocument"

    @property
    def passes(self) -> "list[PlannedPass]":
        """Return the passes, each with its predicted seconds and bytes."""
        return self.document.passes

    @property
    def seconds(self) -> float:
        """Return the predicted seconds of all passes that are not cached."""
        return self.document.seconds

    def __str__(self) -> str:
        from sqft_export.report.text import plan_text

        return plan_text(self.document)


class Run:
    """A finished run.

    folder: its artifacts, such as ``runs/tiny``.
    recipe: its recipe; None if the run was opened by its folder.
    """

    def __init__(self, folder: Path, recipe: "Recipe | None" = None):
        self.folder, self.recipe = folder, recipe

    @cached_property
    def _found(self) -> "list[Deployment]":
        from sqft_export.inference.locate import deployments_of_run

        return deployments_of_run(self.folder)

    @cached_property
    def report(self) -> "Report":
        """Return the latest report; ``report.best`` is the row of the best deployment."""
        from sqft_export.inference.locate import require_report
        from sqft_export.report.document import REPORT, read_report

        return read_report(require_report(self.folder) / REPORT)

    @property
    def page(self) -> Path:
        """Return the HTML page of the latest report."""
        from sqft_export.inference.locate import require_report

        return require_report(self.folder) / "index.html"

    @cached_property
    def deployments(self) -> "dict[str, Deployment]":
        """Return the deployments by target: ``openvino``, ``onnx``, ``gguf``.

        Copies have the name of their folder too, such as ``onnx-packed``. ``gguf-kernels`` is the
        GGUF deployment on our kernels, if it was measured.
        """
        found = {}
        for one in self._found:
            target = one.path.parent.name.split("-")[1]
            name = target if one.path.name == "model" else f"{target}-{one.path.name}"
            found[name if one.execution == "stock" else f"{name}-kernels"] = one
        return found

    @cached_property
    def certificate(self) -> RunCertificate:
        """Return the certificate."""
        return RunCertificate(self.report.verify)

    @cached_property
    def plan(self) -> Plan:
        """Return the passes with their predicted cost on this machine.

        :raises LookupError: if the run was opened by its folder.
        """
        if self.recipe is None:
            raise LookupError(f"{self.folder}: opened without its recipe; use sqft_export.plan")
        return _plan_of(self.recipe, self.folder.parent)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


def compile(
    model: str | Path | None = None,
    data: str | Path | None = None,
    recipe: RecipeSource | None = None,
    preset: str = DEFAULT_PRESET,
    test: str | Path | None = None,
    out: str | Path = "runs",
    on_progress: Callable[[PassProgress], None] | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Run:
    """Compile a model on data, as ``sqft-export run`` does, and return the finished run.

    :param model: folder, or name on the Hugging Face hub.
    :param data: conversations, prompts and answers, or a text; see ``docs/reference/tasks.md``.
    :param recipe: file or mapping, in place of ``data`` and ``preset``; ``model`` replaces its
        model.
    :param preset: int4, int4-sparse, int4-npu, int8 or int4-untuned.
    :param test: held-out data; None: a part of ``data``.
    :param out: folder of all runs, or a URL such as ``s3://bucket/runs``; the artifacts are in
        ``<out>/<name>``.
    :param on_progress: called with the progress of every pass; None: lines on stderr.
    :param threads: compute threads; None: those of the environment. Without effect if torch is
        already imported.
    :param settings: recipe settings, such as ``adapt={"epochs": 2}, seed=1``.
    :raises UserError: before any work, if something is missing or does not fit.
    """
    made = _recipe_of(model, data, recipe, preset, test, settings)
    _set_threads(threads)
    from sqft_export.run.pipeline import run_recipe

    root = runs_folder(out) / made.name
    run_recipe(made, root, listener=on_progress)
    return Run(root, made)


def plan(
    model: str | Path | None = None,
    data: str | Path | None = None,
    recipe: RecipeSource | None = None,
    preset: str = DEFAULT_PRESET,
    test: str | Path | None = None,
    out: str | Path = "runs",
    **settings: Any,
) -> Plan:
    """Check what :func:`compile` would do and predict its cost; arguments as there."""
    return _plan_of(_recipe_of(model, data, recipe, preset, test, settings), runs_folder(out))


def open_run(folder: str | Path) -> Run:
    """Open a finished run by its folder.

    :raises UserError: if the folder has no report.
    """
    from sqft_export.inference.locate import require_report

    require_report(Path(folder))
    return Run(Path(folder))


def benchmark(
    folders: Sequence[str | Path],
    data: str | Path | None = None,
    items: int = 100,
    score: str | None = None,
    against: Sequence[str | Path] = (),
    template_arguments: Mapping[str, Any] | None = None,
    **settings: Any,
) -> "DeploymentResults":
    """Measure deployments on this machine, as ``sqft-export benchmark`` does.

    :param folders: deployments; all are compared with the first.
    :param data: name of a dataset, a text file, or conversations.
    :param score: of the answers to conversations; None: exact match.
    :param template_arguments: variables that the chat template reads, such as
        ``{"enable_thinking": False}``; None: those of the run that the first folder belongs to.
    :param items: largest number of scored items.
    :param against: files or folders of other programs for the same table.
    :param settings: fields of ``measure.deployments.DeviceSettings``, such as ``rounds=1``.
    :raises UserError: if a folder is no deployment, or a setting is unknown.
    """
    from sqft_export.errors import UserError
    from sqft_export.measure.against import as_deployments
    from sqft_export.measure.deployments import DeviceSettings, benchmark_folders
    from sqft_export.measure.own_data import questions_about

    paths = [Path(folder) for folder in folders]
    try:
        chosen = DeviceSettings(**settings)
    except TypeError as error:
        known = ", ".join(DeviceSettings.__dataclass_fields__)
        raise UserError(f"benchmark: {error}; settings are {known}") from error
    source = _scored_data(data, score, template_arguments)
    questions = questions_about(paths[0], source, items)
    with as_deployments([Path(path) for path in against], paths[0]) as others:
        return benchmark_folders([*paths, *others], chosen, questions, None, others)


def _scored_data(
    data: str | Path | None, score: str | None, arguments: Mapping[str, Any] | None
) -> "ScoredData":
    """Return a dataset's name, a text file, or conversations as data to score on."""
    from sqft_export.measure.own_data import ScoredData
    from sqft_export.plan.requests import TEXT_SUFFIXES
    from sqft_export.recipe.schema import DATASET_NAMES

    if data is None:
        return ScoredData(score=score, template_arguments=arguments)
    if str(data) in DATASET_NAMES:
        return ScoredData(task=str(data), score=score, template_arguments=arguments)
    if Path(data).suffix.lower() in TEXT_SUFFIXES:
        return ScoredData(text=Path(data), score=score, template_arguments=arguments)
    return ScoredData(data=Path(data), score=score, template_arguments=arguments)


def load(
    folder: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    execution: str | None = None,
) -> "TextSession":
    """Load a deployment, a merged model or the best deployment of a run into its runtime.

    :param device: cpu, gpu or npu.
    :param threads: CPU threads; None: the runtime's choice.
    :param execution: auto, sparse or dense: our kernels in OpenVINO or llama.cpp; stock: the
        runtime's; None: those of the best deployment of a run, else stock.
    :raises UserError: if the folder is none of them, or its runtime cannot load it.
    """
    from sqft_export.inference.locate import find_deployment
    from sqft_export.inference.text import open_deployment
    from sqft_export.targets.execution import usable_execution

    found = find_deployment(Path(folder))
    kernels = usable_execution(found.path, execution or found.execution, device)
    return open_deployment(found.path, device, threads, kernels)


def _recipe_of(
    model: str | Path | None,
    data: str | Path | None,
    recipe: RecipeSource | None,
    preset: str,
    test: str | Path | None,
    settings: dict[str, Any],
) -> "Recipe":
    from sqft_export.errors import UserError
    from sqft_export.recipe.load import load_recipe, parse_recipe

    overrides = tuple(_settings_text("", settings))
    if recipe is None:
        if model is None or data is None:
            raise UserError("compile: give model and data, or a recipe")
        from sqft_export.plan.requests import Request, write_preset

        held_out = None if test is None else str(test)
        name, text = write_preset(Request(str(model), str(data), held_out, preset))
        return parse_recipe(text, Path(f"{name}.yaml"), overrides)
    if data is not None or test is not None:
        raise UserError("compile: data goes with a model; a recipe names its data in task")
    if model is not None:
        from sqft_export.plan.requests import model_section

        overrides = (f"model={json.dumps(model_section(str(model)))}", *overrides)
    if isinstance(recipe, Mapping):
        return parse_recipe(json.dumps(recipe, default=str), Path("recipe"), overrides)
    return load_recipe(Path(recipe), overrides)


def _settings_text(prefix: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings as ``section.field=value``, as the command line has them."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _settings_text(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}={json.dumps(value)}"


def _plan_of(recipe: "Recipe", runs: Path) -> Plan:
    from sqft_export.run.preview import preview

    return Plan(preview(recipe, runs))


def _set_threads(threads: int | None) -> None:
    """Set the number of compute threads, which torch reads at import."""
    if threads is not None and "torch" not in sys.modules:
        from sqft_export.machine.processors import set_threads

        set_threads(threads)
