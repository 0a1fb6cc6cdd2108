"""Find the assistant's turns in a conversation that a chat template has rendered.

A template without generation markers does not mark the text that the model writes. This module
compares renderings of the same conversation:

    start   The model writes the text after the generation prompt. That prompt is taken from a
            rendering of the messages before the turn. If the full text does not begin with that
            rendering (Qwen3 drops the reasoning of earlier turns, Mistral moves the system prompt),
            both are compared from the end of the previous message on.
    end     The conversation is rendered once so that it ends after the turn, and once so that it
            goes on. The text that both have after the assistant's last word is the end of the turn.
            Whitespace after its last token is not part of it.

The place of a message in a text is found by a second rendering, with a mark added to the message.
Both have the same text after the message::

    <|im_start|>user\\nHello<|im_end|>\\n...
    <|im_start|>user\\nHello9172635481<|im_end|>\\n...
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from sqft_export.data.marks import (
    MESSAGE_MARK,
    Message,
    mark_shown_part,
    marked_ends,
    marked_starts,
)

Render = Callable[[list[Message]], str | None]

ANSWER_MARK = "3548172964"
# What looks like a control token, for tokenizers that have no such token.
CONTROL_TOKEN = r"<[^<>\s]{1,64}>|\[\|[^\[\]\s]{1,64}\|\]|\[/?[A-Z_]{2,32}\]"


class TurnError(Exception):
    """A turn can't be found in the rendered text."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn: ``text[start:end]``; closed: whether it ends with a control token."""

    start: int
    end: int
    closed: bool


