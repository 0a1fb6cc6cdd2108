"""``run``, ``plan`` and ``init``: from a recipe, or from a model and data."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqft_export.commands.machine import set_compute_threads
from sqft_export.commands.options import Json, ModelPath, Runs, Threads
from sqft_export.errors import UserError, one_line
from sqft_export.plan.presets import DEFAULT_PRESET, PRESETS
from sqft_export.recipe.builtin import builtin_recipes, find_recipe

if TYPE_CHECKING:
    from sqft_export.artifacts.store import Artifact
    from sqft_export.recipe.schema import Recipe

_RECIPE_FILE = "recipe.yaml"  # in a run's folder: the preset's recipe
_RECIPE_SUFFIXES = (".yaml", ".yml")
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
_PRESET_HELP = "; ".join(f"{name}: {about}" for name, about in PRESETS.items())

_Source = Annotated[
    str,
    typer.Argument(
        help="recipe file; or a model: its folder, or its name on the Hugging Face hub",
        metavar="RECIPE_OR_MODEL",
    ),
]
_ModelName = Annotated[
    str,
    typer.Argument(help="model: its folder, or its name on the Hugging Face hub", metavar="MODEL"),
]
_Settings = Annotated[
    list[str] | None,
    typer.Argument(help="recipe settings to replace, such as adapt.epochs=2", metavar="SETTINGS"),
]
_Data = Annotated[
    str | None,
    typer.Option(
        help="with a model: conversations or prompts and answers (jsonl, json, csv, tsv, parquet, "
        "a folder with train and test files, save_to_disk folder, hub:<dataset>), a text file, or "
        "the name of a known dataset"
    ),
]
_TestData = Annotated[
    str | None, typer.Option(help="held-out data; default: a tenth of --data is held out")
]
_Preset = Annotated[str | None, typer.Option(help=f"{_PRESET_HELP}; default: {DEFAULT_PRESET}")]
_Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="openvino, onnx, gguf or web; may be repeated; default: the first three"
    ),
]
_TorchDevice = Annotated[
    str | None, typer.Option("--device", help="device for torch: auto, cpu, cuda, xpu or mps")
]
_Sparsity = Annotated[float | None, typer.Option(help="share of the weights that become zero")]
_Bits = Annotated[int | None, typer.Option(help="bits per weight: 2, 3, 4 or 8")]


@dataclass(frozen=True)
class Choices:
    """Options that stand for recipe settings; None: as the recipe or the preset has it."""

    targets: list[str] | None = None
    device: str | None = None
    sparsity: float | None = None
    bits: int | None = None

    def settings(self, of_preset: bool) -> list[str]:
        """Return the options as ``section.field=value``.

        :param of_preset: the recipe is a preset's, whose ``sparsify.method`` may be none.
        """
        found = []
        if self.targets:
            found.append(f"export.targets=[{', '.join(self.targets)}]")
        if self.device is not None:
            found.append(f"device={self.device}")
        if self.bits is not None:
            found.append(f"quantize.bits={self.bits}")
        if self.sparsity is not None and of_preset:
            found.append(f"sparsify={{method: sparsegpt, sparsity: {self.sparsity}}}")
        elif self.sparsity is not None:
            found.append(f"sparsify.sparsity={self.sparsity}")
        return found


@dataclass(frozen=True)
class CompileRequest:
    """A recipe file with its settings, or a model with its data."""

    source: str
    data: str | None
    test: str | None
    preset: str | None
    choices: Choices
    overrides: tuple[str, ...]
    model_path: Path | None = None

    @property
    def is_recipe(self) -> bool:
        """Return whether the source is a recipe file or names a built-in recipe."""
        named = find_recipe(Path(self.source))
        is_data = named.suffix.lower() in _DATA_SUFFIXES
        return self.source.endswith(_RECIPE_SUFFIXES) or (named.is_file() and not is_data)

    def load(self, runs: Path, threads: int | None) -> "tuple[Recipe, str]":
        """Return the recipe, the file's or the preset's for the model, and the preset's text.

        The text is empty for a recipe file.

        :raises UserError: if options of a model are given with a recipe file, or the other way.
        """
        from sqft_export.recipe.load import load_recipe, parse_recipe

        settings = (*self.choices.settings(not self.is_recipe), *self.overrides)
        if self.is_recipe:
            self._refuse_model_options()
            recipe = load_recipe(Path(self.source), settings, self.model_path)
            set_compute_threads(threads, runs / recipe.name)
            return recipe, ""
        set_compute_threads(threads)
        name, text = self.preset_text()
        return parse_recipe(text, runs / name / _RECIPE_FILE, settings), text

    def preset_text(self) -> tuple[str, str]:
        """Return name and text of the preset's recipe for the model."""
        if self.model_path is not None:
            raise UserError("--model-path: goes with a recipe file; name the model's folder only")
        if self.data is None:
            raise UserError(_missing_data(self.source))
        from sqft_export.plan.requests import Request, write_preset

        preset = self.preset or DEFAULT_PRESET
        return write_preset(Request(self.source, self.data, self.test, preset))

    def _refuse_model_options(self) -> None:
        given = {"--data": self.data, "--test": self.test, "--preset": self.preset}
        if found := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{', '.join(found)}: found with the recipe {one_line(self.source)}; a recipe "
                "names its data in task. Change it there, or give a model in its place"
            )


