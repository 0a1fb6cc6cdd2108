"""Conversations as token ids and a loss mask, by the model's own chat template.

The ids are those of transformers' ``apply_chat_template``, which runs the template in a sandbox.
The mask covers the assistant's turns. A template with ``{% generation %}`` markers says where they
are; for other templates ``turns.py`` finds them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sqft_export.data.chat_template import ChatTemplate, TemplateFault
from sqft_export.data.marks import Message
from sqft_export.data.turns import TurnError, TurnFinder
from sqft_export.errors import UserError


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``, and the tools that their assistant has.

    tools: JSON schemas of the functions that the assistant may call.
    prompt: how many of the first messages are given; no loss is on their answers.
    place: file and row, for messages to the user.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    prompt: int = 0
    place: str = "the conversation"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids.

    loss: for each token, whether it is trained on.
    text: the rendered conversation.
    offsets: first and last + 1 character of each token in ``text``.
    open_turns: answers that the template ends without a token that the model could stop with.
    hides_system: whether the template leaves out a system message.
    dropped: messages left out at the start because of the length limit.
    cut: tokens left out at the end because of the length limit.
    """

    ids: list[int]
    loss: list[bool]
    text: str
    offsets: list[tuple[int, int]]
    open_turns: int = 0
    hides_system: bool = False
    dropped: int = 0
    cut: int = 0

    @property
    def last_answer(self) -> tuple[int, int]:
        """Return first and last + 1 token of the last turn in the loss; both 0 without one."""
        end = len(self.loss)
        while end and not self.loss[end - 1]:
            end -= 1
        start = end
        while start and self.loss[start - 1]:
            start -= 1
        return start, end


