"""Write the Modelfile of a GGUF deployment, with which Ollama makes a model.

Ollama renders messages with a Go template. The pieces of one are read from renderings of the chat
template, with marks in place of the contents:

    start U0 <user> D                                    one question
    start U0 <user> D X <assistant> E U0 <user> D        a longer conversation
    S0 <system> S1 U0 <user> D                           with a system message

D ends with the beginning of an answer. The Go template is kept only if it gives the same text as
the chat template on other conversations.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.inference.templates import (
    read_chat_template,
    read_special_tokens,
    render_conversation,
)
from sqft_export.targets.folder import GRAPHS, context_of

MODELFILE = "Modelfile"
PLAIN_GO_TEMPLATE = "{{ .Prompt }}"
_Conversation = list[dict[str, str]]
_SYSTEM, _USER, _ANSWER, _NEXT = "<<system>>", "<<user>>", "<<answer>>", "<<next>>"


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_QUESTION = [_say("user", _USER)]
_LONGER = [*_QUESTION, _say("assistant", _ANSWER), _say("user", _NEXT)]
_WITH_SYSTEM = [_say("system", _SYSTEM), *_QUESTION]
# Conversations that a template is checked with.
_PROBES: tuple[_Conversation, ...] = (
    [_say("user", "Hello?")],
    [_say("user", "One."), _say("assistant", "Two."), _say("user", "Three & four?")],
    [_say("system", "Be brief."), _say("user", "One"), _say("assistant", "2"), _say("user", "3")],
)


@dataclass(frozen=True)
class TemplateParts:
    """Texts around the contents of messages.

    start: before the first message, without a system message.
    system: before and after the system message; None if the template refuses one.
    user, assistant: before and after a message.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what Ollama renders with :meth:`go_template`."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        text = self.start
        if system and self.system:
            text = f"{self.system[0]}{system}{self.system[1]}"
        around = {"user": self.user, "assistant": self.assistant}
        for message in messages:
            if message["role"] in around:
                before, after = around[message["role"]]
                text += f"{before}{message['content']}{after}"
        return text

    def go_template(self) -> str:
        """Return the Go template."""
        first = self.start
        if self.system:
            before, after = self.system
            first = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}"
            first += f"{{{{ else }}}}{self.start}{{{{ end }}}}"
        turns = "".join(
            f'{word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for word, role, (before, after) in (
                ("{{ if", "user", self.user),
                ("{{ else if", "assistant", self.assistant),
            )
        )
        return f"{first}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}"

    def texts(self) -> list[str]:
        """Return all texts."""
        return [self.start, *(self.system or ()), *self.user, *self.assistant]


def find_parts(template: str, tokens: Mapping[str, str], start_token: str) -> TemplateParts | None:
    """Return the parts of a chat template; None if it is not made of such parts.

    :param start_token: text that llama.cpp puts before every prompt by itself, or empty.
    """

    def render(messages: Sequence[Mapping[str, Any]]) -> str:
        return render_conversation(template, messages, tokens).removeprefix(start_token)

    try:
        question, longer = render(_QUESTION), render(_LONGER)
    except UserError:
        return None
    parts = _parts_of(question, longer, _rendered(render, _WITH_SYSTEM))
    if parts is None or any("{{" in text or '"""' in text for text in parts.texts()):
        return None
    probes = [p for p in _PROBES if parts.system or p[0]["role"] != "system"]
    same = all(_rendered(render, probe) == parts.render(probe) for probe in probes)
    return parts if same else None


def _rendered(render: Any, messages: _Conversation) -> str | None:
    """Return a rendering; None if the template refuses the messages."""
    try:
        return render(messages)
    except UserError:
        return None


def _parts_of(question: str, longer: str, with_system: str | None) -> TemplateParts | None:
    if question.count(_USER) != 1 or any(longer.count(m) != 1 for m in (_USER, _ANSWER, _NEXT)):
        return None
    before, ending = question.split(_USER)
    middle = longer.partition(_USER)[2].partition(_ANSWER)
    between = middle[2].partition(_NEXT)[0]
    if not middle[0].startswith(ending):
        return None
    user = _common_end(before, between)
    system = None
    if with_system is not None:
        head, _, rest = with_system.partition(_SYSTEM)
        joint = rest.partition(_USER)[0]
        if with_system.count(_SYSTEM) != 1 or not joint.endswith(user):
            return None  # such as a system message inside the question
        system = (head, joint.removesuffix(user))
    return TemplateParts(
        before.removesuffix(user),
        system,
        (user, ending),
        (middle[0].removeprefix(ending), between.removesuffix(user)),
    )


def _common_end(one: str, other: str) -> str:
    """Return the longest text that both texts end with."""
    same = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)
    )
    return "".join(character for character, _ in same)[::-1]


def modelfile_text(folder: Path, ends: Sequence[int], stops: Sequence[str]) -> str:
    """Return the Modelfile of a GGUF folder.

    :param ends: ids of tokens that end an answer.
    :param stops: texts that end an answer.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, template = read_special_tokens(folder), read_chat_template(folder)
    lines = [f"# ollama create <name> -f {MODELFILE}", f"FROM ./{GRAPHS['gguf']}"]
    go_template: str | None = PLAIN_GO_TEMPLATE
    if template is not None:
        start = tokens.get("bos_token", "")
        adds_start = tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(start)]
        parts = find_parts(template, tokens, start if adds_start else "")
        go_template = parts.go_template() if parts else None
    if go_template is not None:
        lines.append(f'TEMPLATE """{go_template}"""')
    texts = [text for end in ends if (text := tokenizer.id_to_token(end))]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in (*texts, *stops)]
    if context := context_of(folder):
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"
