"""Requests that score any deployment on a file of conversations, without a recipe.

The deployment's own chat template renders the messages. Perplexity is that of the last answer of
every conversation. The score compares the generated answer with it.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.artifacts.store import MANIFEST, read_artifact
from sqft_export.data.answers import SCORES
from sqft_export.data.conversations import all_conversations
from sqft_export.data.items import answer_stops, chat_items, load_tokenizer
from sqft_export.data.scoring import answer_score, questions
from sqft_export.errors import HostError, UserError, one_line
from sqft_export.machine.host import installed
from sqft_export.measure.deployments import Questions, questions_of
from sqft_export.model.chat import has_template
from sqft_export.recipe.load import read_yaml
from sqft_export.recipe.schema import Chat, Recipe
from sqft_export.targets.folder import context_of


@dataclass(frozen=True)
class ScoredData:
    """Data that deployments are scored on; nothing is scored without any.

    task: name of a dataset. data: its local folder; without a task: conversations.
    text: text file for perplexity. score: of the answers to conversations.
    template_arguments: variables that the chat template reads; None: those of the run that the
        deployment belongs to.
    """

    task: str | None = None
    data: Path | None = None
    text: Path | None = None
    score: str | None = None
    template_arguments: Mapping[str, object] | None = None


def parse_template_arguments(settings: Sequence[str]) -> dict[str, object] | None:
    """Return the values of ``name=value`` settings, read as YAML; None without settings.

    A date stays text, which templates write into the prompt.

    >>> parse_template_arguments(["enable_thinking=false"])
    {'enable_thinking': False}

    :raises UserError: naming the setting that has another form.
    """
    found: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(
                f"--template-argument: found {one_line(repr(setting))}; expected name=value, such "
                "as enable_thinking=false"
            )
        value = read_yaml(text, f"--template-argument {name}")
        found[name] = text if isinstance(value, datetime.date) else value
    return found or None


def stored_template_arguments(folder: Path) -> dict[str, object]:
    """Return the template arguments of the run that a deployment belongs to, or an empty mapping.

    :param folder: such as ``runs/tiny/export-onnx-<key>/model``.
    """
    artifact = folder.resolve().parent
    if not artifact.name.startswith("export-") or not (artifact / MANIFEST).is_file():
        return {}
    options = read_artifact(artifact).manifest["facts"].get("options")
    found = options.get("task.template_arguments") if isinstance(options, dict) else None
    return found if isinstance(found, dict) else {}


def questions_about(folder: Path, source: ScoredData, items: int) -> Questions | None:
    """Return the requests that score a deployment; None without data.

    :param items: largest number of items.
    :raises UserError: if the data does not fit the other settings.
    """
    if source.data is not None and source.task is None and source.text is None:
        score = source.score or "exact"
        return chat_questions(folder, source.data, items, score, source.template_arguments)
    for option, value in (
        ("--score", source.score),
        ("--template-argument", source.template_arguments),
    ):
        if value is not None:
            raise UserError(f"{option}: found without --data; it is for your own conversations")
    return questions_of(folder, source.task, source.data, source.text, items)


def chat_questions(
    folder: Path,
    data: Path,
    items: int,
    score: str = "exact",
    arguments: Mapping[str, object] | None = None,
) -> Questions:
    """Return the requests of the first conversations of a file.

    :param folder: deployment with a chat template.
    :param data: source of conversations; see ``data.tables``.
    :param items: largest number of conversations.
    :param score: a score of chat tasks, ``regex:<pattern>``, or a Python file.
    :param arguments: template arguments; None: those of the run that the folder belongs to.
    :raises UserError: if a setting or a row is invalid, the folder has no chat template, or no
        conversation fits into the context.
    """
    if not installed("transformers"):
        raise HostError("--data: conversations need transformers: pip install transformers")
    if not has_template(folder):
        raise UserError(f"{folder}: has no chat template; --data needs a deployment with one")
    chosen_arguments = stored_template_arguments(folder) if arguments is None else arguments
    section: Any = {"task": _task_of(data, score, chosen_arguments)}
    recipe = Recipe.model_construct(**section)
    answer_score(recipe)
    tokenizer = load_tokenizer(folder)
    found = chat_items(recipe, tokenizer, all_conversations(recipe, section["task"], "train"))
    context = context_of(folder)
    chosen = [item for item in found if context is None or len(item.ids) <= context][:items]
    if not chosen:
        raise UserError(f"{data}: no conversation fits into the context of {context} tokens")
    stop = answer_stops(recipe, folder, tokenizer)
    return Questions(recipe, chosen, tokenizer, questions(recipe, chosen, stop, tokenizer, context))


def _task_of(data: Path, score: str, arguments: Mapping[str, object]) -> Chat:
    """Return a chat task with these conversations, this score and these template arguments.

    :raises UserError: if there is no such score.
    """
    fields: dict[str, Any] = {"kind": "chat", "train": str(data.resolve()), "score": score}
    fields["template_arguments"] = dict(arguments)
    kind, colon, pattern = score.partition(":")
    if kind == "regex" and colon:
        fields |= {"score": "regex", "pattern": pattern}
    elif score.endswith(".py"):
        fields |= {"score": "file", "score_file": str(Path(score).resolve())}
    elif score not in SCORES:
        raise UserError(
            f"--score: found {score!r}; allowed are {', '.join(SCORES)}, regex:<pattern>, and a "
            "Python file"
        )
    return Chat(**fields)
