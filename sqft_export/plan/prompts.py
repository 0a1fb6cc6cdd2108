"""Whether prompts are those that the base model knows."""

from collections.abc import Iterator

from sqft_export.model.chat import has_template, uses_template
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe


def find_unused_template(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """A chat template of the base that the task's prompts are not made with."""
    if layout.folder is None or uses_template(recipe.task) or not has_template(layout.folder):
        return
    yield (
        "task: the base has a chat template, which the task's prompts are not made with; it is not "
        "deployed, so that runtimes give the model the prompts that it is trained and scored with"
    )
