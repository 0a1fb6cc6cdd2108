"""``probe.json``: prompts with the reference's answers, which every deployment carries.

The file is untrusted. It is read strictly: bounded size, exact types, no unknown keys. Needs no
torch.
"""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from sqft_export.documents import Document, MayBeMissing
from sqft_export.errors import UserError
from sqft_export.targets.text_api import ChatPrompt
from sqft_export.textfiles import decode_text
from sqft_export.untrusted import read_bounded

PROBE = "probe.json"
MAX_PROBE_BYTES = 2**22
MAX_PROBE_PROMPTS = 32
MAX_PROBE_TOKENS = 2**14  # of one prompt
LONG_TOKENS = 4000  # of the longest prompt, if no length of the config is longer
LONG_CACHE_BYTES = 2**30  # keys and values of the longest prompt, in float32
STORED_TOKENS = 20  # most likely tokens of a position

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
LogProbability = Annotated[float, Field(le=0, allow_inf_nan=False)]
ProbeIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROBE_TOKENS)]
ShortText = Annotated[str, Field(max_length=2**16)]


class ProbePosition(Document):
    """The reference's most likely next tokens at one position.

    position: index of the token after which the next one is predicted.
    ids: the most likely tokens, the first one first.
    log_probabilities: of these tokens, in nats.
    """

    position: Annotated[int, Field(ge=0, lt=2 * MAX_PROBE_TOKENS)]
    ids: Annotated[list[TokenId], Field(min_length=2, max_length=STORED_TOKENS)]
    log_probabilities: Annotated[list[LogProbability], Field(max_length=STORED_TOKENS)]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.ids) != len(self.log_probabilities) or len(set(self.ids)) != len(self.ids):
            raise ValueError("expected different ids, and one log-probability for each")
        return self


class ProbePrompt(Document):
    """A prompt, its greedy continuation by the reference, and distributions at some positions.

    beyond: text length that the prompt passes, such as ``sliding_window 4096``; missing for a short
        prompt.
    """

    ids: ProbeIds
    continuation: ProbeIds
    positions: Annotated[list[ProbePosition], Field(min_length=1, max_length=64)]
    beyond: MayBeMissing[ShortText] = None

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        """Every generated token needs a position, whose first id is that token."""
        first, end = len(self.ids) - 1, len(self.ids) + len(self.continuation) - 1
        found = {one.position: one.ids[0] for one in self.positions}
        places = list(found)
        if places != sorted(places) or len(places) != len(self.positions) or places[-1] >= end:
            raise ValueError(f"positions: expected increasing numbers below {end}")
        for place, token in zip(range(first, end), self.continuation, strict=True):
            if found.get(place) != token:
                raise ValueError(f"continuation: token {place - first} is not the most likely one")
        return self


class ProbeText(Document):
    """A text and its token ids in training."""

    text: ShortText
    ids: ProbeIds


class ProbeChat(Document):
    """Messages and their token ids in training, rendered with the chat template.

    readers: template engines that gave these ids when the deployment was written.
    """

    messages: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=1000)]
    tools: MayBeMissing[list[dict[str, JsonValue]]] = None
    arguments: dict[str, JsonValue]
    ids: ProbeIds
    readers: Annotated[list[ShortText], Field(max_length=16)]

    def prompt(self) -> ChatPrompt:
        """Return the messages for a runtime's chat interface."""
        tools = None if self.tools is None else [dict[str, object](one) for one in self.tools]
        messages = [dict[str, object](one) for one in self.messages]
        return ChatPrompt(messages, tools, dict[str, object](self.arguments), self.ids)


class Probe(Document):
    """The content of ``probe.json``.

    vocabulary: logits per token.
    divergence: largest mean KL divergence of the default mode, in nats per token.
    """

    version: Literal[1]
    vocabulary: Annotated[int, Field(ge=2, lt=2**31)]
    divergence: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    prompts: Annotated[list[ProbePrompt], Field(min_length=1, max_length=MAX_PROBE_PROMPTS)]
    texts: Annotated[list[ProbeText], Field(max_length=64)]
    chat: MayBeMissing[ProbeChat] = None

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        for number, prompt in enumerate(self.prompts):
            ids = [*prompt.ids, *prompt.continuation, *(i for p in prompt.positions for i in p.ids)]
            if max(ids) >= self.vocabulary:
                raise ValueError(
                    f"prompts.{number}: found token {max(ids)}, the vocabulary has "
                    f"{self.vocabulary} tokens"
                )
        return self

    def write(self, folder: Path) -> None:
        """Write ``probe.json``."""
        text = json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"))
        (folder / PROBE).write_text(text + "\n")


def read_probe(folder: Path) -> Probe | None:
    """Return the self-test of a deployment; None if the folder has none.

    :raises UserError: naming the file, the first wrong field and what was found there.
    """
    file = folder / PROBE
    if not file.is_symlink() and not file.exists():
        return None
    text = decode_text(read_bounded(file, MAX_PROBE_BYTES), file)
    try:
        return Probe.parse(text, str(file))
    except UserError as error:
        raise UserError(f"{error}; copy or export the deployment again") from error
