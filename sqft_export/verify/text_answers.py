"""What users of a deployment are answered: one test prompt as text, by the runtime's defaults."""

from pathlib import Path

from sqft_export.data.items import end_tokens
from sqft_export.errors import one_line
from sqft_export.measure.decode import generate
from sqft_export.targets import Session
from sqft_export.targets.text_api import TextApi, text_api
from sqft_export.targets.tokenizers import read_ids
from sqft_export.verify.certificate import Certificate, Check
from sqft_export.verify.subject import Asked

ANSWER_CHARACTERS = 60  # of an answer that differs


def answer_by_ids(session: Session, asked: Asked, folder: Path) -> list[int]:
    """The answer to the first text of a certificate, as scoring gets it: from token ids."""
    _, ids = asked.texts[0]
    return generate(session, [ids], asked.new_tokens, end_tokens(folder))[0]


def check_text_answer(
    certificate: Certificate, asked: Asked, runtime: str, folder: Path, answer: list[int]
) -> None:
    """Compare the answer to a text with that to its ids.

    :param answer: of :func:`answer_by_ids`.
    """
    with text_api(runtime, folder) as api:
        if api is not None:
            title = f"answer to a text as {api.name} takes it, and to its token ids in {runtime}"
            check = certificate.start("compute", title, "answers")
            _compare(check, asked, api, answer)
            if not check.passed and not asked.tokenizers_required:
                _allow_other_ids(check, asked, runtime, folder)


def _compare(check: Check, asked: Asked, api: TextApi, answer: list[int]) -> None:
    """An answer of the same interface to the same ids counts as equal: rounding in its attention
    may choose another one of two tokens that are alike likely."""
    text, ids = asked.texts[0]
    check.compared = 1
    try:
        expected, found = api.text_of(answer), api.answer(text, asked.new_tokens)
        by_ids = api.answer_ids(ids, asked.new_tokens) if api.answer_ids else expected
    except RuntimeError as error:  # the runtime refuses its own tokenizer, graph or config
        check.blame(one_line(error, ANSWER_CHARACTERS), 1)
        return
    if found in (expected, by_ids):
        return
    check.blame(
        f"{found[:ANSWER_CHARACTERS]!r} where {expected[:ANSWER_CHARACTERS]!r} was scored", 1
    )


def _allow_other_ids(check: Check, asked: Asked, runtime: str, folder: Path) -> None:
    """Let an answer differ where the runtime's tokenizer gives the text other ids than the model
    was trained with, which ``verify.tokenizers: reported`` allows."""
    text, ids = asked.texts[0]
    if any(ids_of(text) != ids for _, ids_of in read_ids(runtime, folder)):
        check.allowed = 1
        check.where.append("its tokenizer gives the text other ids, which the recipe allows")