def _missing_data(source: str) -> str:
    """Return the message for a source that is no recipe and comes without data."""
    if Path(source).suffix.lower() in _DATA_SUFFIXES:
        return (
            f"{one_line(source)}: is a data file; name the model too: sqft-export run <model> "
            f"--data {one_line(source)}"
        )
    if Path(source).exists() or "/" in source or source.startswith("builtin:"):
        return (
            f"{one_line(source)}: no recipe, and for a model --data is missing; for example: "
            f"sqft-export run {one_line(source)} --data chats.jsonl"
        )
    return (
        f"{one_line(source)}: no such recipe and no such model; a recipe is a .yaml file, a model "
        f"is a folder or a name on the hub, such as HuggingFaceTB/SmolLM2-135M-Instruct; built-in "
        f"recipes: {', '.join(builtin_recipes())}"
    )


def run_command(
    source: _Source,
    settings: _Settings = None,
    data: _Data = None,
    test: _TestData = None,
    preset: _Preset = None,
    target: _Targets = None,
    device: _TorchDevice = None,
    sparsity: _Sparsity = None,
    bits: _Bits = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Compile a model on your data: run all passes and write the report.

    With a model, a preset makes the recipe, which is stored in runs/<model>/recipe.yaml. Finished
    passes are not run again.

    Example: sqft-export run HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl

    Example: sqft-export run recipes/tiny.yaml sparsify.sparsity=0.6
    """
    choices = Choices(target, device, sparsity, bits)
    asked = CompileRequest(source, data, test, preset, choices, tuple(settings or ()), model_path)
    recipe, text = asked.load(runs, threads)
    from sqft_export.machine.host import write_file, writing_to
    from sqft_export.machine.launcher import process_rank
    from sqft_export.run.pipeline import run_recipe

    root = runs / recipe.name
    with writing_to(runs):
        artifacts = run_recipe(recipe, root, redirect=True)
        if text and not process_rank():
            write_file(root / _RECIPE_FILE, f"{_settings_comment(recipe.overrides)}{text}")
    if not process_rank():
        _print_report(artifacts["report"].path, artifacts, json_only)


def _settings_comment(overrides: tuple[str, ...]) -> str:
    """Return a comment with the settings of the command line, which the recipe below lacks."""
    return f"# run with these settings too: {' '.join(overrides)}\n" if overrides else ""


def _print_report(report: Path, artifacts: "dict[str, Artifact]", json_only: bool) -> None:
    from sqft_export.report.document import REPORT, read_report
    from sqft_export.report.terminal import run_text

    document = read_report(report / REPORT)
    if sys.stdout.isatty() and not json_only:
        print(run_text(document, artifacts, shutil.get_terminal_size().columns))
        return
    if not json_only:
        print((report / "report.md").read_text())
        print(f"report: {report / 'index.html'}")
    print(json.dumps(document.to_json()))


def plan_command(
    source: _Source,
    settings: _Settings = None,
    data: _Data = None,
    test: _TestData = None,
    preset: _Preset = None,
    target: _Targets = None,
    device: _TorchDevice = None,
    sparsity: _Sparsity = None,
    bits: _Bits = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Check a recipe, or a model with data; predict time, memory and disk space of each pass.

    Example: sqft-export plan HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl

    Example: sqft-export plan recipes/tiny.yaml
    """
    choices = Choices(target, device, sparsity, bits)
    asked = CompileRequest(source, data, test, preset, choices, tuple(settings or ()), model_path)
    recipe, _ = asked.load(runs, threads)
    from sqft_export.report.text import plan_text
    from sqft_export.run.preview import preview

    document = preview(recipe, runs)
    print(json.dumps(document.to_json()) if json_only else plan_text(document))


def init_command(
    model: _ModelName,
    data: _Data = None,
    test: _TestData = None,
    preset: _Preset = None,
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: <model>.yaml in this folder")
    ] = None,
) -> None:
    """Write the recipe that `run` uses for a model and data, with a comment per field.

    Example: sqft-export init HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl
    """
    from sqft_export.machine.host import write_file, writing_to

    asked = CompileRequest(model, data, test, preset, Choices(), ())
    if asked.is_recipe:
        raise UserError(f"{one_line(model)}: is a file; init takes a model: a folder or a hub name")
    name, text = asked.preset_text()
    file = out or Path(f"{name}.yaml")
    if file.exists():
        raise UserError(f"{file}: exists already; --out names another file")
    with writing_to(file.parent):
        write_file(file, text, replace=False)
    print(f"{file}: edit it, then: sqft-export run {file}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("run")(run_command)
    app.command("plan")(plan_command)
    app.command("init")(init_command)
