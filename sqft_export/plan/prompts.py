"""Check of the task's prompts against the base model's chat template."""

from collections.abc import Iterator

from sqft_export.model.chat import has_template, uses_template
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe


def find_unused_template(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if the base has a chat template but the task's prompts do not use it."""
    if layout.folder is None or uses_template(recipe.task) or not has_template(layout.folder):
        return
    yield (
        "task: the base has a chat template, but the task's prompts do not use it; deployments get "
        "no chat template, so runtimes use the prompts of training and scoring"
    )
