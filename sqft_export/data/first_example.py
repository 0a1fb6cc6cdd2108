"""The first training example of a chat task, as text for plans and reports."""

from typing import TYPE_CHECKING

from sqft_export.data.items import ChatExamples, Data
from sqft_export.data.loss_text import mark_loss
from sqft_export.recipe.schema import Chat
from sqft_export.recipe.sections import TaskSections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def first_example(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the first training example with its loss marked; None for tasks without messages.

    :param tokenizer: of the base model.
    """
    if not isinstance(recipe.task, Chat):
        return None
    examples = Data(recipe, tokenizer).train
    assert isinstance(examples, ChatExamples)
    return mark_loss(examples.encoded(0))
