"""Multimodal base models: the parts that are left out, and the bytes of the written text model."""

from collections.abc import Iterator

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.wrappers import wrapper_note
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe


def find_left_out(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield which parts of a multimodal base model are left out."""
    if layout.folder is not None and (note := wrapper_note(Checkpoint(layout.folder))):
        yield note


def text_model_bytes(layout: Layout) -> int:
    """Return the bytes of the text model that a run writes for a multimodal base; else 0."""
    if layout.folder is None or Checkpoint(layout.folder).wrapper_config is None:
        return 0
    return sum(header.bytes for header in Checkpoint(layout.folder).headers.values())
