"""A model's chat template: its choice, its arguments, and its renderings."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqft_export.data.marks import Message
from sqft_export.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Arguments of apply_chat_template that are set here.
RESERVED_ARGUMENTS = {
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
TEMPLATE_FUNCTIONS = {"raise_exception", "strftime_now"}


class TemplateFault(Exception):
    """The chat template refuses a conversation, in its own words."""


@dataclass
class ChatTemplate:
    """A tokenizer's chat template with its arguments.

    name: name of one of the tokenizer's templates, or a template's text; None: its default.
    arguments: variables that the template reads, such as ``enable_thinking``.
    place: file and field that name template and arguments, for messages to the user.
    """

    tokenizer: "PreTrainedTokenizerBase"
    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    place: str = "the chat template"

    def __post_init__(self) -> None:
        self._check_arguments(self._texts)

    @property
    def writes_date(self) -> bool:
        """Return whether the template writes today's date, so that ids differ from day to day."""
        return any("strftime_now" in text for text in self._texts)

    @cached_property
    def _texts(self) -> list[str]:
        """Return the templates that may be used: one, or one with tools and one without."""
        named = self.tokenizer.chat_template
        if self.name is not None and not re.search(r"\{[{%]", self.name):
            known = list(named) if isinstance(named, dict) else []
            if self.name not in known:
                raise UserError(
                    f"{self.place}: found {self.name!r}; the tokenizer's templates are "
                    f"{', '.join(known) or 'not named'}"
                )
        if self.name is None and not named:
            raise UserError(
                f"{self.place}: the tokenizer has no chat template; set task.template, or use an "
                "instruction-tuned model"
            )
        return list(dict.fromkeys([self._text(None), self._text([])]))

    def _text(self, tools: list | None) -> str:
        try:
            return self.tokenizer.get_chat_template(self.name, tools)
        except ValueError as error:
            names = ", ".join(self.tokenizer.chat_template or ())
            raise UserError(
                f"{self.place}: the tokenizer has several templates and none is called default; "
                f"set task.template to one of {names}"
            ) from error

    def _check_arguments(self, texts: list[str]) -> None:
        """Check that the templates read every argument of the recipe.

        :raises UserError: naming the argument that no template reads.
        """
        known = set().union(*(_variables(text, self.place) for text in texts))
        for name in self.arguments:
            if name not in known:
                raise UserError(
                    f"{self.place}: template argument {name!r} is unknown; the template reads "
                    f"{', '.join(sorted(known)) or 'no variables'}"
                )

    def render(self, messages: list[Message], tools: list | None) -> tuple[list[Message], str]:
        """Return messages and their text; refused arguments of tools become JSON text."""
        try:
            return messages, self.apply(messages, tools, False, tokenize=False)
        except TemplateFault as error:
            changed = [_with_json_arguments(message) for message in messages]
            if changed == messages or not isinstance(error.__cause__, TypeError):
                raise
        return changed, self.apply(changed, tools, False, tokenize=False)

    def tokens(
        self, messages: list[Message], tools: list | None
    ) -> tuple[list[int], list[tuple[int, int]], list[bool] | None]:
        """Return ids, the characters of each in the text, and the mask by generation markers.

        The mask is None if the template has no markers.
        """
        marked = bool(GENERATION_MARKER.search(self._text(tools)))
        found = self.apply(
            messages,
            tools,
            False,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marked,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        mask = [bool(one) for one in found["assistant_masks"]] if marked else None
        return found["input_ids"], found["offset_mapping"], mask

    def ids(self, messages: list[Message], tools: list | None) -> list[int]:
        """Return ids with the generation prompt."""
        return self.apply(messages, tools, True, tokenize=True, return_dict=False)

    def attempt(self, messages: list[Message], tools: list | None, prompt: bool) -> str | None:
        """Return the rendered text; None if the template refuses the messages."""
        try:
            return self.apply(messages, tools, prompt, tokenize=False)
        except TemplateFault:
            return None

    def apply(self, messages: list, tools: list | None, prompt: bool, **options: Any) -> Any:
        """Render messages with the chat template, as text or as token ids.

        :param prompt: add the generation prompt.
        :raises TemplateFault: with the message of the template.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.name,
                add_generation_prompt=prompt,
                **self.arguments,
                **options,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateFault(one_line(error)) from error


def _variables(template: str, place: str) -> set[str]:
    """Return the variables that a template reads, without those that are always set.

    :raises UserError: if it is not Jinja.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(GENERATION_MARKER.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(f"{place}: not a Jinja template: line {error.lineno}: {error}") from error
    found = meta.find_undeclared_variables(parsed)
    given = RESERVED_ARGUMENTS | TEMPLATE_FUNCTIONS | environment.globals.keys()
    return {name for name in found - given if not name.endswith("_token")}


def _with_json_arguments(message: Message) -> Message:
    """Return a copy whose tool calls have their arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), dict):
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls} if calls else message
