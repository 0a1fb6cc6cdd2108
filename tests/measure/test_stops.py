"""Answers end at stop texts, for every row, and generation ends there too."""

import pytest

from conftest import TINY, small_recipe
from sqft_export.data.items import Data, Item, load_tokenizer, stop_ids
from sqft_export.data.scoring import is_right, judge, questions
from sqft_export.data.stops import cut_at_stop, stop_pieces, stop_texts
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import score
from sqft_export.measure.stops import Stops
from sqft_export.recipe.schema import Problems
from sqft_export.targets import target


class Counted:
    """A session that counts the tokens it computes."""

    def __init__(self, session):
        self.session, self.tokens = session, 0

    def __getattr__(self, name):
        return getattr(self.session, name)

    def forward(self, ids, *rest):
        self.tokens += ids.size
        return self.session.forward(ids, *rest)


def problems(prompt: str, **settings) -> Problems:
    return Problems(kind="problems", train="a", test="b", prompt=prompt, **settings)


@pytest.mark.parametrize(
    ("prompt", "stops"),
    [
        ("Question: {question}\nAnswer:", ("Question:",)),
        ("\n### Input:\n{text}\n### Output:\n", ("### Input:",)),
        ("Q: {question}\nA:", ("\nQ:",)),
        ("Translate {text}", ("\nTranslate",)),
        ("{{[{question}", ("\n{[",)),
        ("{question}", ()),
    ],
)
def test_stop_texts_are_what_prompts_begin_with(prompt, stops):
    assert stop_texts(problems(prompt)) == stops
    assert stop_texts(problems(prompt, stop=["END"])) == ("END",)
    assert stop_texts(problems(prompt, stop=[])) == ()


def test_the_first_stop_text_in_a_text_cuts_it():
    assert cut_at_stop("a B c D", ["D", "B", "E"]) == "a "
    assert cut_at_stop("a b", ["D"]) == "a b"


def test_a_right_answer_is_right_where_the_model_goes_on_to_another_question():
    task = problems("Question: {question}\nAnswer:", final="####")
    item = Item([], [], " 1+2=3 #### 3")
    assert is_right(task, " 1+2=3 #### 3\n\nQuestion: Tom has 5 #### 5", item)
    assert not is_right(task, " 1+2=3 #### 4\n\nQuestion: Tom has 5 #### 3", item)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_generation_ends_once_a_stop_text_is_said(random_llama, length):
    """Whatever tokens it is made of; the others of a batch go on."""
    tokenizer = load_tokenizer(TINY)
    session = Counted(target("torch").open_session(random_llama, True, None))
    prompts = [[0, 5, 6, 7], [0, 9, 9, 4], [0, 3]]
    free = generate(session, prompts, 60, stop=[])
    whole, session.tokens = session.tokens, 0
    said = tokenizer.decode(free[0])
    stop = said[8 : 8 + length]
    pieces = {int(token): text for token, text in stop_pieces(tokenizer, [stop]).items()}
    ended = generate(session, prompts, 60, Stops([], (stop,), pieces))
    for one, other in zip(free, ended, strict=True):
        assert one[: len(other)] == other
        texts = tokenizer.decode(one), tokenizer.decode(other)
        assert cut_at_stop(texts[0], [stop]) == cut_at_stop(texts[1], [stop])
    assert len(ended[0]) < len(free[0]) and session.tokens < whole


def test_prompt_and_answer_never_exceed_the_context(random_llama):
    session = target("torch").open_session(random_llama, True, None)
    prompts = [[0] * 5, [0] * 12, [0] * 14, [0] * 20]
    answers = generate(session, prompts, 8, Stops([], context=14))
    assert [len(answer) for answer in answers] == [8, 2, 0, 0]
    free = generate(session, prompts[:2], 8, [])
    assert answers[0] == free[0] and answers[1] == free[1][:2]


def test_rows_are_judged_the_same_whether_generation_stops_or_is_cut(random_llama):
    recipe, tokenizer = small_recipe("task.stop=[a, ' ']"), load_tokenizer(TINY)
    items = Data(recipe, tokenizer).test[:4]
    session = Counted(target("torch").open_session(random_llama, True, None))
    ends, said, spent = stop_ids(random_llama, tokenizer), [], []
    for known in (tokenizer, None):
        session.tokens = 0
        result = score(session, questions(recipe, items, ends, known))
        said.append([one.answer for one in judge(recipe, items, result, tokenizer)])
        spent.append(session.tokens)
    assert said[0] == said[1] and spent[0] < spent[1]
    assert not any("a" in one or " " in one for one in said[0])
