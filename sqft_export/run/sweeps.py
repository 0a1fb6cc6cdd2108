"""The passes that the combinations of a sweep share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqft_export.artifacts.store import open_store
from sqft_export.model.hub import model_folder
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.memory import FIXED_MEMORY, predict_memory
from sqft_export.plan.workload import workload_of
from sqft_export.recipe.passes import runs_on_cpu
from sqft_export.recipe.schema import Recipe
from sqft_export.run.combinations import Sweep
from sqft_export.run.digests import pin_revisions
from sqft_export.run.pipeline import plan_passes, prepare_recipe

# Passes that time the deployments; other work on the machine would change their figures.
TIMED_PASSES = ("benchmark",)


@dataclass(frozen=True)
class PassTask:
    """A pass that one or more combinations need.

    key: of its artifact. parents: keys of the passes that it reads.
    settings: of the first combination that needs it. combinations: how many need it.
    memory: predicted peak in bytes. on_device: it uses the accelerator.
    sealed: its artifact exists.
    """

    name: str
    key: str
    parents: tuple[str, ...]
    settings: tuple[str, ...]
    combinations: int
    memory: int
    on_device: bool
    sealed: bool

    @property
    def label(self) -> str:
        return f"{self.name}-{self.key[:8]}"


def check_combinations(recipes: Sequence[Recipe]) -> None:
    """Check every recipe before the first one runs."""
    for recipe in recipes:
        check_recipe(recipe, model_folder(recipe, download=False))


def sealed_report(recipe: Recipe, root: Path) -> Path | None:
    """Return the folder of a combination's report; None if it is not finished."""
    store = open_store(root)
    recipe, folder, _ = prepare_recipe(recipe, root)
    recipe = pin_revisions(recipe, online=True)
    report = next(p for p in plan_passes(recipe, folder, store) if p.name == "report")
    return store.fetch(report.artifact).path if report.artifact else None


def pass_tasks(sweep: Sweep, runs: Path) -> dict[str, PassTask]:
    """Return key -> pass, for the unique passes of all combinations; parents come first."""
    tasks: dict[str, PassTask] = {}
    for settings in sweep.combinations:
        recipe = sweep.load(settings)
        recipe, folder, layout = prepare_recipe(recipe, runs / recipe.name)
        recipe = pin_revisions(recipe, online=True)
        memory = predict_memory(recipe, layout, workload_of(recipe, folder))
        for step in plan_passes(recipe, folder, open_store(runs / recipe.name)):
            known = tasks.get(step.key)
            tasks[step.key] = PassTask(
                name=step.name,
                key=step.key,
                parents=tuple(step.facts["parents"].values()),
                settings=known.settings if known else settings,
                combinations=known.combinations + 1 if known else 1,
                memory=int(memory.get(step.name, FIXED_MEMORY)),
                on_device=not runs_on_cpu(step.name, recipe),
                sealed=step.artifact is not None,
            )
    return tasks
