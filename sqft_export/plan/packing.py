"""Check that a model can be trained on packed rows."""

import functools
import json
from collections.abc import Iterator

from sqft_export.adapters.packing import separates_packed
from sqft_export.errors import one_line
from sqft_export.model.architecture import transformers_config
from sqft_export.model.miniature import make_miniature
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Chat, Recipe


def packing_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault if the model's blocks mix the conversations of a packed row."""
    task = recipe.task
    if not isinstance(task, Chat) or not task.packing or recipe.adapt is None:
        return
    if reason := _why_not_packed(json.dumps(layout.config), layout.family.attention):
        yield f"task.packing: found true, but {reason}; set false"


@functools.cache
def _why_not_packed(config: str, attention: str | None) -> str | None:
    """Return why a model can't be trained on packed rows; None if it can.

    A random miniature computes two sequences, packed and in separate rows.

    :param config: JSON of ``config.json``.
    """
    made = transformers_config(json.loads(config), "config.json")
    try:
        model = make_miniature(made, attention)
    except Exception as error:  # any error of transformers: the small sizes do not fit each other
        return f"no small {made.model_type} model can be made to check it ({one_line(error)})"
    if separates_packed(model, model.config.vocab_size):
        return None
    return f"{made.model_type} models mix the conversations of a packed row"
