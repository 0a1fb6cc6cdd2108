"""Answer texts and conversations with a deployment, in its own runtime.

    session = sqft_export.load("runs/tiny")
    print(session.generate("Question: ..."))                        # plain text, no template
    for piece in session.stream([{"role": "user", "content": "Hello"}]):    # the chat template
        print(piece, end="", flush=True)
    print(session.speed.tokens_per_second)

Decoding is greedy. A conversation that continues the last one computes only its new tokens.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.data.items import end_tokens
from sqft_export.data.stops import cut_at_stop
from sqft_export.errors import HostError, UserError, one_line
from sqft_export.inference.templates import (
    read_chat_template,
    read_special_tokens,
    render_conversation,
)
from sqft_export.kernels.choice import STOCK
from sqft_export.machine.host import LESS_MEMORY, out_of_memory
from sqft_export.targets import Session
from sqft_export.targets.execution import open_on_kernels
from sqft_export.targets.folder import context_of, kind_of

MAX_NEW_TOKENS = 512
INCOMPLETE = "\ufffd"  # decoded from the first bytes of a character

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass
class AnswerSpeed:
    """Tokens and seconds of an answer.

    prompt_tokens: computed in the first pass; tokens that were cached are not counted.
    prefill_seconds: the first pass, which also chooses the first new token.
    decode_seconds: all later passes.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Return new tokens per second, without the first pass; 0 after fewer than two passes."""
        return (self.passes - 1) / self.decode_seconds if self.passes > 1 else 0.0

    def add_pass(self, seconds: float) -> None:
        """Count one forward pass."""
        if self.passes:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds = seconds
        self.passes += 1


class TextSession:
    """A loaded deployment with its tokenizer and its chat template.

    folder: the deployment.
    runtime: openvino, onnx, gguf, web or torch.
    template: the chat template; None: prompts are plain text.
    context: largest number of tokens of prompt and answer.
    speed: of the last answer.
    """

    def __init__(self, folder: Path, session: Session):
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder}: has no tokenizer.json, which turns text into tokens")
        self.folder, self.runtime, self.session = folder, kind_of(folder), session
        self.tokenizer = Tokenizer.from_file(str(file))
        self.special_tokens = read_special_tokens(folder)
        self.template = read_chat_template(folder)
        self.context = context_of(folder) or sys.maxsize
        self.speed = AnswerSpeed()
        self._ends = self._end_tokens()
        self._cached: list[int] = []

    def generate(
        self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, stop: Sequence[str] = ()
    ) -> str:
        """Return the greedy answer to a prompt.

        :param prompt: a text, which is continued unchanged, or messages with ``role`` and
            ``content``, which are rendered with the chat template.
        :param stop: texts that end the answer; they are not part of it.
        :raises UserError: if the prompt is empty or fills the context, or messages are given and
            the deployment has no chat template.
        """
        return "".join(self.stream(prompt, max_new_tokens, stop))

    def stream(
        self, prompt: Prompt, max_new_tokens: int = MAX_NEW_TOKENS, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yield the answer of :meth:`generate` piece by piece, while it is computed."""
        ids = self.encode(prompt)
        if not ids:
            raise UserError("the prompt has no tokens: it is empty; give a text with -p")
        room = self.context - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the context of {self.folder} is "
                f"{self.context} tokens of prompt and answer; shorten it or start a new "
                "conversation"
            )
        return cut_stream(self._decode(self._tokens(ids, min(max_new_tokens, room))), stop)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt; see :meth:`generate`."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).ids
        if self.template is None:
            raise UserError(
                f"{self.folder}: has no chat template, so it takes a text and no messages; "
                "its model card shows the prompt format"
            )
        text = render_conversation(self.template, prompt, self.special_tokens)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _end_tokens(self) -> set[int]:
        """Return the end-token ids of the config files and of the tokenizer."""
        own = self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        return {*end_tokens(self.folder), *([] if own is None else [own])}

    def _tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        """Yield at most ``limit`` new tokens, up to one that ends the answer."""
        fresh = self._uncached(ids)
        self.speed = speed = AnswerSpeed(prompt_tokens=len(fresh))
        for _ in range(limit):
            started = time.perf_counter()
            (token,) = self.session.argmax_tokens(np.array([fresh], np.int64)).tolist()
            speed.add_pass(time.perf_counter() - started)
            self._cached += fresh
            if token in self._ends:
                return
            speed.new_tokens += 1
            yield token
            fresh = [token]

    def _uncached(self, ids: list[int]) -> list[int]:
        """Return the ids that are not in the cache; clear it if it is not a prefix of them."""
        known = len(self._cached)
        if 0 < known < len(ids) and ids[:known] == self._cached:
            return ids[known:]
        self.session.reset()
        self._cached = []
        return ids

    def _decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text of tokens; an incomplete character waits for its other bytes."""
        done: list[int] = []
        start = 0  # the first token that is decoded again at every step
        shown = 0  # number of tokens whose text was yielded
        for token in tokens:
            done.append(token)
            before, after = (self._text(done[start:end]) for end in (shown, len(done)))
            if len(after) > len(before) and not after.endswith(INCOMPLETE):
                yield after[len(before) :]
                start, shown = shown, len(done)
        before, after = (self._text(done[start:end]) for end in (shown, len(done)))
        yield after[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


def cut_stream(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield pieces of text up to the first stop text, which may span several pieces."""
    kept = max(map(len, stops), default=1) - 1  # characters that may begin a stop text
    held = ""
    for piece in pieces:
        held += piece
        cut = cut_at_stop(held, stops)
        if len(cut) < len(held):
            held = cut
            break
        ready = max(0, len(held) - kept)
        if ready:
            yield held[:ready]
        held = held[ready:]
    if held:
        yield held


def open_deployment(
    folder: Path, device: str = "cpu", threads: int | None = None, execution: str = STOCK
) -> TextSession:
    """Load a deployment (packed or plain) or a merged Hugging Face model into its runtime.

    :param device: a kind of device, see ``list targets``.
    :param threads: CPU threads; None: the runtime's choice.
    :param execution: auto, sparse or dense: our kernels; stock: the runtime's.
    :raises UserError: if the folder is no such model, or its runtime cannot load it.
    """
    kind = kind_of(folder)
    try:
        session = open_on_kernels(folder, False, threads, device, execution)
    except (UserError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # each runtime has its own exception classes
        if out_of_memory(error):
            raise HostError(f"{folder}: {device}: {one_line(error)}; {LESS_MEMORY}") from error
        raise UserError(f"{folder}: {kind} can't load it: {one_line(error)}") from error
    return TextSession(folder, session)
