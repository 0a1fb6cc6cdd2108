"""Copy chat messages with a mark in them, to find their place in a rendered text."""

import re
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]

# Digits, so that a mark fits into text, names, JSON strings and whole numbers.
MESSAGE_MARK = "9172635481"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def mark_shown_part(message: Message) -> Message:
    """Return a copy with a mark in the name of its first tool call, else in its text."""
    calls = message.get("tool_calls")
    if not calls:
        return message | {"content": _append_mark(message.get("content") or "")}
    return message | {"tool_calls": [_change_call(calls[0], "name", _prepend_mark), *calls[1:]]}


def marked_ends(message: Message) -> Iterator[Message]:
    """Yield copies of a message with a mark after one of its last words."""
    calls = message.get("tool_calls") or []
    if calls:
        for key in ("arguments", "name"):
            changed = _change_call(calls[-1], key, _append_mark)
            if changed is not None:
                yield message | {"tool_calls": [*calls[:-1], changed]}
    for key in ("content", *REASONING_FIELDS):
        changed = _append_mark(message.get(key)) if message.get(key) or key == "content" else None
        if changed is not None:
            yield message | {key: changed}


def marked_starts(message: Message) -> Iterator[Message]:
    """Yield copies of a message with a mark before one of its first words."""
    for key in (*REASONING_FIELDS, "content"):
        changed = _prepend_mark(message.get(key)) if message.get(key) else None
        if changed is not None:
            yield message | {key: changed}
    calls = message.get("tool_calls") or []
    if calls:
        changed = _change_call(calls[0], "name", _prepend_mark)
        if changed is not None:
            yield message | {"tool_calls": [changed, *calls[1:]]}


def _change_call(call: Message, key: str, change: Callable[[Any], Any]) -> Message | None:
    """Return a tool call with a changed name or arguments; None if they can't be changed."""
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    changed = change(inner.get(key))
    if changed is None:
        return None
    inner = inner | {key: changed}
    return call | {"function": inner} if isinstance(function, dict) else inner


def _append_mark(value: Any) -> Any:
    """Return a copy with a mark after its last text or whole number; None if it has neither."""
    if isinstance(value, str):
        return _in_json(value) or value + MESSAGE_MARK
    if isinstance(value, int) and not isinstance(value, bool):
        return int(f"{value}{MESSAGE_MARK}")
    return _change_within(value, _append_mark, reversed)


def _prepend_mark(value: Any) -> Any:
    """Return a copy with a mark before its first text; None if it has no text."""
    if isinstance(value, str):
        return MESSAGE_MARK + value
    return _change_within(value, _prepend_mark, iter)


def _in_json(text: str) -> str | None:
    """Return a JSON object's text with a mark after its last word, None if it is no object."""
    found = re.fullmatch(r"(\s*\{.*\w)(\W*\}\s*)", text, re.DOTALL)
    return f"{found[1]}{MESSAGE_MARK}{found[2]}" if found else None


def _change_within(value: Any, change: Callable[[Any], Any], order: Callable) -> Any:
    """Return a copy of a list or an object with the first entry changed that ``change`` accepts."""
    if isinstance(value, dict):
        keys = [key for key in value if key != "type"]
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return None
    for key in order(keys):
        changed = change(value[key])
        if changed is not None:
            copy = value.copy()
            copy[key] = changed
            return copy
    return None