class TurnFinder:
    """Finds the assistant's turns in the renderings of one chat template.

    render: messages, and whether the generation prompt is added, to text; None if refused.
    special: texts of the tokenizer's added tokens; none of them is split.
    stops: those that end an answer.
    """

    def __init__(
        self,
        render: Callable[[list[Message], bool], str | None],
        special: Iterable[str],
        stops: Iterable[str] = (),
    ):
        self.render, self.stops = render, frozenset(stops)
        self.special = tuple(filter(str.strip, special))
        self.pieces = _piece_pattern(self.special)

    def turns(self, messages: list[Message], text: str) -> list[Turn]:
        """Return every assistant's turn in ``text``, the rendering of ``messages``, in order.

        :raises TurnError: naming the message, if its place can't be found.
        """
        found: list[Turn] = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(messages, at, text)
            turn = Turn(start, *self._end(messages, at, text))
            if not (found[-1].end if found else 0) <= turn.start <= turn.end:
                raise TurnError(
                    f"message {at + 1}: its text overlaps with that of the answer before it"
                )
            found.append(turn)
        return found

    def is_hidden(self, messages: list[Message], at: int) -> bool:
        """Return whether the template leaves out a message's tool calls, or its text if none."""
        other = self._plain([*messages[:at], mark_shown_part(messages[at]), *messages[at + 1 :]])
        return other is not None and MESSAGE_MARK not in other

    def _plain(self, messages: list[Message]) -> str | None:
        return self.render(messages, False)

    def _cue(self, before: list[Message]) -> str | None:
        """Return the text up to the first word of an answer to ``before``.

        It ends with the generation prompt or, if the template has none, with the header of an
        answer. Mistral's has neither; the space before an answer is the model's.
        """
        prompt = self.render(before, True)
        if prompt is not None and prompt != self._plain(before):
            return prompt
        answered = self._plain([*before, _new_message("assistant", ANSWER_MARK, before)])
        if answered is None or ANSWER_MARK not in answered:
            return None
        return answered.partition(ANSWER_MARK)[0].rstrip(" ")

    def _start(self, messages: list[Message], at: int, text: str) -> int:
        before = messages[:at]
        cue = self._cue(before)
        if cue is None:
            raise TurnError(f"message {at + 1}: the template renders no answer at this place")
        if text.startswith(cue):
            return len(cue)
        gap, header = text, cue
        for previous in reversed(range(at)):
            found = self._after(messages, before, previous, text, cue)
            if found is not None:
                gap, header = found
                break
        place, shared = len(text) - len(gap), self._shared(gap, header)
        first_word = self._first_word(messages, at, text)
        if shared < len(header) and first_word is not None:
            shared = min(shared, first_word - place)
        return place + shared

    def _after(
        self, messages: list[Message], before: list[Message], at: int, text: str, cue: str
    ) -> tuple[str, str] | None:
        """Return the rest of text and cue after message ``at``; None if it is left out."""
        seen = False
        for marked in marked_ends(messages[at]):
            gap = _following(self._plain, messages, at, marked, text)
            header = _following(self._cue, before, at, marked, cue)
            if gap and gap.text is not None and header and header.text is not None:
                return gap.text, header.text
            seen = seen or gap is not None
        if seen:
            raise TurnError(f"message {at + 1}: its place in the rendered text is ambiguous")
        return None

    def _first_word(self, messages: list[Message], at: int, text: str) -> int | None:
        """Return the place of a message's first word; None if it has none."""
        places = []
        for marked in marked_starts(messages[at]):
            other = self._plain([*messages[:at], marked, *messages[at + 1 :]])
            if other is None or other.count(MESSAGE_MARK) != 1:
                continue
            head = other.partition(MESSAGE_MARK)[0]
            if text.startswith(head):
                places.append(len(head))
        return min(places, default=None)

    def _end(self, messages: list[Message], at: int, text: str) -> tuple[int, bool]:
        """Return where a turn ends, and whether a control token ends it."""
        last = at == len(messages) - 1
        others = [*messages, _new_message("user", "?", messages)] if last else messages[: at + 1]
        other = self._plain(others)
        if other is not None:
            short, long = (text, other) if last else (other, text)
            whole = short.rstrip()
            if long.startswith(short) and whole.endswith(self.special):
                return len(whole), True
        for marked in marked_ends(messages[at]):
            here = _following(self._plain, messages, at, marked, text)
            if here is None or here.text is None:
                continue
            there = None if other is None else _following(self._plain, others, at, marked, other)
            length, closed = self._closing(here.text, there.text if there else None, last)
            return len(text) - len(here.text) + length, closed
        raise TurnError(f"message {at + 1}: its last word can't be found in the rendered text")

    def _closing(self, rest: str, other: str | None, last: bool) -> tuple[int, bool]:
        """Return length of the turn's part of ``rest``, and whether a control token ends it.

        rest: the text after the turn's last word. other: the same of another rendering.

        Their common part holds the end-of-turn token, with two exceptions. Some templates end the
        last turn by another token than earlier ones (gpt-oss: ``<|return|>``, ``<|end|>``). Some
        do not end the last turn.
        """
        if other is None:
            length = len(rest.rstrip()) if last else 0
            return length, bool(length)
        shared = len(rest[: self._shared(rest, other)].rstrip())
        if any(map(self._is_control, self.pieces.findall(rest[:shared]))):
            return shared, True
        tail, other_tail = rest[shared:].lstrip(), other[shared:].lstrip()
        piece, other_piece = (self.pieces.match(part) for part in (tail, other_tail))
        if piece is None or not self._is_control(piece[0]):
            return shared, False
        replaced = other_piece is not None and self._is_control(other_piece[0])
        ends = last or replaced or piece[0] in self.stops
        if not ends and (other_tail or self._opens(piece[0])):
            return shared, False
        return len(rest) - len(tail) + len(piece[0]), True

    def _is_control(self, piece: str) -> bool:
        return len(piece) > 1 or piece in self.special

    def _opens(self, piece: str) -> bool:
        """Return whether a control token is in a conversation without answers."""
        return piece in (self._plain([{"role": "user", "content": "?"}]) or "")

    def _shared(self, text: str, other: str) -> int:
        """Return length of the longest common beginning that splits no control token of either."""
        pairs = enumerate(zip(text, other, strict=False))
        length = next((n for n, (a, b) in pairs if a != b), min(len(text), len(other)))
        return min(self._boundary(text, length), self._boundary(other, length))

    def _boundary(self, text: str, length: int) -> int:
        """Return the last end of a piece within the first ``length`` characters."""
        place = 0
        for piece in self.pieces.finditer(text):
            if piece.end() > length:
                break
            place = piece.end()
        return place


@cache
def _piece_pattern(special: tuple[str, ...]) -> re.Pattern:
    """Return a pattern that matches one control token, or else one character."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), CONTROL_TOKEN, "."]), re.DOTALL)


@dataclass(frozen=True)
class _Following:
    """The text after a message; None if the mark changed it, or is there twice."""

    text: str | None


def _following(
    render: Render, messages: list[Message], at: int, marked: Message, text: str
) -> _Following | None:
    """Return the rest of ``text`` after message ``at``; None if the rendering lacks the message."""
    other = render([*messages[:at], marked, *messages[at + 1 :]])
    if other is None or MESSAGE_MARK not in other:
        return None
    rest = other.partition(MESSAGE_MARK)[2]
    unchanged = MESSAGE_MARK not in rest and text.endswith(rest)
    return _Following(rest if unchanged else None)


def _new_message(role: str, text: str, like: list[Message]) -> Message:
    """Return a message whose content is a list of blocks if that of other messages is."""
    blocks = any(isinstance(message.get("content"), list) for message in like)
    return {"role": role, "content": [{"type": "text", "text": text}] if blocks else text}
