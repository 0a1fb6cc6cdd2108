"""llama.cpp keeps 256 sequences; larger batches of choices are split, with the same likelihoods."""

import numpy as np
import pytest

from sqft_export.errors import UserError
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.targets.gguf.bindings import MAX_SEQUENCES
from sqft_export.targets.gguf.session import open_session


@pytest.fixture(scope="module")
def session(tiny_run):
    return open_session(tiny_run["export-gguf"].path / "model", exact=True, threads=1)


def questions(contexts: int, choices: int, length: int) -> tuple[list, list]:
    """Prompts of six tokens and their choices, which differ in the first token."""
    generator = np.random.default_rng(7)
    prompts = generator.integers(3, 200, (contexts, 6)).tolist()
    targets = [
        [
            [3 + choice, *generator.integers(3, 200, length - 1).tolist()]
            for choice in range(choices)
        ]
        for _ in prompts
    ]
    return [p for p in prompts for _ in range(choices)], [t for each in targets for t in each]


@pytest.mark.parametrize(
    ("contexts", "choices", "length"),
    [(64, 5, 3), (2, MAX_SEQUENCES + 44, 2), (63, 4, 3)],
    ids=["many contexts", "many choices", "rows that just fit"],
)
def test_more_choices_than_sequences_are_scored(session, contexts, choices, length):
    prompts, targets = questions(contexts, choices, length)
    together = np.array([total for total, _ in log_likelihoods(session, prompts, targets)])
    some = np.linspace(0, len(prompts) - 1, 12).astype(int)
    for at in some:
        ((single, _),) = log_likelihoods(session, [prompts[at]], [targets[at]])
        assert together[at] == pytest.approx(single, abs=0.01), at


def test_sequences_that_are_left_make_room_before_others_are_copied(session):
    session.reset()
    session.forward(np.full((200, 2), 5))
    session.select(np.zeros(MAX_SEQUENCES, np.int64))
    logits = session.forward(np.full((MAX_SEQUENCES, 1), 6), None, 1)
    assert np.allclose(logits, logits[:1], atol=1e-4)


def test_a_batch_that_no_cache_holds_is_refused_with_the_limit(session):
    session.reset()
    session.forward(np.full((2, 2), 5))
    with pytest.raises(
        UserError, match=f"a batch of {MAX_SEQUENCES + 1} rows; at most {MAX_SEQUENCES}"
    ):
        session.select(np.zeros(MAX_SEQUENCES + 1, np.int64))
