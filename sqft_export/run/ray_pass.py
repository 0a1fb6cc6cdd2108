"""One pass as a task of Ray. Its process imports torch only after its threads are set."""

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PassRequest:
    """A pass of a recipe.

    label: name of the task, for the log in the run's folder.
    runs: folder of all runs, or its URL; every machine reaches it.
    """

    recipe: Path
    settings: tuple[str, ...]
    model_path: Path | None
    name: str
    label: str
    runs: str
    threads: int


@dataclass(frozen=True)
class PassOutcome:
    """The result of a pass.

    seconds: of the pass itself. error, code: message and exit code of a failure. skipped: a pass
    before it failed.
    """

    node: str
    seconds: float = 0.0
    error: str = ""
    code: int = 0
    skipped: bool = False


def run_pass(request: PassRequest, *parents: PassOutcome) -> PassOutcome:
    """Run a pass whose parents are finished.

    A process that dies runs again elsewhere, where the pass resumes.
    """
    node = platform.node()
    if any(parent.code for parent in parents):
        return PassOutcome(node, code=1, skipped=True)
    from sqft_export.artifacts.remote import runs_folder
    from sqft_export.errors import UserError
    from sqft_export.machine.processors import set_threads

    try:
        set_threads(request.threads)
        from sqft_export.recipe.load import load_recipe
        from sqft_export.run.pipeline import run_recipe

        recipe = load_recipe(request.recipe, request.settings, request.model_path)
        root = runs_folder(request.runs) / recipe.name
        made = run_recipe(recipe, root, (request.name,), worker=request.label)[request.name]
        return PassOutcome(node, made.manifest["seconds"])
    except UserError as error:
        return PassOutcome(node, error=str(error), code=error.code)
