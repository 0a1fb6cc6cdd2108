"""The prompt section of a model card: the exact format, the end of answers, an example."""

import json
from itertools import islice
from typing import TYPE_CHECKING

from sqft_export.data.conversations import read_conversations
from sqft_export.data.datasets import TEMPLATES
from sqft_export.data.items import deployed_text, last_user_text, train_records
from sqft_export.data.stops import stop_texts
from sqft_export.recipe.schema import Chat, Problems, Text
from sqft_export.recipe.sections import TaskSections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_PROMPT = "Once upon a time"  # for models of plain text


def example_prompt(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the first training prompt as a user types it; for plain text, ``TEXT_PROMPT``.

    :param tokenizer: of the base; a start token that it adds by itself is not part of a prompt.
    """
    if isinstance(recipe.task, Text):
        return TEXT_PROMPT
    if isinstance(recipe.task, Chat):
        return last_user_text(read_conversations(recipe, recipe.task, "train")[0])
    return deployed_text(tokenizer, next(islice(train_records(recipe), 1)).prompt)


def prompt_section(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the section of a model card on prompts, in Markdown.

    :param tokenizer: of the base; a start token that it adds by itself is not part of a prompt.
    """
    task = recipe.task
    if isinstance(task, Text):
        return (
            "\n## How to prompt it\n\nThe model was trained to continue plain text, without a "
            "template.\n"
        )
    if isinstance(task, Chat):
        return _chat_section(task)
    example = next(islice(train_records(recipe), 1))
    template = task.prompt if isinstance(task, Problems) else TEMPLATES[task.template]
    prompt = deployed_text(tokenizer, example.prompt)
    if prompt != example.prompt:
        template = template.removeprefix(tokenizer.bos_token)
    stops = list(stop_texts(task))
    lines = [
        *("", "## How to prompt it", ""),
        "The prompt is plain text in exactly this format, without a chat template. The tokenizer",
        *("adds a start token where it has one.", ""),
        *("| | |", "| --- | --- |"),
        f"| prompt | {_cell(template)} |",
        f"| an answer ends at | {', '.join(['the end token', *map(_cell, stops)])} |",
        f"| a prompt | {_cell(prompt)} |",
        f"| its answer | {_cell(example.answer)} |",
    ]
    return "\n".join(lines) + "\n"


def _chat_section(task: Chat) -> str:
    arguments = json.dumps(task.template_arguments, ensure_ascii=False)
    lines = [
        *("", "## How to prompt it", ""),
        "The model answers messages (`role` and `content`) in the format of its chat template. The",
        "template is part of this folder.",
        *("", "| | |", "| --- | --- |"),
        f"| template arguments in training | `{arguments}` |".replace("{}", "none"),
        f"| an answer ends at | {', '.join(['the end token', *map(_cell, task.stop)])} |",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return a text as a JSON string for a table cell, which shows line ends and spaces."""
    return f"`{json.dumps(text, ensure_ascii=False)}`".replace("|", "\\|")
