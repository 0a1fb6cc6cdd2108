"""The command line.  ``--help`` imports neither torch nor a runtime."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sqft_export.errors import UserError

app = typer.Typer(
    help="Compile a language model and a task into a sparse, low-precision deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[Path, typer.Argument(help="recipe, such as recipes/tiny.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings such as sparsify.sparsity=0.6")
]
ModelPath = Annotated[
    Path | None, typer.Option(help="local Hugging Face folder in place of the recipe's model")
]
Runs = Annotated[Path, typer.Option(help="where artifacts are kept")]
Json = Annotated[bool, typer.Option("--json", help="nothing on stdout but one JSON document")]

Deployment = Annotated[Path, typer.Argument(help="a deployment: OpenVINO or ONNX folder")]
Out = Annotated[Path, typer.Argument(help="folder to write; must not exist")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    json_only: Json = False,
) -> None:
    """Run a recipe to its report; passes already done are skipped."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.launcher import process_rank
    from sqft_export.run.pipeline import run_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), model_path)
    artifacts = run_recipe(loaded, runs / loaded.name)
    if process_rank():
        return
    report = artifacts["report"].path
    if not json_only:
        print((report / "report.md").read_text())
        print(f"report: {report / 'index.html'}")
    print(json.dumps(json.loads((report / "report.json").read_text())))


@app.command("plan")
def plan_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    json_only: Json = False,
) -> None:
    """Check a recipe and show its passes, what is cached, and what each will cost here."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.report.text import plan_text
    from sqft_export.run.preview import preview

    document = preview(load_recipe(recipe, tuple(overrides or ()), model_path), runs)
    print(json.dumps(document) if json_only else plan_text(document))


@app.command()
def export(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(help="openvino or onnx; default: what the recipe names")
    ] = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the deployment folders of a recipe; what was trained is not trained again."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.pipeline import run_recipe

    settings = [f"export.targets=[{only}]"] if only else []
    loaded = load_recipe(recipe, (*(overrides or ()), *settings), model_path)
    last = tuple(f"export-{target}" for target in loaded.export.targets)
    if not last:
        raise UserError(f"{loaded.file}: export.targets: is empty; name one with --only")
    artifacts = run_recipe(loaded, runs / loaded.name, last)
    for name in last:
        print(artifacts[name].path / "model")


@app.command("list")
def list_command(
    what: Annotated[
        Literal["targets", "recipes", "families", "methods"],
        typer.Argument(help="targets: runtimes and devices of this machine"),
    ],
    json_only: Json = False,
) -> None:
    """Show what there is: targets here, recipes, model families, methods of every pass."""
    from sqft_export.plan.catalog import CATALOG

    entries = CATALOG[what]()
    if json_only:
        print(json.dumps(entries))
        return
    for entry in entries:
        print("  ".join(f"{value!s:14}" for value in entry.values()).rstrip())


@app.command("benchmark")
def benchmark_command(
    folders: Annotated[list[Path], typer.Argument(help="deployments, compared with the first")],
    prompt_tokens: Annotated[str, typer.Option(help="lengths of prompts")] = "32,128,512,2048",
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    batch: Annotated[str, typer.Option(help="batch sizes for tokens per second")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="processes per folder")] = 5,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    cpus: Annotated[str | None, typer.Option(help="stay on these processors, as 0,1")] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, gpu or npu; `list targets` says which are here")
    ] = "cpu",
    task: Annotated[
        str | None, typer.Option(help="answer a dataset too: gsm8k, arc_easy, boolq, ...")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="local folder of the task's dataset")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file, for perplexity")] = None,
    items: Annotated[int, typer.Option(min=1, help="of the task or windows of the text")] = 100,
    out: Annotated[Path | None, typer.Option(help="folder for results.json, items.jsonl")] = None,
    json_only: Json = False,
) -> None:
    """Measure deployments on this machine: latency, memory, energy, accuracy."""
    from sqft_export.measure.deployments import (
        DeviceSettings,
        benchmark_folders,
        questions_of,
        write_results,
    )
    from sqft_export.report.text import deployments_text

    lengths, batches = _numbers(prompt_tokens, "--prompt-tokens"), _numbers(batch, "--batch")
    stay = _numbers(cpus, "--cpus") if cpus else None
    settings = DeviceSettings(lengths, new_tokens, batches, rounds, threads, stay, device)
    questions = questions_of(folders[0], task, data, text, items)
    document = benchmark_folders(folders, settings, questions)
    if out:
        write_results(document, out)
    print(json.dumps(document) if json_only else deployments_text(document))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option}: found {text!r}; numbers with commas are expected") from error


@app.command()
def inspect(
    folder: Deployment,
    json_only: Json = False,
) -> None:
    """Show what a deployment holds: layers, bits, sparsity, bytes, digests, runtimes."""
    from sqft_export.targets.inspect import inspect_folder, inspection_text

    found = inspect_folder(folder)
    print(json.dumps(found) if json_only else inspection_text(found))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="runs (runs/tiny) or their reports")],
    out: Annotated[Path, typer.Option(help="folder for the page")] = Path("runs/comparison"),
) -> None:
    """Write one page over several runs."""
    from sqft_export.report.runs import compare_runs

    compare_runs(folders, out)
    print((out / "comparison.md").read_text())
    print(f"comparison: {out / 'index.html'}")


@app.command()
def sweep(
    recipe: RecipeFile,
    over: Annotated[
        list[str],
        typer.Option("--over", help="a setting and its values: sparsify.sparsity=0.3,0.5"),
    ],
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run a recipe with every combination of values, then compare; done passes are shared."""
    from sqft_export.model.hub import model_folder
    from sqft_export.plan.checks import check_recipe
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.pipeline import run_recipe

    axes = []
    for setting in over:
        path, equals, values = setting.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--over {setting!r}: expected path=value,value")
        axes.append([f"{path}={value}" for value in values.split(",")])
    chosen = [(*(overrides or ()), *settings) for settings in itertools.product(*axes)]
    recipes = [load_recipe(recipe, settings, model_path) for settings in chosen]
    for one in recipes:  # all of them before the first runs
        check_recipe(one, model_folder(one, download=False))
    reports = []
    for one, settings in zip(recipes, chosen, strict=True):
        print(" ".join(settings), file=sys.stderr)
        reports.append(run_recipe(one, runs / one.name)["report"].path)
    compare(reports, runs / recipes[0].name / "sweep")


@app.command("pack")
def pack_command(
    folder: Deployment,
    out: Out,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="compress too: smaller, slower to load")
    ] = False,
) -> None:
    """Write a copy of a deployment whose weight file zeros make smaller."""
    from sqft_export.packed.folders import pack

    _say_packed(out, pack(folder, out, entropy))


@app.command("unpack")
def unpack_command(folder: Deployment, out: Out) -> None:
    """Write the plain folder of a packed one, byte for byte as it was."""
    from sqft_export.packed.folders import unpack

    _say_packed(out, unpack(folder, out))


def _say_packed(out: Path, sizes: dict[str, Any]) -> None:
    dense, packed = sizes["dense_bytes"], sizes["packed_bytes"]
    print(f"{out}: weights {dense:,} bytes dense, {packed:,} packed ({packed / dense:.1%})")


def main() -> None:
    """Entry point: a UserError is one message and exit code 2, never a traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sqft_export"):
            raise
        print(
            f"error: {error.name} is not installed, which this command needs; "
            "pip install 'sqft-export[all]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
