"""The command line.  ``--help`` imports neither torch nor a runtime."""

import io
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer

from sqft_export.errors import UserError, one_line
from sqft_export.run.processors import limit_openmp_spinning

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

Deployment = Annotated[Path, typer.Argument(help="a deployment: OpenVINO, ONNX or GGUF folder")]
LARGEST_OPTION = 2**20
Items = Annotated[
    int, typer.Option(min=1, max=LARGEST_OPTION, help="of the task or windows of the text")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="threads that compute; else OMP_NUM_THREADS, else as many as processors are free",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, gpu or npu; `list targets` says which are here")
]
Kernels = Annotated[
    str, typer.Option(help="kernels that OpenVINO folders run on: stock,dense,sparse,auto")
]
Task = Annotated[str | None, typer.Option(help="answer a dataset too: gsm8k, arc_easy, boolq, ...")]
LmEval = Annotated[
    str | None, typer.Option(help="tasks of lm-eval, as hellaswag,mmlu (extra lm-eval)")
]
IncludePath = Annotated[
    Path | None, typer.Option(help="folder with lm-eval task files of your own")
]
Out = Annotated[Path, typer.Argument(help="folder to write; must not exist")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Run a recipe to its report; passes already done are skipped."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.report.terminal import run_text
    from sqft_export.run.host import writing_to
    from sqft_export.run.launcher import process_rank

    loaded = load_recipe(recipe, tuple(overrides or ()), model_path)
    _set_threads(threads, runs / loaded.name)
    from sqft_export.run.pipeline import run_recipe

    with writing_to(runs):
        artifacts = run_recipe(loaded, runs / loaded.name)
    if process_rank():
        return
    report = artifacts["report"].path
    document = json.loads((report / "report.json").read_text())
    if sys.stdout.isatty() and not json_only:
        print(run_text(document, artifacts, shutil.get_terminal_size().columns))
        return
    if not json_only:
        print((report / "report.md").read_text())
        print(f"report: {report / 'index.html'}")
    print(json.dumps(document))


@app.command("plan")
def plan_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Check a recipe and show its passes, what is cached, and what each will cost here."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.report.text import plan_text

    loaded = load_recipe(recipe, tuple(overrides or ()), model_path)
    _set_threads(threads, runs / loaded.name)
    from sqft_export.run.preview import preview

    document = preview(loaded, runs)
    print(json.dumps(document) if json_only else plan_text(document))


@app.command()
def export(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option(help="openvino, onnx or gguf; default: what the recipe names")
    ] = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
) -> None:
    """Write the deployment folders of a recipe; what was trained is not trained again."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.host import writing_to

    settings = [f"export.targets=[{only}]"] if only else []
    loaded = load_recipe(recipe, (*(overrides or ()), *settings), model_path)
    last = tuple(f"export-{target}" for target in loaded.export.targets)
    if not last:
        raise UserError(f"{loaded.file}: export.targets: is empty; name one with --only")
    _set_threads(threads, runs / loaded.name)
    from sqft_export.run.pipeline import run_recipe

    with writing_to(runs):
        artifacts = run_recipe(loaded, runs / loaded.name, last)
    for name in last:
        if name in artifacts:
            print(artifacts[name].path / "model")


@app.command("list")
def list_command(
    what: Annotated[
        Literal["targets", "recipes", "families", "methods", "fields"],
        typer.Argument(help="targets: runtimes and devices of this machine"),
    ],
    json_only: Json = False,
) -> None:
    """List targets of this machine, recipes, model families, methods, or fields of a recipe."""
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
    new_tokens: Annotated[int, typer.Option(min=2, max=LARGEST_OPTION)] = 32,
    batch: Annotated[str, typer.Option(help="batch sizes for tokens per second")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="processes per folder")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    cpus: Annotated[str | None, typer.Option(help="stay on these processors, as 0,1")] = None,
    device: Device = "cpu",
    execution: Kernels = "stock",
    task: Task = None,
    data: Annotated[Path | None, typer.Option(help="local folder of the task's dataset")] = None,
    text: Annotated[Path | None, typer.Option(help="a text file, for perplexity")] = None,
    lm_eval: LmEval = None,
    include_path: IncludePath = None,
    items: Items = 100,
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
    stay = _numbers(cpus, "--cpus", least=0) if cpus else None
    _check_before_measuring(folders)
    ways = tuple(dict.fromkeys(execution.split(",")))
    settings = DeviceSettings(lengths, new_tokens, batches, rounds, threads, stay, device, ways)
    questions = questions_of(folders[0], task, data, text, items)
    scored = _by_lm_eval(folders, settings, lm_eval, include_path, items) if lm_eval else {}
    document = benchmark_folders(folders, settings, questions) | scored
    if out:
        write_results(document, out)
    print(json.dumps(document) if json_only else deployments_text(document))


def _by_lm_eval(
    folders: list[Path], settings: Any, tasks: str, include: Path | None, items: int
) -> dict[str, Any]:
    """What lm-eval says of every folder.

    :raises UserError: if lm-eval is not installed, or has no such task.
    """
    from sqft_export.run.host import installed

    if not installed("lm_eval"):
        raise UserError("--lm-eval: lm-eval is not installed; pip install 'sqft-export[lm-eval]'")
    from sqft_export.measure.harness import SessionLM, evaluate

    found = {}
    for folder in folders:
        model = SessionLM(folder, settings.threads, settings.device)
        found[str(folder)] = evaluate(model, tasks.split(","), include, items)
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return {"lm_eval": found}


def _numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text[:1000].split(","))
    except ValueError as error:
        raise UserError(f"{option}: found {text!r}; numbers with commas are expected") from error
    if min(numbers) < least or max(numbers) > LARGEST_OPTION:
        raise UserError(f"{option}: found {text!r}; allowed are {least} to {LARGEST_OPTION}")
    return tuple(dict.fromkeys(numbers))


@app.command()
def inspect(
    folder: Deployment,
    json_only: Json = False,
) -> None:
    """Show what a deployment holds: layers, bits, sparsity, bytes, digests, runtimes."""
    from sqft_export.targets.inspect import inspect_folder, inspection_text

    _require_folder(folder)
    found = inspect_folder(folder)
    print(json.dumps(found) if json_only else inspection_text(found))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="runs (runs/tiny) or their reports")],
    out: Annotated[Path, typer.Option(help="folder for the page")] = Path("runs/comparison"),
) -> None:
    """Write one page over several runs."""
    from sqft_export.report.runs import compare_runs
    from sqft_export.run.host import writing_to

    with writing_to(out):
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
    threads: Threads = None,
) -> None:
    """Run a recipe with every combination of values, then compare; done passes are shared."""
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.host import writing_to

    chosen = [(*(overrides or ()), *settings) for settings in _combinations(over)]
    recipes = [load_recipe(recipe, settings, model_path) for settings in chosen]
    _set_threads(threads, runs / recipes[0].name)
    from sqft_export.model.hub import model_folder
    from sqft_export.plan.checks import check_recipe
    from sqft_export.run.pipeline import run_recipe

    for one in recipes:  # all of them before the first runs
        check_recipe(one, model_folder(one, download=False))
    reports = []
    for one, settings in zip(recipes, chosen, strict=True):
        print(" ".join(settings), file=sys.stderr)
        with writing_to(runs):
            reports.append(run_recipe(one, runs / one.name)["report"].path)
    if len(reports) > 1:
        compare(reports, runs / recipes[0].name / "sweep")
    else:
        print(f"one combination, nothing to compare; report: {reports[0] / 'index.html'}")


def _combinations(over: list[str]) -> list[tuple[str, ...]]:
    """Return every combination of the values of ``--over path=value,value``.

    :raises UserError: if an axis is not of that form.
    """
    from sqft_export.recipe.overrides import split_values

    axes = []
    for setting in over:
        path, equals, values = setting.partition("=")
        found = split_values(values)
        if not equals or not all(found):
            raise UserError(f"--over {setting!r}: expected path=value,value")
        axes.append([f"{path}={value}" for value in found])
    return list(itertools.product(*axes))


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
    from sqft_export.run.host import writing_to

    with writing_to(out):
        sizes = pack(folder, out, entropy)
    _say_packed(out, sizes)


@app.command("unpack")
def unpack_command(folder: Deployment, out: Out) -> None:
    """Write the plain folder of a packed one, byte for byte as it was."""
    from sqft_export.packed.folders import unpack
    from sqft_export.run.host import writing_to

    with writing_to(out):
        sizes = unpack(folder, out)
    _say_packed(out, sizes)


def _say_packed(out: Path, sizes: dict[str, Any]) -> None:
    dense, packed = sizes["dense_bytes"], sizes["packed_bytes"]
    print(f"{out}: weights {dense:,} bytes dense, {packed:,} packed ({packed / dense:.1%})")


@app.command("specialize")
def specialize_command(
    folder: Deployment,
    out: Out,
    execution: Annotated[
        Literal["auto", "sparse", "dense"],
        typer.Option(help="sparse: from mask and kept codes; dense; auto: the fastest here"),
    ] = "sparse",
) -> None:
    """Write a copy of an OpenVINO deployment that runs on this package's kernels."""
    from sqft_export.packed.execution import specialize
    from sqft_export.run.host import writing_to

    _require_folder(folder)
    with writing_to(out):
        made = specialize(folder, out, execution)
    products = ", ".join(f"{count} {form}" for form, count in made["products"].items())
    print(f"{out}: weights {made['bytes']:,} bytes; products: {products}")


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="a run, such as runs/tiny, or a deployment")],
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Derive every digest and line of a certificate again, from the files alone."""
    import tempfile

    _set_threads(threads)
    from sqft_export.packed.seal import require_seal
    from sqft_export.run.host import writing_to
    from sqft_export.targets.folder import is_deployment

    _require_folder(folder)
    if is_deployment(folder):
        files = require_seal(folder)["files"]
        done: dict[str, Any] = {"folder": str(folder), "files": len(files)}
        print(json.dumps(done) if json_only else f"{folder}: {len(files)} files as sealed")
        return
    from sqft_export.verify.certify import certify_again  # imports torch

    # Not in the run: it may be read-only, or its disk full. TMPDIR names another place.
    scratch_folder = tempfile.TemporaryDirectory(prefix="sqft-verify-")
    with writing_to(Path(tempfile.gettempdir())), scratch_folder as scratch:
        artifacts, certificate = certify_again(folder, Path(scratch))
    if json_only:
        print(json.dumps(certificate.document()))
    else:
        print(f"{len(artifacts)} artifacts as sealed")
        for check in certificate.checks:
            state = "passed" if check.passed else "FAILED"
            found = f"{check.differing:.3g} of {check.compared:,} {check.unit}"
            print(f"  {state}  {check.part:8}  {check.name}: {found}")
    certificate.require()


def _set_threads(threads: int | None, root: Path | None = None) -> None:
    """Set how many threads compute, and say so where the machine is busy; torch counts them as it
    is imported.

    :param root: of a run that may have been interrupted.
    """
    from sqft_export.run.launcher import process_count
    from sqft_export.run.processors import set_threads

    if threads is None and process_count() > 1:  # a launcher shares the processors out
        return
    if said := set_threads(threads, root):
        print(said, file=sys.stderr)


def _check_before_measuring(folders: list[Path]) -> None:
    """Say so where the machine is busy.

    :raises UserError: if there is no such folder.
    """
    import time

    from sqft_export.run.processors import SAMPLE_SECONDS, busy_text, sample, used_by_others

    for folder in folders:
        _require_folder(folder)
    before = sample()
    time.sleep(SAMPLE_SECONDS)
    if found := busy_text(used_by_others(before)):
        print(f"machine: {found}; latencies are longer than on a quiet one", file=sys.stderr)


def _require_folder(folder: Path) -> None:
    try:
        found = folder.is_dir()
    except OSError:  # its name is too long
        found = False
    if not found:
        raise UserError(f"{one_line(folder)}: no such folder")


class _Terminated(BaseException):
    """SIGTERM, so that what is half-written is cleaned up like at Ctrl-C."""


def _terminate(*_: object) -> None:
    raise _Terminated


INTERRUPTED = "passes that were done are kept; the same command goes on from there"


def _run() -> int:
    """The exit code: 2 for what the user can put right, 3 for what the machine lacks, 4 for damaged
    files, 5 for a certificate that failed, 130 and 143 when interrupted."""
    from sqft_export.run.host import exhausted_resource

    try:
        code = app(standalone_mode=False) or 0
        return _say(f"interrupted; {INTERRUPTED}", code) if code == 130 else code
    except UserError as error:
        return _say(str(error), error.code)
    except click.exceptions.Abort:
        return _say(f"interrupted; {INTERRUPTED}", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return _say(f"interrupted; {INTERRUPTED}", 130)
    except _Terminated:
        return _say(f"terminated; {INTERRUPTED}", 143)
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sqft_export"):
            raise
        needs = f"{error.name} is not installed, which this command needs"
        return _say(f"{needs}; pip install 'sqft-export[all]'", 2)
    except (OSError, MemoryError) as error:
        found = exhausted_resource(error, None)
        return _say(found or f"{getattr(error, 'filename', None) or ''}: {error}", 3)
    except RuntimeError as error:  # of torch, which raises one for an accelerator's memory
        if found := exhausted_resource(error, None):
            return _say(found, 3)
        raise


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Entry point: what a user can put right is one message and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text
    signal.signal(signal.SIGTERM, _terminate)
    limit_openmp_spinning()
    sys.exit(_run())


if __name__ == "__main__":
    main()