@dataclass
class ChatEncoder:
    """Encodes conversations by a chat template.

    stops: token ids that end an answer, besides the tokenizer's end token.
    """

    template: ChatTemplate
    stops: Iterable[int] = ()

    def __post_init__(self) -> None:
        if not self.template.tokenizer.is_fast:
            raise UserError(
                f"{self.template.place}: the tokenizer has no tokenizer.json; chat data needs one"
            )

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Return ids and mask of a whole conversation.

        :raises UserError: if the template refuses it, or its answers can't be found in the text.
        """
        try:
            return self._encode(conversation)
        except TemplateFault as error:
            raise UserError(
                f"{conversation.place}: the model's chat template refuses the conversation: "
                f"{error}; change the data, or set task.template"
            ) from error
        except TurnError as error:
            raise UserError(
                f"{conversation.place}: {error}; change the data, or set task.template to a "
                "template that has it, with {% generation %} markers"
            ) from error

    def encode_within(self, conversation: Conversation, limit: int) -> EncodedChat:
        """Return ids and mask of at most ``limit`` tokens.

        Exchanges (a user's message and all up to the next one) are left out from the start; system
        messages stay. If the last exchange is too long by itself, its end is cut. The result may
        then have no token in the loss.
        """
        shorter = conversation
        for shorter in _shortened(conversation):
            found = self.encode(shorter)
            if len(found.ids) <= limit:
                break
        dropped = len(conversation.messages) - len(shorter.messages)
        return replace(
            found,
            ids=found.ids[:limit],
            loss=found.loss[:limit],
            offsets=found.offsets[:limit],
            dropped=dropped,
            cut=max(0, len(found.ids) - limit),
        )

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return ids before the last answer, with the generation prompt."""
        return self.prompt(conversation)[1]

    def prompt(self, conversation: Conversation) -> tuple[list[Message], list[int]]:
        """Return the messages before the last answer, and their ids with the generation prompt."""
        messages = conversation.messages
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        before = messages[: answers[-1] if answers else None]
        try:
            before, _ = self.template.render(before, conversation.tools)
            return before, self.template.ids(before, conversation.tools)
        except TemplateFault as error:
            raise UserError(
                f"{conversation.place}: the model's chat template refuses the prompt: {error}"
            ) from error

    def end_token(self) -> int | None:
        """Return the special token that ends an answer; None if the template writes none.

        It is read from the rendering of one question and its answer.
        """
        exchange: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "!"},
        ]
        if self.template.attempt(exchange, None, False) is None:
            return None
        encoded = self.encode(Conversation(exchange))
        end = encoded.last_answer[1]
        # Some markers leave the end-of-turn token out of the loss; it is the next token then.
        near = encoded.ids[end - 1 : end + 1] if end else []
        return next((token for token in near if token in self._special_ids), None)

    def trained_end(self, encoded: EncodedChat) -> int | None:
        """Return the special token at the end of the last answer in the loss; None without one."""
        end = encoded.last_answer[1]
        token = encoded.ids[end - 1] if end else None
        return token if token in self._special_ids else None

    def _encode(self, conversation: Conversation) -> EncodedChat:
        tools = conversation.tools
        messages, text = self.template.render(conversation.messages, tools)
        finder = self._finder(tools)
        hidden = self._hides_system(messages, finder)
        ids, offsets, marked = self.template.tokens(messages, tools)
        if marked is not None:
            first = self._given_tokens(messages, conversation, ids)
            loss = [n >= first and one for n, one in enumerate(marked)]
            return EncodedChat(ids, loss, text, offsets, hides_system=hidden)
        turns = finder.turns(messages, text)
        given = sum(message["role"] == "assistant" for message in messages[: conversation.prompt])
        turns = turns[given:]
        inside = bytearray(len(text))
        for turn in turns:
            inside[turn.start : turn.end] = b"\1" * (turn.end - turn.start)
        loss = [1 in inside[start:end] for start, end in offsets]
        open_turns = sum(not turn.closed for turn in turns)
        return EncodedChat(ids, loss, text, offsets, open_turns, hidden)

    def _hides_system(self, messages: list[Message], finder: TurnFinder) -> bool:
        """Return whether the template leaves out a system message.

        :raises TurnError: if it leaves out a tool call or its result.
        """
        hidden = False
        for at, message in enumerate(messages):
            calls, role = bool(message.get("tool_calls")), message["role"]
            if (calls or role in ("system", "tool")) and finder.is_hidden(messages, at):
                hidden = True
                if role != "system":
                    part = "tool calls" if calls else "result of a tool"
                    raise TurnError(f"message {at + 1}: the chat template leaves out its {part}")
        return hidden

    def _given_tokens(self, messages: list, conversation: Conversation, ids: list[int]) -> int:
        """Return how many ids the given messages and the generation prompt have."""
        if not conversation.prompt:
            return 0
        given = self.template.ids(messages[: conversation.prompt], conversation.tools)
        pairs = enumerate(zip(given, ids, strict=False))
        return next((n for n, (one, other) in pairs if one != other), min(len(given), len(ids)))

    def _finder(self, tools: list | None) -> TurnFinder:
        return TurnFinder(
            lambda messages, prompt: self.template.attempt(messages, tools, prompt),
            self._special,
            self._stop_tokens,
        )

    @cached_property
    def _special(self) -> list[str]:
        return list(self.template.tokenizer.get_added_vocab())

    @cached_property
    def _special_ids(self) -> set[int]:
        tokenizer = self.template.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        return {*tokenizer.all_special_ids, *(one for one, token in added if token.special)}

    @cached_property
    def _stop_tokens(self) -> list[str]:
        ends = {*self.stops, self.template.tokenizer.eos_token_id} - {None}
        return self.template.tokenizer.convert_ids_to_tokens(sorted(ends))


def _shortened(conversation: Conversation) -> Iterable[Conversation]:
    """Yield the conversation, then without its first exchange, and so on to its last one."""
    yield conversation
    messages = conversation.messages
    roles = [message["role"] for message in messages]
    first = next((n for n, role in enumerate(roles) if role != "system"), 0)
    last_answer = max((n for n, role in enumerate(roles) if role == "assistant"), default=0)
    for start in range(first + 1, last_answer):
        if roles[start] == "user" and roles[start - 1] != "user":
            yield replace(
                conversation,
                messages=messages[:first] + messages[start:],
                prompt=conversation.prompt - start + first if conversation.prompt > start else 0,
            )
