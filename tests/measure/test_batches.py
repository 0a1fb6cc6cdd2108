"""A batch of prompts of different lengths gives the results of each prompt alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft_export.measure import batches as rooms
from sqft_export.measure import decode
from sqft_export.measure.batches import last_logits, pad_sequences, sort_by_length, split_batches
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_likelihoods, log_softmax
from sqft_export.recipe.schema import Export
from sqft_export.targets import target

KINDS = ("torch", "openvino", "fused", "standard")


@pytest.fixture(scope="module")
def standard(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("standard")
    merged = tiny_run["merge"].path / "model"
    target("onnx").export(merged, folder, Export(onnx_graph="standard"))
    return folder


@pytest.fixture(params=KINDS)
def session(request, tiny_run, standard):
    folders = {
        "torch": tiny_run["merge"].path / "model",
        "openvino": tiny_run["export-openvino"].path / "model",
        "fused": tiny_run["export-onnx"].path / "model",
        "standard": standard,
    }
    runtime = {"fused": "onnx", "standard": "onnx"}.get(request.param, request.param)
    return target(runtime).open_session(folders[request.param], True, 2)


def questions(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Choices after contexts that they share, of one token and of several, and others alone."""
    random = np.random.RandomState(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.randint(5, 400, random.randint(low, high)).tolist()

    prompts, targets = [], []
    for _ in range(7):
        context, right = ids(1, 40), ids(1, 6)
        for continuation in (ids(1, 6), right, ids(1, 2), [*right, 1]):
            prompts.append(context)
            targets.append(continuation)
    for _ in range(5):
        prompts.append(ids(1, 30))
        targets.append(ids(1, 9))
    return prompts, targets


def test_likelihoods_are_those_of_every_sequence_alone(session):
    prompts, targets = questions()
    found = log_likelihoods(session, prompts, targets)
    for prompt, answer, (total, first) in zip(prompts, targets, found, strict=True):
        session.reset()
        logits = session.forward(np.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        expected = log_softmax(logits)[range(len(answer)), answer].sum()
        assert total == pytest.approx(float(expected), abs=1e-3)
        assert first == int((logits.argmax(-1) == answer).sum())


def test_answers_are_those_of_every_prompt_alone(session, monkeypatch):
    prompts = questions(1)[0][::3]
    alone = []
    for prompt in prompts:
        session.reset()
        ids, said = np.array([prompt]), []
        for _ in range(12):
            said.append(int(session.forward(ids)[0, -1].argmax()))
            ids = np.array([said[-1:]])
        alone.append(said)
    assert generate(session, prompts, 12, stop=[]) == alone
    stop = alone[0][3]  # some end early, and the others go on without them
    cut = [said[: said.index(stop)] if stop in said else said for said in alone]
    assert generate(session, prompts, 12, stop=[stop]) == cut
    assert {len(said) for said in cut} > {12}
    # Many small batches, whose last rows wait for one another.
    monkeypatch.setattr(decode, "MAX_CACHE_TOKENS", 160)
    monkeypatch.setattr(decode, "MIN_RUNNING_SHARE", 0.5)
    assert generate(session, prompts, 12, stop=[stop]) == cut


def test_logits_of_the_last_tokens_are_the_last_logits(session):
    ids = np.random.RandomState(0).randint(5, 400, (2, 9))
    session.reset()
    every = session.forward(ids)
    session.reset()
    last = session.forward(ids, None, 2)
    assert last.shape == (2, 2, session.vocabulary)
    np.testing.assert_allclose(last, every[:, -2:], atol=1e-4 * every.std())


def watched(session, monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of every pass from now on."""
    passes: list[tuple[int, int]] = []
    forward = session.forward

    def counted(ids, mask=None, last=None):
        passes.append(ids.shape)
        return forward(ids, mask, last)

    monkeypatch.setattr(session, "forward", counted)
    return passes


def test_rows_that_have_ended_are_not_computed(random_llama, monkeypatch):
    session = target("torch").open_session(random_llama, True, None)
    prompts = [[5 + n, 9 + n, 30 + n] for n in range(8)]
    free = generate(session, prompts, 10, stop=[])
    passes = watched(session, monkeypatch)
    generate(session, prompts, 10, stop=[said[2] for said in free[:6]])
    rows = [rows for rows, _ in passes]
    assert rows[0] == 8 and min(rows) < 8 * (1 - decode.DROP_ENDED_SHARE) + 1


def test_the_last_rows_of_batches_go_on_together(random_llama, monkeypatch):
    session = target("torch").open_session(random_llama, True, None)
    prompts = [[5 + n, 9 + n, 30 + n] for n in range(32)]
    free = generate(session, prompts, 40, stop=[])
    long = {token for said in free[::8] for token in said}  # one of every batch goes on
    stop = list({token for said in free for token in said} - long)
    assert sum(not set(said) & set(stop) for said in free) <= 8
    passes = watched(session, monkeypatch)
    monkeypatch.setattr(decode, "MAX_CACHE_TOKENS", 8 * (3 + 40))  # eight rows a batch
    monkeypatch.setattr(decode, "MIN_RUNNING_SHARE", 0.5)
    together = generate(session, prompts, 40, stop)
    taken = len(passes)
    monkeypatch.setattr(decode, "MIN_RUNNING_SHARE", 0.0)
    assert generate(session, prompts, 40, stop) == together
    assert taken < 0.6 * (len(passes) - taken)


def test_rows_that_were_filled_up_go_on(session):
    random = np.random.RandomState(0)
    prompts = [random.randint(5, 400, size).tolist() for size in (4, 7)]
    parts = [[[11, 12, 13], [21]], [[14], [22]], [[15, 16], [23, 24, 25]]]
    batch = pad_sequences(prompts, session.padding)
    last_logits(session, batch)
    mask = batch.mask
    for part in parts:
        filled_up = pad_sequences(part, "right")
        mask = np.concatenate([mask, filled_up.mask], axis=1)
        found = session.forward(filled_up.ids, mask)
    for row, prompt in enumerate(prompts):
        session.reset()
        whole = np.array([prompt + [token for part in parts for token in part[row]]])
        count = len(parts[-1][row])
        alone = session.forward(whole)[0, -count:]
        np.testing.assert_allclose(found[row, :count], alone, atol=1e-3 * alone.std())


def test_onnx_runs_the_graph_as_it_is_deployed_until_logits_of_some_tokens_are_asked_for(tiny_run):
    session = target("onnx").open_session(tiny_run["export-onnx"].path / "model", False, 2)
    deployed = {i.name for i in session.session.get_inputs()}
    ids = np.array([[5, 6, 7, 8]])
    whole = session.forward(ids)
    session.argmax_tokens(np.array([[9]]))
    assert {i.name for i in session.session.get_inputs()} == deployed

    session.reset()
    session.forward(ids[:, :2])
    last = session.forward(ids[:, 2:], last=1)  # another graph, the same cache
    assert {i.name for i in session.session.get_inputs()} == deployed | {"wanted_logits"}
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-3 * whole.std())


def test_prompts_that_are_filled_up_on_the_right_go_in_parts_of_like_lengths(tiny_run, monkeypatch):
    session = target("onnx").open_session(tiny_run["export-onnx"].path / "model", True, 2)
    random = np.random.RandomState(0)
    lengths = (3, 40, 4, 20, 3, 39, 6, 2)
    prompts = [random.randint(5, 400, size).tolist() for size in lengths]
    passes, run = [], session._run

    def counted(ids, mask, wanted):
        passes.append(ids.shape)
        return run(ids, mask, wanted)

    monkeypatch.setattr(session, "_run", counted)
    found = last_logits(session, pad_sequences(prompts, "right"))
    assert passes == [(2, 40), (1, 20), (4, 6), (1, 2)]
    for prompt, logits in zip(prompts, found, strict=True):
        session.reset()
        alone = session.forward(np.array([prompt]))[0, -1]
        np.testing.assert_allclose(logits, alone, atol=1e-3 * alone.std())


def test_a_cache_that_outgrows_its_room_goes_on(tiny_run, monkeypatch):
    session = target("onnx").open_session(tiny_run["export-onnx"].path / "model", True, 2)
    prompts = questions(2)[0][::4]
    roomy = generate(session, prompts, 20, stop=[])
    stop = roomy[0][6]  # rows are selected before, with and after a cache grows
    few = generate(session, prompts, 20, stop=[stop])
    monkeypatch.setattr("sqft_export.targets.onnx.session.FIRST_SPARE_TOKENS", 2)
    assert generate(session, prompts, 20, stop=[]) == roomy
    assert session.past[0].shape()[2] < max(map(len, prompts)) + 20 + 64
    assert generate(session, prompts, 20, stop=[stop]) == few


def test_prompts_that_are_filled_up_on_the_left_join_when_they_begin(session, monkeypatch):
    random = np.random.RandomState(0)
    lengths = (3, 40, 4, 20, 3, 18, 6, 2)
    prompts = [random.randint(5, 400, size).tolist() for size in lengths]
    alone = []
    for prompt in prompts:
        session.reset()
        alone.append(session.forward(np.array([prompt]))[0, -1])
    passes, forward = watched(session, monkeypatch), session.forward
    monkeypatch.setattr(session, "pass_tokens", 10)
    batch = pad_sequences(prompts, session.padding)
    found = last_logits(session, batch)
    np.testing.assert_allclose(found, alone, atol=1e-3 * np.std(alone))
    if session.padding == "left":
        tokens = sum(rows * length for rows, length in passes)
        assert len(passes) > 1 and tokens + 10 * len(passes) < batch.ids.size + 10
        assert passes[0] == (1, 40 - 20)
    # The cache is that of a batch whose rows begin where they do.
    chosen = found.argmax(axis=-1)
    mask = np.concatenate([batch.mask, np.ones((len(prompts), 1), np.int64)], axis=1)
    after = forward(chosen.reshape(-1, 1), mask, 1)[:, -1]
    for prompt, token, logits in zip(prompts, chosen, after, strict=True):
        session.reset()
        expected = forward(np.array([[*prompt, token]]))[0, -1]
        np.testing.assert_allclose(logits, expected, atol=1e-3 * expected.std())


@given(st.lists(st.integers(0, 500), max_size=64), st.integers(0, 2048))
def test_passes_over_a_batch_take_no_longer_than_one(firsts, pass_tokens):
    begins, length = np.array([0, *firsts]), 501
    stops = rooms._pass_ends(begins, length, pass_tokens)
    assert stops == sorted(set(stops)) and stops[-1] == length
    passes = zip([0, *stops], stops, strict=False)
    tokens = sum((begins < stop).sum() * (stop - start) for start, stop in passes)
    assert tokens + pass_tokens * len(stops) <= len(begins) * length + pass_tokens


class _Sizes:
    vocabulary, all_logits, max_rows = 1000, True, 2**31


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), max_size=80),
    growth=st.integers(0, 300),
    wanted=st.none() | st.integers(1, 50),
    all_logits=st.booleans(),
)
def test_batches_hold_every_sequence_once_and_stay_within_their_bounds(
    lengths, growth, wanted, all_logits
):
    session = _Sizes()
    session.all_logits, bound = all_logits, 2000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "MAX_LOGIT_BYTES", 4 * 1000 * 1500)
        made = list(split_batches(session, lengths, sort_by_length(lengths), bound, growth, wanted))
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[index] for index in batch)
        scored = max(longest if all_logits or wanted is None else 0, wanted or 0)
        fits = len(batch) * (longest + growth) <= bound and len(batch) * scored <= 1500
        assert len(batch) == 1 or (fits and len(batch) <= rooms.MAX_BATCH_ROWS)


def test_prompts_are_filled_up_on_the_side_that_is_asked_for():
    left, right = (pad_sequences([[5], [6, 7, 8]], side) for side in ("left", "right"))
    assert left.ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert right.ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert left.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert right.mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_continuations_that_have_ended_are_not_filled_up(random_llama, monkeypatch):
    session = target("torch").open_session(random_llama, True, None)
    lengths = [1, 2, 2, 3, 3, 4, 9, 20]
    contexts = [[5 + n, 9, 30 + n] for n in range(8)]
    choices = [(c, [40 + n] * (1 + n)) for c in contexts for n in lengths]
    passes = watched(session, monkeypatch)
    log_likelihoods(session, *map(list, zip(*choices, strict=True)))
    wanted, filled_up = 8 * sum(lengths), 8 * len(lengths) * max(lengths)
    fed = sum(rows * length for rows, length in passes[1:])
    assert wanted <= fed < (wanted + filled_up) / 2
