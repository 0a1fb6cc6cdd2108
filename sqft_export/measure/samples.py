"""A few test prompts with the answers of the base, the merged model and every deployment."""

from typing import TYPE_CHECKING

from sqft_export.data.scoring import Judged
from sqft_export.measure.results import FINAL_KINDS, SampleAnswer, SamplePrompt
from sqft_export.measure.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROMPTS = 10
SAMPLE_CHARACTERS = 2000  # of a prompt or answer; the beginning of a longer prompt is left out


def sample_answers(
    table: list[Row], judged: dict[str, list[Judged]], tokenizer: "PreTrainedTokenizerBase"
) -> list[SamplePrompt]:
    """Return evenly spread prompts, each with its expected answer and the answers of the rows.

    :param judged: id of a row -> its answers; all rows answer the same items.
    """
    rows = [row for row in table if row.kind in ("base", *FINAL_KINDS)]
    if not rows:
        return []
    items = [entry.item for entry in judged[rows[0].id]]
    generated = [place for place, item in enumerate(items) if item.scoring != "choice"]
    count = min(SHOWN_PROMPTS, len(generated))
    chosen = [generated[place * len(generated) // count] for place in range(count)]
    return [
        SamplePrompt(
            prompt=_decode(tokenizer, items[place].prompt),
            expected=items[place].text,
            answers=[_answer_of(row, judged[row.id][place]) for row in rows],
        )
        for place in chosen
    ]


def _decode(tokenizer: "PreTrainedTokenizerBase", prompt: list[int]) -> str:
    text = str(
        tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    return text if len(text) <= SAMPLE_CHARACTERS else f"...{text[-SAMPLE_CHARACTERS:]}"


def _answer_of(row: Row, judged: Judged) -> SampleAnswer:
    text = judged.answer[:SAMPLE_CHARACTERS]
    return SampleAnswer(id=row.id, row=row.name, answer=text, score=judged.points)
