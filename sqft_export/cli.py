"""The command line.  ``--help`` imports neither torch nor a runtime."""

import itertools
import json
import sys
from dataclasses import asdict
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
    from sqft_export import pipeline
    from sqft_export.machine import process_rank
    from sqft_export.recipe import load

    loaded = load(recipe, tuple(overrides or ()), model_path)
    artifacts = pipeline.run(loaded, runs / loaded.name)
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
    from sqft_export import pipeline, plan, predict, sources, tasks
    from sqft_export.artifact import Store
    from sqft_export.recipe import load

    loaded = load(recipe, tuple(overrides or ()), model_path)
    folder = sources.model_folder(loaded, download=False)
    layout = plan.check(loaded, folder)
    predicted = plan.predict_bytes(loaded, layout)
    needed, free = plan.disk_bytes(loaded, layout, runs)
    machine = predict.speeds(runs)
    seconds = predict.seconds(loaded, layout, machine, tasks.count_examples(loaded))
    memory, room = predict.memory(loaded, layout), predict.free_memory()
    document: dict[str, Any] = {
        "passes": [
            {
                "pass": step.name,
                "key": step.key[:16],
                "cached": step.artifact is not None,
                "predicted_bytes": predicted[step.name],
                "predicted_seconds": seconds[step.name],
                "predicted_memory_bytes": int(memory[step.name]),
            }
            for step in pipeline.plan_passes(loaded, folder, Store(runs / loaded.name))
        ],
        "group_size_fallback": plan.fallbacks(loaded, layout),
        "disk": {"needed_bytes": needed, "free_bytes": free},
        "memory": {"needed_bytes": int(max(memory.values())), "free_bytes": room},
        "machine": asdict(machine),
    }
    if json_only:
        print(json.dumps(document))
        return
    source = folder or f"{loaded.model.hub} (not on this machine)"
    print(f"{loaded.name}: {source}, {layout.weights + layout.others:,} weights")
    for entry in document["passes"]:
        state = "cached" if entry["cached"] else "to run"
        print(
            f"  {entry['pass']:16} {state} {entry['predicted_bytes'] / 2**20:10.1f} MiB on disk"
            f"{entry['predicted_memory_bytes'] / 2**30:8.1f} GiB of memory"
            f"  {_time(entry['predicted_seconds'])}"
        )
    for name in ("disk", "memory"):
        needed, free = document[name].values()
        short = "" if free >= needed else ": too little, a run will be refused here"
        print(f"  {name} {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free{short}")
    print(f"  times for {machine.flops / 1e9:.0f} GFLOP/s, {machine.disk / 1e6:.0f} MB/s of disk")
    for name, size in document["group_size_fallback"].items():
        asked = loaded.quantize.group_size
        print(f"  {name}: group_size {asked} does not divide its inputs; {size} is used")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "time depends on data that is not here"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


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
    from sqft_export import pipeline
    from sqft_export.recipe import load

    settings = [f"export.targets=[{only}]"] if only else []
    loaded = load(recipe, (*(overrides or ()), *settings), model_path)
    last = tuple(f"export-{target}" for target in loaded.export.targets)
    if not last:
        raise UserError(f"{loaded.file}: export.targets: is empty; name one with --only")
    artifacts = pipeline.run(loaded, runs / loaded.name, last)
    for name in last:
        print(artifacts[name].path / "model")


@app.command("list")
def list_command(
    what: Annotated[Literal["targets"], typer.Argument(help="targets: runtimes and devices")],
    json_only: Json = False,
) -> None:
    """Show which runtimes and devices this machine has, and why it lacks the others."""
    from sqft_export.targets.devices import places

    found = places()
    if json_only:
        print(json.dumps([asdict(place) for place in found]))
        return
    for place in found:
        print(f"{place.device:4} {place.runtime:9} {place.name:22} {place.missing or 'here'}")


@app.command("benchmark")
def benchmark_command(
    folders: Annotated[list[Path], typer.Argument(help="deployments, compared with the first")],
    prompt_tokens: Annotated[str, typer.Option(help="lengths of prompts")] = "32,128,512,2048",
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    batch: Annotated[str, typer.Option(help="batch sizes for tokens per second")] = "1,4,16",
    rounds: Annotated[int, typer.Option(min=1, help="processes per folder")] = 5,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    cpus: Annotated[str | None, typer.Option(help="stay on these processors, as 0,1")] = None,
    place: Annotated[
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
    from sqft_export import device

    settings = device.Settings(
        prompt_tokens=_numbers(prompt_tokens, "--prompt-tokens"),
        new_tokens=new_tokens,
        batches=_numbers(batch, "--batch"),
        rounds=rounds,
        threads=threads,
        cpus=_numbers(cpus, "--cpus") if cpus else None,
        device=place,
    )
    questions = device.questions_of(folders[0], task, data, text, items)
    document = device.benchmark(folders, settings, questions)
    if out:
        device.write(document, out)
    print(json.dumps(document) if json_only else device.table(document))


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
    from sqft_export import inspection

    found = inspection.inspect(folder)
    print(json.dumps(found) if json_only else inspection.describe(found))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="runs (runs/tiny) or their reports")],
    out: Annotated[Path, typer.Option(help="folder for the page")] = Path("runs/comparison"),
) -> None:
    """Write one page over several runs."""
    from sqft_export import comparison

    comparison.compare(folders, out)
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
    from sqft_export import pipeline, plan, sources
    from sqft_export.recipe import load

    axes = []
    for setting in over:
        path, equals, values = setting.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--over {setting!r}: expected path=value,value")
        axes.append([f"{path}={value}" for value in values.split(",")])
    chosen = [(*(overrides or ()), *settings) for settings in itertools.product(*axes)]
    recipes = [load(recipe, settings, model_path) for settings in chosen]
    for one in recipes:  # all of them before the first runs
        plan.check(one, sources.model_folder(one, download=False))
    reports = []
    for one, settings in zip(recipes, chosen, strict=True):
        print(" ".join(settings), file=sys.stderr)
        reports.append(pipeline.run(one, runs / one.name)["report"].path)
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
    from sqft_export.sparse.folders import pack

    _say_packed(out, pack(folder, out, entropy))


@app.command("unpack")
def unpack_command(folder: Deployment, out: Out) -> None:
    """Write the plain folder of a packed one, byte for byte as it was."""
    from sqft_export.sparse.folders import unpack

    _say_packed(out, unpack(folder, out))


def _say_packed(out: Path, told: dict[str, Any]) -> None:
    dense, packed = told["dense_bytes"], told["packed_bytes"]
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
