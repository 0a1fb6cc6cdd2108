"""Where generation ends; needs neither tokenizer nor torch."""

import sys
from dataclasses import dataclass, field
from typing import Any

BREAK = "\0"  # stands for a token that no stop text has


@dataclass(frozen=True)
class Stops:
    """Ids, texts and lengths that end a generated answer.

    ids: end before one of them.
    texts: end after one of them; ``pieces`` has the text of every token they may be made of.
    context: most tokens of prompt and answer together.
    """

    ids: list[int]
    texts: tuple[str, ...] = ()
    pieces: dict[int, str] = field(default_factory=dict)
    context: int = sys.maxsize

    @classmethod
    def of_questions(cls, questions: dict[str, Any]) -> "Stops":
        """As ``scoring.questions`` has them, plain JSON."""
        return cls(
            questions["stop"],
            tuple(questions.get("stop_texts", ())),
            {int(token): text for token, text in questions.get("stop_pieces", {}).items()},
            questions.get("context") or sys.maxsize,
        )

    def room(self, prompt: list[int], new_tokens: int) -> int:
        """How many tokens an answer to a prompt may have: ``new_tokens``, or fewer in the
        context."""
        return max(0, min(new_tokens, self.context - len(prompt)))

    def at_text(self, answer: list[int]) -> bool:
        """Whether the last tokens of an answer complete a stop text."""
        if not self.pieces or not answer or answer[-1] not in self.pieces:
            return False
        last = answer[-max(map(len, self.texts)) - 1 :]
        text = "".join(self.pieces.get(token, BREAK) for token in last)
        return any(stop in text for stop in self.texts)
