"""Chat templates and end tokens of a model after training."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.data.items import chat_encoder
from sqft_export.model.chat import rename_template, write_task_templates
from sqft_export.model.endings import add_end_token, disable_end_token
from sqft_export.recipe.schema import Chat
from sqft_export.recipe.sections import TaskSections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def set_prompt_format(
    recipe: TaskSections, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Give a model's folder the chat templates and the end token that it was trained with.

    A model that was not trained on chats must not apply a template to its prompts.

    :param tokenizer: of the base.
    """
    task = recipe.task
    if isinstance(task, Chat):
        write_task_templates(folder, tokenizer, task.template)
        end = chat_encoder(recipe, tokenizer).end_token()
        if end is not None:
            add_end_token(folder, end)
    else:
        rename_template(folder)
    disable_end_token(folder)
