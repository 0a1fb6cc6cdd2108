"""Decide where generation ends. Needs no tokenizer and no torch."""

import sys
from dataclasses import dataclass, field

from sqft_export.data.scoring import ScoringRequest

BREAK = "\0"  # text of a token that is part of no stop text


@dataclass(frozen=True)
class Stops:
    """Ids, texts and lengths that end a generated answer.

    ids: generation ends before one of these tokens.
    texts: generation ends after one of these texts.
    pieces: text of every token that can be part of a stop text.
    context: largest number of tokens of prompt and answer in total.
    """

    ids: list[int]
    texts: tuple[str, ...] = ()
    pieces: dict[int, str] = field(default_factory=dict)
    context: int = sys.maxsize

    @classmethod
    def from_questions(cls, questions: ScoringRequest) -> "Stops":
        """Return the stops of a scoring request."""
        return cls(
            questions.stop,
            tuple(questions.stop_texts),
            {int(token): text for token, text in questions.stop_pieces.items()},
            questions.context or sys.maxsize,
        )

    def max_answer_tokens(self, prompt: list[int], new_tokens: int) -> int:
        """Return ``new_tokens``, or fewer if the context cannot hold them after the prompt."""
        return max(0, min(new_tokens, self.context - len(prompt)))

    def ends_with_stop_text(self, answer: list[int]) -> bool:
        """Return whether the last token of an answer completes a stop text."""
        if not self.pieces or not answer or answer[-1] not in self.pieces:
            return False
        last = answer[-max(map(len, self.texts)) - 1 :]
        text = "".join(self.pieces.get(token, BREAK) for token in last)
        return any(stop in text for stop in self.texts)
