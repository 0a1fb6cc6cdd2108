"""``sweep``: run a recipe with several values of its settings, and compare the runs."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sqft_export.artifacts.remote import url_of
from sqft_export.commands.machine import set_compute_threads
from sqft_export.commands.options import ModelPath, Overrides, RecipeFile, Runs, Threads
from sqft_export.errors import UserError

if TYPE_CHECKING:
    from sqft_export.recipe.schema import Recipe
    from sqft_export.run.combinations import Sweep

_Axes = Annotated[
    list[str],
    typer.Option(
        "--over",
        help="setting and its values, such as sparsify.sparsity=0.3,0.5; may be repeated",
    ),
]
_Shard = Annotated[
    str | None,
    typer.Option(
        help="run a part of the combinations, such as 3/8: every eighth from the third on; shards "
        "may run at the same time in one folder"
    ),
]
_List = Annotated[
    bool, typer.Option("--list", help="print a command per combination, and run nothing")
]
_Sampler = Annotated[
    Literal["tpe", "random"] | None,
    typer.Option(help="try combinations that Optuna chooses, in place of all; needs a goal"),
]
_Trials = Annotated[int, typer.Option(min=1, max=100_000, help="combinations that --search tries")]
_GOALS = ("accuracy", "size", "tpot", "memory", "perplexity")
_Minimize = Annotated[
    list[str] | None,
    typer.Option(
        help="goal of --search, measured at the recommended deployment: size (bytes on disk), tpot "
        "(time per output token), memory, perplexity; may be repeated"
    ),
]
_Maximize = Annotated[
    list[str] | None, typer.Option(help="goal of --search: accuracy; may be repeated")
]
_Ray = Annotated[
    bool,
    typer.Option(
        "--ray", help="run the passes side by side on Ray (extra ray), in a cluster on this machine"
    ),
]
_RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="with --ray: a running cluster, such as auto or ray://head:10001; its machines share "
        "the folder of --runs",
    ),
]


def sweep(
    recipe: RecipeFile,
    over: _Axes,
    overrides: Overrides = None,
    model_path: ModelPath = None,
    runs: Runs = Path("runs"),
    threads: Threads = None,
    shard: _Shard = None,
    list_only: _List = False,
    search: _Sampler = None,
    trials: _Trials = 30,
    minimize: _Minimize = None,
    maximize: _Maximize = None,
    ray: _Ray = False,
    ray_address: _RayAddress = None,
) -> None:
    """Run a recipe with every combination of values, then compare the runs.

    Passes that do not depend on the values run once.

    Example: sqft-export sweep recipes/tiny.yaml --over quantize.bits=4,8

    Example: sqft-export sweep recipes/tiny.yaml --over quantize.bits=3,4,8 --search tpe --trials 6
    --minimize size --maximize accuracy
    """
    from sqft_export.run.combinations import Sweep, parse_axes

    goals = {**dict.fromkeys(minimize or (), "minimize")}
    goals |= dict.fromkeys(maximize or (), "maximize")
    both = bool(set(minimize or ()) & set(maximize or ()))
    way = _Way(shard, list_only, search, trials, goals, ray or bool(ray_address), ray_address)
    way.check(both)
    chosen = Sweep(recipe, tuple(overrides or ()), parse_axes(over), model_path)
    _sweep(chosen, over, runs, threads, way)


@dataclass(frozen=True)
class _Way:
    """How the combinations are chosen and run; see the options of the command.

    goals: goal of the search -> minimize or maximize.
    """

    shard: str | None
    list_only: bool
    search: str | None
    trials: int
    goals: dict[str, str]
    ray: bool
    ray_address: str | None

    def check(self, both: bool) -> None:
        """Check that at most one way to run is chosen, and that goals go with a search.

        :param both: a goal is minimized and maximized.
        """
        ways = {"--shard": self.shard, "--list": self.list_only, "--search": self.search}
        ways |= {"--ray": self.ray}
        if len(given := [name for name, value in ways.items() if value]) > 1:
            raise UserError(f"{' and '.join(given)}: found together; each needs a separate sweep")
        if unknown := [goal for goal in self.goals if goal not in _GOALS]:
            raise UserError(
                f"--minimize, --maximize: found {', '.join(unknown)}; allowed are "
                f"{', '.join(_GOALS)}"
            )
        if self.search and not self.goals:
            raise UserError(
                "--search: found no goal; add one, such as --minimize size --maximize accuracy"
            )
        if self.goals and not self.search:
            found = ", ".join(self.goals)
            raise UserError(f"--minimize, --maximize: found {found} without --search tpe")
        if both:
            raise UserError("--minimize, --maximize: found the same goal in both")
        if self.ray:
            _require_ray()


def _sweep(sweep: "Sweep", over: list[str], runs: Path, threads: int | None, way: _Way) -> None:
    """Check all combinations, then run them in the chosen way."""
    from sqft_export.run.combinations import shard_of

    recipes = [sweep.load(settings) for settings in sweep.combinations]
    if way.shard:
        shard_of(recipes, way.shard)  # refuses a wrong one
    if way.list_only:
        _print_commands(sweep, over, runs, threads)
        return
    set_compute_threads(threads, runs / recipes[0].name)
    from sqft_export.run.sweeps import check_combinations

    check_combinations(recipes)
    if way.search:
        _search(sweep, recipes, runs, way)
    elif way.ray:
        _run_on_ray(sweep, recipes, runs, threads, way.ray_address)
    else:
        _run_in_sequence(sweep, recipes, runs, way.shard)


def _require_ray() -> None:
    from sqft_export.machine.host import installed

    if not installed("ray"):
        raise UserError("--ray: Ray is not installed; pip install 'sqft-export[ray]'")


def _print_commands(sweep: "Sweep", over: list[str], runs: Path, threads: int | None) -> None:
    """Print one command per combination; they may run at the same time."""
    count = len(sweep.combinations)
    options = [option for axis in over for option in ("--over", axis)]
    options += ["--model-path", str(sweep.model_path)] if sweep.model_path else []
    options += [
        "--runs",
        url_of(runs) or str(runs),
        *(["--threads", str(threads)] if threads else []),
    ]
    for number in range(1, count + 1):
        words = ("sqft-export", "sweep", str(sweep.recipe), *sweep.overrides, *options)
        print(shlex.join((*words, "--shard", f"{number}/{count}")))


def _run_in_sequence(
    sweep: "Sweep", recipes: "list[Recipe]", runs: Path, shard: str | None
) -> None:
    """Run all combinations, or those of a shard, one after the other."""
    from sqft_export.machine.host import writing_to
    from sqft_export.run.combinations import shard_of
    from sqft_export.run.pipeline import run_recipe

    pairs = list(zip(recipes, sweep.combinations, strict=True))
    worker = f"shard-{shard.replace('/', '-of-')}" if shard else ""
    for recipe, settings in shard_of(pairs, shard) if shard else pairs:
        print(" ".join(settings), file=sys.stderr)
        with writing_to(runs):
            run_recipe(recipe, runs / recipe.name, redirect=True, worker=worker)
    _compare_finished(recipes, runs)


def _compare_finished(recipes: "list[Recipe]", runs: Path) -> None:
    """Compare all combinations; print how many are missing if shards have not finished."""
    from sqft_export.run.sweeps import sealed_report

    found = [sealed_report(recipe, runs / recipe.name) for recipe in recipes]
    reports = [report for report in found if report]
    if len(reports) < len(recipes):
        print(
            f"{len(reports)} of {len(recipes)} combinations are finished; the shard that finishes "
            "last compares them"
        )
    elif len(reports) == 1:
        page = reports[0] / "index.html"
        print(f"found one combination, so there is no comparison; report: {page}")
    else:
        write_comparison(reports, runs / recipes[0].name / "sweep")


def _run_on_ray(
    sweep: "Sweep",
    recipes: "list[Recipe]",
    runs: Path,
    threads: int | None,
    address: str | None,
) -> None:
    from sqft_export.machine.host import writing_to
    from sqft_export.run.ray_sweep import run_passes

    with writing_to(runs):
        run_passes(sweep, runs.absolute(), threads, address)
    _compare_finished(recipes, runs)


def _search(sweep: "Sweep", recipes: "list[Recipe]", runs: Path, way: _Way) -> None:
    """Try combinations that Optuna chooses; print the best ones and compare all that were tried."""
    from sqft_export.machine.host import writing_to
    from sqft_export.run.trials import run_trials

    folder = runs / recipes[0].name / "sweep"
    with writing_to(runs):
        found = run_trials(sweep, runs, folder, way.search or "", way.trials, way.goals)
    for line in found.lines:
        print(line)
    if len(found.reports) > 1:
        write_comparison(found.reports, folder)


def write_comparison(folders: list[Path], out: Path) -> None:
    """Write the comparison of runs or reports, and print its table."""
    from sqft_export.machine.host import writing_to
    from sqft_export.report.runs import compare_runs

    with writing_to(out):
        compare_runs(folders, out)
    print((out / "comparison.md").read_text())
    print(f"comparison: {out / 'index.html'}")


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command("sweep")(sweep)
