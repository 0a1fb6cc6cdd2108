"""Warnings about a recipe; ``plan`` prints them, and ``run`` prints them before its first pass.

A finder takes recipe and layout. It yields a message per warning: field, value found, and what
helps.
"""

from collections.abc import Callable, Iterator

from sqft_export.plan.answers import (
    find_cut_answers,
    find_doubled_start,
    find_repeated_items,
    find_unjudgeable_answers,
)
from sqft_export.plan.chat import find_chat_doubts
from sqft_export.plan.context import find_context_excess
from sqft_export.plan.experts import find_computed_experts
from sqft_export.plan.exporters import find_caps, find_skipped_targets
from sqft_export.plan.layout import Layout
from sqft_export.plan.peers import find_left_out_peers
from sqft_export.plan.prompts import find_unused_template
from sqft_export.plan.readers import find_token_differences
from sqft_export.plan.unusual import find_calibration_doubts, find_training_doubts
from sqft_export.plan.wrapped import find_left_out
from sqft_export.recipe.schema import Recipe

WarningFinder = Callable[[Recipe, Layout], Iterator[str]]
FINDERS: tuple[WarningFinder, ...] = (
    find_left_out,
    find_computed_experts,
    find_skipped_targets,
    find_token_differences,
    find_caps,
    find_unjudgeable_answers,
    find_cut_answers,
    find_repeated_items,
    find_doubled_start,
    find_chat_doubts,
    find_context_excess,
    find_unused_template,
    find_training_doubts,
    find_calibration_doubts,
    find_left_out_peers,
)


def plan_warnings(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield every warning about a recipe that :func:`check_recipe` accepts, in FINDERS order."""
    for find in FINDERS:
        yield from find(recipe, layout)
