"""Rows of chat data, recognised by their columns, as conversations.

    layout           required columns
    messages         messages: [{role, content}, ...]
    conversations    conversations: [{from, value}, ...] (ShareGPT)
    completion       prompt, completion: text, or lists of messages
    instruction      instruction, output (Alpaca); input is optional
    answer           prompt, answer: text, or lists of messages

``system`` and ``tools`` are optional in every layout. The lists in ``messages``, ``conversations``
and ``tools`` may also be JSON text, as CSV has them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from sqft_export.data.chat import Conversation
from sqft_export.data.files import Fields
from sqft_export.data.marks import Message
from sqft_export.errors import UserError

DataLayout = Literal["messages", "conversations", "completion", "instruction", "answer"]
# In the order in which they are looked for.
REQUIRED_COLUMNS: dict[DataLayout, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "answer": ("prompt", "answer"),
}
OPTIONAL_COLUMNS = ("input", "system", "tools")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def kind_of_rows(columns: Iterable[str], place: str, mapping: Mapping[str, str]) -> DataLayout:
    """Return the kind of rows that have these columns.

    mapping: our name of a column -> its name in the data.

    :raises UserError: with the columns found and the columns known.
    """
    found = list(columns)
    missing = [theirs for theirs in mapping.values() if theirs not in found]
    names = {ours for ours in _known_names() if mapping.get(ours, ours) in found}
    for kind, required in REQUIRED_COLUMNS.items():
        if not missing and names.issuperset(required):
            return kind
    known = "; ".join(" and ".join(required) for required in REQUIRED_COLUMNS.values())
    lacking = f" (task.columns names {', '.join(missing)})" if missing else ""
    raise UserError(
        f"{place}: found the columns {', '.join(found) or 'none'}{lacking}; chat data has {known}; "
        "name yours with task.columns, for example {prompt: question, completion: reply}"
    )


def conversation_of(
    row: Fields,
    place: str,
    kind: DataLayout | None = None,
    mapping: Mapping[str, str] | None = None,
) -> Conversation:
    """Return a row as a conversation with at least one answer.

    kind: layout of the row; None detects it from the columns.
    mapping: our name of a column -> its name in the data.

    :raises UserError: naming the place and, for a wrong value, its column.
    """
    mapping = mapping or {}
    row = {name: value for name, value in row.items() if value is not None}
    kind = kind or kind_of_rows(row, place, mapping)
    fields = {
        ours: row[theirs] for ours in _known_names() if (theirs := mapping.get(ours, ours)) in row
    }
    lacking = [mapping.get(name, name) for name in REQUIRED_COLUMNS[kind] if name not in fields]
    if lacking:
        raise UserError(
            f"{place}: {', '.join(lacking)} is missing or null; found the columns {', '.join(row)}"
        )
    given, answers = _parts(fields, kind, place)
    if not any(message["role"] == "assistant" for message in answers):
        raise UserError(f"{place}: has no message of the assistant; there is nothing to train on")
    return Conversation([*given, *answers], _tools(fields.get("tools"), place), len(given), place)


def drop_seen(
    conversations: Iterable[Conversation], seen: Iterable[Conversation]
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations into those that are not among ``seen`` and those that are."""
    known = {_identity(one) for one in seen}
    new: list[Conversation] = []
    old: list[Conversation] = []
    for one in conversations:
        (old if _identity(one) in known else new).append(one)
    return new, old


def _identity(conversation: Conversation) -> str:
    return json.dumps([conversation.messages, conversation.tools], sort_keys=True)


def _known_names() -> list[str]:
    required = (name for names in REQUIRED_COLUMNS.values() for name in names)
    return list(dict.fromkeys([*required, *OPTIONAL_COLUMNS]))


def _parts(fields: Fields, kind: DataLayout, place: str) -> tuple[list[Message], list[Message]]:
    """Return the messages of the prompt, which have no loss, and the remaining messages."""
    system = _system(fields.get("system"), place)
    if kind in ("messages", "conversations"):
        messages = _messages(fields[kind], place, kind)
        has_system = messages[0]["role"] == "system"
        return [], messages if has_system else [*system, *messages]
    if kind == "instruction":
        text = _text(fields["instruction"], place, "instruction")
        extra = _text(fields.get("input", ""), place, "input")
        prompt = f"{text}\n\n{extra}" if extra.strip() else text
        return [*system, _said("user", prompt)], [_answer(fields["output"], place, "output")]
    name = "completion" if kind == "completion" else "answer"
    given = _side(fields["prompt"], "user", place, "prompt")
    answers = _side(fields[name], "assistant", place, name)
    return [*system, *given], answers


def _side(value: Any, role: str, place: str, name: str) -> list[Message]:
    """Return a prompt or a completion: messages, or the text of one."""
    if isinstance(value, list):
        return _messages(value, place, name)
    return [_said(role, _text(value, place, name))]


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _answer(value: Any, place: str, name: str) -> Message:
    return _said("assistant", _text(value, place, name))


def _system(value: Any, place: str) -> list[Message]:
    text = _text(value if value is not None else "", place, "system")
    return [_said("system", text)] if text.strip() else []


def _text(value: Any, place: str, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{place}: {name}: found {_shown(value)}; a text is expected")


def _shown(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _messages(value: Any, place: str, name: str) -> list[Message]:
    listed = _from_json(value, place, name)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{place}: {name}: found {_shown(value)}; a list of messages is expected")
    return [_message(one, f"{place}: {name}[{n}]") for n, one in enumerate(listed)]


def _message(value: Any, place: str) -> Message:
    """Return a message with ``role`` and ``content``, without fields that are null."""
    if not isinstance(value, dict):
        raise UserError(
            f"{place}: found {_shown(value)}; an object with role and content is expected"
        )
    message = {key: part for key, part in value.items() if part is not None}
    role = message.pop("role", message.pop("from", None))
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{place}: role: found {role!r}; known are {', '.join(ROLES)}")
    if message.pop("weight", 1) != 1:
        raise UserError(
            f"{place}: weight: found {value['weight']}; all answers are trained on; put messages "
            "without loss into prompt and the others into completion"
        )
    content = message.pop("content", message.pop("value", None))
    if role == "function_call":
        return {"role": ROLES[role], "content": "", "tool_calls": _calls(content, place)}
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], place)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif content is None:
        content = ""
    return {"role": ROLES[role], "content": _content(content, place)} | message


def _content(value: Any, place: str) -> str:
    """Return a message's text; a list of text blocks is joined."""
    if not isinstance(value, list):
        return _text(value, place, "content")
    for block in value:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, dict) else _shown(block)
            raise UserError(f"{place}: content: found a block of {kind}; only text is supported")
    return "".join(block["text"] for block in value)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return tool calls as the templates expect them: functions, with arguments as an object."""
    value = _from_json(value, place, "tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place}: tool_calls: a list of {{name, arguments}} is expected")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments or "{}", place, "arguments")
        inner = {"name": function["name"], "arguments": arguments}
        outer = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **outer, "function": inner})
    return calls


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Return schemas of functions, each as ``{type: function, function: ...}``."""
    if value is None or value == "":
        return None
    listed = _from_json(value, place, "tools")
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise UserError(
            f"{place}: tools: found {_shown(listed)}; a list of JSON schemas is expected"
        )
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in listed]
    return wrapped or None


def _from_json(value: Any, place: str, name: str) -> Any:
    """Return the value; a text is parsed as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {name}: not JSON: {error}") from error
