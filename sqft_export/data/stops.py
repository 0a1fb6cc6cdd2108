"""Stop texts: where a generated answer ends, as text and as token ids for a process without
tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqft_export.recipe.schema import Dataset, Problems, Text


def stop_texts(task: Problems | Dataset | Text) -> tuple[str, ...]:
    """Texts at which an answer to a task ends, for every row; none for plain text."""
    return () if isinstance(task, Text) else task.stop_texts


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop text in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _may_belong(piece: str, stop: str) -> bool:
    """Whether a token's text can be part of a stop text among other tokens."""
    if piece in stop or stop in piece:
        return True
    lengths = range(1, min(len(piece), len(stop)))
    return any(piece.endswith(stop[:n]) or piece.startswith(stop[-n:]) for n in lengths)


def stop_pieces(tokenizer: Any, stops: Sequence[str]) -> dict[str, str]:
    """Token id -> its text, of the tokens that a stop text may be made of.

    A worker joins them to end generation early (``measure/stops.py``). What is scored is cut as
    text, so that a tokenizer whose tokens are not simply joined costs time and no accuracy. Empty
    without stop texts, or where the tokenizer is not of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not stops:
        return {}
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    # A token at the beginning may lose its blank, so that each is decoded after another one.
    before = backend.encode("a", add_special_tokens=False).ids[-1:]
    start = backend.decode(before, skip_special_tokens=False)
    texts = backend.decode_batch([[*before, one] for one in ids], skip_special_tokens=False)
    pieces = {
        str(one): text.removeprefix(start)
        for one, text in zip(ids, texts, strict=True)
        if text.startswith(start) and len(text) > len(start)
    }
    return {
        one: piece
        for one, piece in pieces.items()
        if any(_may_belong(piece, stop) for stop in stops)
    }
