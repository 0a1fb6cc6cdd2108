"""The command line. ``--help`` imports no torch and no runtime."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
import typer

from sqft_export.commands import compiling, publishing, serving, supervising, sweeping, talk, web
from sqft_export.commands.help import INTRODUCTION, Commands, version_option
from sqft_export.commands.machine import set_compute_threads
from sqft_export.commands.options import (
    Json,
    KernelsOption,
    ModelPath,
    Overrides,
    RecipeFile,
    Runs,
    Threads,
)
from sqft_export.errors import UserError, one_line
from sqft_export.machine.processors import limit_openmp_spinning
from sqft_export.telemetry import disable_telemetry

if TYPE_CHECKING:
    from sqft_export.measure.own_data import Questions
    from sqft_export.measure.results import DeploymentResults, DeviceSettings, TaskMetrics
    from sqft_export.packed.folders import PackedSizes

app = typer.Typer(
    help=INTRODUCTION, cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _first_page(version: Annotated[bool, version_option()] = False) -> None:
    pass


compiling.register(app)
talk.register(app)
serving.register(app)
publishing.register(app)
web.register(app)
sweeping.register(app)

Deployment = Annotated[
    Path, typer.Argument(help="deployment: an OpenVINO, ONNX, GGUF or web folder")
]
MAX_OPTION = 2**20
Items = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_OPTION, help="number of items of the task, or of windows of the text"
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="cpu, gpu, npu, vulkan, cuda or webgpu; `list targets` lists those of this machine",
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="kernels for OpenVINO and GGUF folders: stock, dense, sparse, auto, or several with "
        "commas"
    ),
]
Task = Annotated[str | None, typer.Option(help="dataset for accuracy: gsm8k, arc_easy, boolq, ...")]
OwnData = Annotated[
    Path | None,
    typer.Option(help="your own conversations; with --task: local folder of the dataset"),
]
Score = Annotated[
    str | None,
    typer.Option(
        help="score of answers to --data: exact (default), normalized, contains, json, json_f1, "
        "rouge_l, bleu, regex:PATTERN, or a Python file with score(expected, generated)"
    ),
]
TemplateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--template-argument",
        help="variable that the chat template reads, such as enable_thinking=false; may be "
        "repeated; default: those of the deployment's run",
    ),
]
LmEval = Annotated[
    str | None, typer.Option(help="lm-eval tasks, such as hellaswag,mmlu (extra lm-eval)")
]
IncludePath = Annotated[Path | None, typer.Option(help="folder with your own lm-eval task files")]
Out = Annotated[Path, typer.Argument(help="folder to write; it must not exist")]
Deployments = Annotated[
    list[Path], typer.Argument(help="deployments; all are compared with the first")
]
PromptLengths = Annotated[str, typer.Option(help="prompt lengths in tokens")]
NewTokens = Annotated[int, typer.Option(min=2, max=MAX_OPTION, help="generated tokens per prompt")]
BatchSizes = Annotated[str, typer.Option(help="batch sizes for tokens per second")]
RuntimeThreads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="compute threads; default: the runtime's choice"),
]
Processors = Annotated[
    str | None, typer.Option(help="processors that may be used, such as 0,1; default: all")
]
Against = Annotated[
    list[Path] | None,
    typer.Option(
        help="file or folder of another program for the same table: a .gguf file with the same "
        "tokenizer, an OpenVINO, ONNX or Hugging Face folder; may be repeated"
    ),
]
Results = Annotated[
    Path | None, typer.Option(help="folder for results.json, items.jsonl and a JSON per deployment")
]
Rounds = Annotated[int, typer.Option(min=1, max=1000, help="processes per folder")]
PerplexityText = Annotated[Path | None, typer.Option(help="text file for perplexity")]
WithReference = Annotated[
    bool, typer.Option("--reference", help="also the KL divergence from the reference (probe.json)")
]


@app.command()
def export(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--only",
            help="openvino, onnx, gguf or web; default: the targets of the recipe",
        ),
    ] = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
) -> None:
    """Write the deployment folders of a recipe. Finished passes are not run again.

    Example: sqft-export export recipes/tiny.yaml --target onnx
    """
    from sqft_export.machine.host import writing_to
    from sqft_export.recipe.load import load_recipe

    settings = [f"export.targets=[{only}]"] if only else []
    loaded = load_recipe(recipe, (*(overrides or ()), *settings), model_path)
    last = tuple(f"export-{target}" for target in loaded.export.targets)
    if not last:
        raise UserError(f"{loaded.file}: export.targets: found no target; name one with --target")
    set_compute_threads(threads, runs / loaded.name)
    from sqft_export.run.pipeline import run_recipe

    with writing_to(runs):
        artifacts = run_recipe(loaded, runs / loaded.name, last, redirect=True)
    for name in last:
        if name in artifacts:
            print(artifacts[name].path / "model")


@app.command("list")
def list_command(
    what: Annotated[
        Literal["targets", "recipes", "families", "methods", "fields"],
        typer.Argument(help="what to list; targets are runtimes and devices of this machine"),
    ],
    json_only: Json = False,
) -> None:
    """List targets of this machine, recipes, model families, methods, or recipe fields."""
    from sqft_export.plan.catalog import CATALOG

    entries = CATALOG[what]()
    if json_only:
        print(json.dumps(entries))
        return
    for entry in entries:
        print("  ".join(f"{value!s:14}" for value in entry.values()).rstrip())


@app.command("benchmark")
def benchmark_command(
    folders: Deployments,
    prompt_tokens: PromptLengths = "32,128,512,2048",
    new_tokens: NewTokens = 32,
    batch: BatchSizes = "1,8",
    rounds: Rounds = 5,
    threads: RuntimeThreads = None,
    cpus: Processors = None,
    device: Device = "cpu",
    execution: Kernels = "stock",
    task: Task = None,
    data: OwnData = None,
    score: Score = None,
    template_argument: TemplateArguments = None,
    text: PerplexityText = None,
    lm_eval: LmEval = None,
    include_path: IncludePath = None,
    items: Items = 100,
    against: Against = None,
    reference: WithReference = False,
    out: Results = None,
    json_only: Json = False,
) -> None:
    """Measure latency, memory, energy and accuracy of deployments on this machine.

    Example: sqft-export benchmark deployed/openvino deployed/onnx --data chats.jsonl
    """
    from sqft_export.measure.against import as_deployments
    from sqft_export.measure.deployments import benchmark_folders

    chosen = prompt_tokens, new_tokens, batch, rounds, threads, cpus, device, execution
    settings = _device_settings(*chosen)
    _check_before_measuring(folders)
    questions = _questions(folders[0], task, data, text, score, template_argument or [], items)
    with as_deployments(against or [], folders[0]) as others:
        everything = [*folders, *others]
        scored = _score_with_lm_eval(everything, settings, lm_eval, include_path, items)
        document = benchmark_folders(everything, settings, questions, scored, others)
    document = _add_reference(document, folders) if reference else document
    _print_results(document, out, json_only)


def _questions(
    folder: Path,
    task: str | None,
    data: Path | None,
    text: Path | None,
    score: str | None,
    template_arguments: list[str],
    items: int,
) -> "Questions | None":
    """Return what deployments are scored on; None without data."""
    from sqft_export.measure.own_data import ScoredData, parse_template_arguments, questions_about

    arguments = parse_template_arguments(template_arguments)
    return questions_about(folder, ScoredData(task, data, text, score, arguments), items)


def _device_settings(
    prompt_tokens: str,
    new_tokens: int,
    batch: str,
    rounds: int,
    threads: int | None,
    cpus: str | None,
    device: str,
    execution: str,
) -> "DeviceSettings":
    """Return the settings of a measurement from its options.

    :raises UserError: naming an option that is not a list of numbers.
    """
    from sqft_export.measure.results import DeviceSettings

    lengths, batches = _numbers(prompt_tokens, "--prompt-tokens"), _numbers(batch, "--batch")
    processors = _numbers(cpus, "--cpus", least=0) if cpus else None
    kernels = tuple(dict.fromkeys(execution.split(",")))
    sizes = lengths, new_tokens, batches, rounds
    return DeviceSettings(*sizes, threads, processors, device, kernels)


def _add_reference(document: "DeploymentResults", folders: list[Path]) -> "DeploymentResults":
    """Return the results with the KL divergence of every folder from the reference."""
    from sqft_export.probes.reference import measure_divergences

    settings = document.settings
    found = measure_divergences(folders, settings.device, settings.threads)
    return document.model_copy(update={"reference": found})


def _print_results(document: "DeploymentResults", out: Path | None, json_only: bool) -> None:
    from sqft_export.measure.deployments import write_results
    from sqft_export.report.text import deployments_text

    if out:
        write_results(document, out)
    print(json.dumps(document.to_json()) if json_only else deployments_text(document))


def _score_with_lm_eval(
    folders: list[Path],
    settings: "DeviceSettings",
    tasks: str | None,
    include: Path | None,
    items: int,
) -> "dict[str, TaskMetrics]":
    """Return the results of lm-eval by the name of the folder; print its warnings on stderr.

    :param tasks: names with commas; None: return no results.
    :raises UserError: if lm-eval is not installed or does not know a task.
    """
    if not tasks:
        return {}
    from sqft_export.machine.host import installed

    if not installed("lm_eval"):
        raise UserError("--lm-eval: lm-eval is not installed; pip install 'sqft-export[lm-eval]'")
    from sqft_export.measure.deployments import names_of
    from sqft_export.measure.harness import SessionLM, evaluate

    found = {}
    for name, folder in zip(names_of(folders), folders, strict=True):
        model = SessionLM(folder, settings.threads, settings.device)
        found[name] = evaluate(model, tasks.split(","), include, items)
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return found


def _numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text[:1000].split(","))
    except ValueError as error:
        raise UserError(
            f"{option}: found {text!r}; expected whole numbers with commas, such as 1,4"
        ) from error
    if min(numbers) < least or max(numbers) > MAX_OPTION:
        raise UserError(f"{option}: found {text!r}; allowed are {least} to {MAX_OPTION}")
    return tuple(dict.fromkeys(numbers))


@app.command()
def inspect(
    folder: Deployment,
    json_only: Json = False,
) -> None:
    """Show the content of a deployment: layers, bits, sparsity, bytes, digests, runtimes.

    It also prints the code that loads the folder.

    Example: sqft-export inspect deployed/openvino
    """
    from sqft_export.inference.locate import refuse_run
    from sqft_export.targets.inspect import inspect_folder, inspection_text

    _require_folder(folder)
    refuse_run(folder, "inspect")
    found = inspect_folder(folder)
    print(json.dumps(found) if json_only else inspection_text(found))


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="at least two runs, such as runs/tiny, or reports")
    ],
    out: Annotated[Path, typer.Option(help="folder for the comparison")] = Path("runs/comparison"),
) -> None:
    """Compare several runs on one HTML page.

    Example: sqft-export compare runs/tiny runs/other --out comparison
    """
    sweeping.write_comparison(folders, out)


@app.command("pack")
def pack_command(
    folder: Deployment,
    out: Out,
    entropy: Annotated[
        bool,
        typer.Option("--entropy", help="also compress by entropy coding: smaller, slower to load"),
    ] = False,
) -> None:
    """Write a smaller copy of a deployment that does not store zero weights.

    Example: sqft-export pack deployed/onnx deployed/onnx-packed
    """
    from sqft_export.machine.host import writing_to
    from sqft_export.packed.folders import pack

    with writing_to(out):
        sizes = pack(folder, out, entropy)
    _print_packed(out, sizes)


@app.command("unpack")
def unpack_command(folder: Deployment, out: Out) -> None:
    """Restore the folder that `pack` read, byte for byte.

    Example: sqft-export unpack deployed/onnx-packed deployed/onnx-restored
    """
    from sqft_export.machine.host import writing_to
    from sqft_export.packed.folders import unpack

    with writing_to(out):
        sizes = unpack(folder, out)
    _print_packed(out, sizes)


def _print_packed(out: Path, sizes: "PackedSizes") -> None:
    dense, packed = sizes["dense_bytes"], sizes["packed_bytes"]
    print(f"{out}: weights {dense:,} bytes dense, {packed:,} packed ({packed / dense:.1%})")


@app.command("specialize")
def specialize_command(
    folder: Deployment,
    out: Out,
    execution: Annotated[
        Literal["auto", "sparse", "dense"],
        typer.Option(
            help="kernels: sparse (mask and non-zero codes), dense, or auto (the fastest)"
        ),
    ] = "sparse",
) -> None:
    """Write a copy of an OpenVINO deployment that runs on the kernels of this package.

    Example: sqft-export specialize deployed/openvino deployed/openvino-sparse
    """
    from sqft_export.machine.host import writing_to
    from sqft_export.packed.execution import specialize

    _require_folder(folder)
    with writing_to(out):
        made = specialize(folder, out, execution)
    products = ", ".join(f"{count} {form}" for form, count in made["products"].items())
    print(f"{out}: weights {made['bytes']:,} bytes; products: {products}")


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="run, such as runs/tiny, or deployment")],
    threads: Threads = None,
    device: Device = "cpu",
    execution: KernelsOption = None,
    long: Annotated[
        bool, typer.Option("--long", help="run the long prompts of a deployment's self-test too")
    ] = False,
    json_only: Json = False,
) -> None:
    """Check a run or a deployment again, from its files.

    For a run: recompute all digests and re-run every check of the certificate.

    For a deployment: check the digests of its files, and run its self-test (probe.json) in the
    installed runtime, in exact and default mode. If it fails, the likely cause is printed.

    Example: sqft-export verify runs/tiny
    """
    set_compute_threads(threads)
    from sqft_export.probes.verify import is_testable, verify_deployment

    _require_folder(folder)
    if is_testable(folder):
        verify_deployment(folder, device, threads, execution or "stock", long, json_only)
        return
    if long or execution or device != "cpu":
        raise UserError(
            f"{folder}: is a run; --long, --device and --execution are for its deployments"
        )
    _verify_run(folder, json_only)


def _verify_run(folder: Path, json_only: bool) -> None:
    """Recompute the certificate of a run and print it.

    :raises CertificateError: listing every check that failed.
    """
    import tempfile

    from sqft_export.machine.host import writing_to
    from sqft_export.verify.certify import certify_again  # imports torch

    # Not in the run, which may be read-only or on a full disk. TMPDIR selects another folder.
    scratch_folder = tempfile.TemporaryDirectory(prefix="sqft-verify-")
    with writing_to(Path(tempfile.gettempdir())), scratch_folder as scratch:
        artifacts, certificate = certify_again(folder, Path(scratch))
    if json_only:
        print(json.dumps(certificate.document().to_json()))
    else:
        print(f"{len(artifacts)} artifacts match their seals")
        for check in certificate.checks:
            state = "passed" if check.passed else "FAILED"
            result = f"{check.differing:.3g} of {check.compared:,} {check.unit}"
            print(f"  {state}  {check.part:8}  {check.name}: {result}")
    certificate.require()


def _check_before_measuring(folders: list[Path]) -> None:
    """Print a warning on stderr if the machine is busy.

    :raises UserError: if a folder does not exist, or is a run.
    """
    import time

    from sqft_export.inference.locate import refuse_run
    from sqft_export.machine.processors import SAMPLE_SECONDS, busy_text, sample, used_by_others

    for folder in folders:
        _require_folder(folder)
        refuse_run(folder, "benchmark")
    before = sample()
    time.sleep(SAMPLE_SECONDS)
    if found := busy_text(used_by_others(before)):
        print(f"machine: {found}; latencies are longer than on an idle machine", file=sys.stderr)


def _require_folder(folder: Path) -> None:
    try:
        found = folder.is_dir()
    except OSError:  # the name is too long
        found = False
    if not found:
        raise UserError(f"{one_line(folder)}: no such folder")


class _Terminated(BaseException):
    """Raised on SIGTERM, so that half-written files are removed as on Ctrl-C."""


def _terminate(*_: object) -> None:
    raise _Terminated


RESUME_HINT = "finished passes are kept; the same command resumes the run"


def _run() -> int:
    """Run the command and return its exit code.

    2: error of the user. 3: the machine lacks memory, disk or permission, or lost a device.
    4: damaged files. 5: a certificate failed. 130: Ctrl-C. 143: SIGTERM.
    """
    from sqft_export.machine.host import exhausted_resource

    try:
        code = app(standalone_mode=False) or 0
        return _print_error(f"interrupted; {RESUME_HINT}", code) if code == 130 else code
    except UserError as error:
        return _print_error(str(error), error.code)
    except click.exceptions.Abort:
        return _print_error(f"interrupted; {RESUME_HINT}", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        return _print_error(f"interrupted; {RESUME_HINT}", 130)
    except _Terminated:
        return _print_error(f"terminated; {RESUME_HINT}", 143)
    except BrokenPipeError:  # the reader of the output closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sqft_export"):
            raise
        message = f"{error.name} is not installed, but this command needs it"
        return _print_error(f"{message}; pip install 'sqft-export[all]'", 2)
    except (OSError, MemoryError) as error:
        found = exhausted_resource(error, None)
        return _print_error(found or f"{getattr(error, 'filename', None) or ''}: {error}", 3)
    except RuntimeError as error:  # torch raises one if an accelerator's memory is exhausted
        if found := exhausted_resource(error, None):
            return _print_error(found, 3)
        raise


def _print_error(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> None:
    """Run the command line. Errors of the user print one message and no traceback."""
    if supervising.needs_supervision(sys.argv[1:]):
        sys.exit(supervising.supervise(sys.argv[1:]))
    supervising.redirect_native_messages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8
    signal.signal(signal.SIGTERM, _terminate)
    limit_openmp_spinning()
    disable_telemetry()
    sys.exit(_run())


if __name__ == "__main__":
    main()
