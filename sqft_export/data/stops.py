"""Stop texts, which end a generated answer: as text, and as token texts for workers.

A worker process has no tokenizer.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sqft_export.recipe.schema import Task, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_texts(task: Task) -> tuple[str, ...]:
    """Return the texts that end an answer to a task, the same for every row; () for plain text."""
    return () if isinstance(task, Text) else task.stop_texts


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """Return the text before its first stop text; all of it if it has none."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _may_belong(piece: str, stop: str) -> bool:
    """Return whether a token's text can overlap a stop text, alone or with its neighbours."""
    if piece in stop or stop in piece:
        return True
    lengths = range(1, min(len(piece), len(stop)))
    return any(piece.endswith(stop[:n]) or piece.startswith(stop[-n:]) for n in lengths)


def stop_pieces(tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> dict[str, str]:
    """Return token id -> text of all tokens that can overlap a stop text.

    A worker concatenates them to end generation early (``measure/stops.py``). The scored answer is
    cut as decoded text. So if token texts do not simply concatenate, generation takes longer and
    the score is the same. The result is empty without stop texts, and for tokenizers that do not
    use the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not stops:
        return {}
    ids = sorted(backend.get_vocab(with_added_tokens=True).values())
    # Decoding may drop the blank of a first token, so each token is decoded after another one.
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
