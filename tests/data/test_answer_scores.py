"""Scores of generated answers."""

import pytest

from sqft_export.data.answers import make_score, normalize_answer, score_json_fields
from sqft_export.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected", "generated", "score"),
    [
        ("exact", "42", " 42\n", 1),
        ("exact", "42", "42.", 0),
        ("normalized", "The Cat!", "a  cat", 1),
        ("normalized", "cat", "cats", 0),
        ("contains", "New York", "It is new york, I think.", 1),
        ("contains", "art", "a party", 0),
        ("contains", "", "something", 0),
        ("regex", r"\d{4}-\d\d", "in 2024-05, perhaps", 1),
        ("regex", r"^\d+$", "none", 0),
        ("json", '{"a": [1, 2], "b": null}', '{"b": null, "a": [1, 2]}', 1),
        ("json", '{"a": 1}', 'Sure:\n```json\n{"a": 1.0}\n```\nDone.', 1),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", '{"a": 1}', "a is 1", 0),
        ("json", "[]", "", 0),
        ("json_f1", '{"a": 1, "b": {"c": "x"}}', '{"a": 1, "b": {"c": "y"}}', 0.5),
        ("json_f1", '{"a": 1, "b": 2}', '{"a": 1}', 2 / 3),
        ("json_f1", '{"a": 1}', "{", 0),
        ("json_f1", "{}", "{}", 1),
        ("rouge_l", "the cat sat", "the cat sat", 1),
        ("rouge_l", "the cat sat on", "the dog sat on", 0.75),
        ("rouge_l", "cat", "", 0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1),
        ("bleu", "the cat", "a dog", 0),
    ],
)
def test_scores(name, expected, generated, score):
    assert make_score(name)(expected, generated) == pytest.approx(score)


def test_bleu_of_a_partly_right_answer_is_sacrebleus():
    import sacrebleu

    pair = "the cat sat on the mat", "the cat sat on a mat"
    theirs = sacrebleu.sentence_bleu(pair[1], [pair[0]]).score / 100
    assert 0 < make_score("bleu")(*pair) < 1
    assert make_score("bleu")(*pair) == pytest.approx(theirs)


def test_a_pattern_takes_the_last_match_of_both():
    score = make_score("regex", pattern=r"#### *(-?\d+)")
    assert score("so\n#### 7", "#### 6, no\n#### 7") == 1
    assert score("#### 7", "#### 6") == 0
    assert score("7", "it is #### 7") == 1  # an expected answer without the mark
    assert score("7", "it is 7") == 0
    assert make_score("regex", pattern=r"\d+")("a 12", "b 12 c") == 1
    assert make_score("regex", pattern=r"(x)|\d+")("1", "1") == 0  # the group is not there


def test_fields_are_scored_by_their_place():
    found = score_json_fields('{"a": {"b": [1, 2]}, "c": {}}', '{"a": {"b": [1, 3]}, "c": {}}')
    assert found == {"a.b[0]": 1, "a.b[1]": 0, "c": 1}


def test_normalized_text():
    assert normalize_answer(" The  U.S.A., an ally! ") == "usa ally"


def test_a_score_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(expected, generated):\n    return len(generated) / len(expected)\n")
    assert make_score("file", file=file)("abcd", "ab") == 0.5


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(expected, generated):\n    return 1 / 0\n", "raises ZeroDivisionError"),
        ("def score(expected, generated):\n    return 'much'\n", "gives 'much'; a finite number"),
        ("def score(expected, generated):\n    return float('nan')\n", "gives nan"),
        ("def score(expected, generated):\n    pass\n", "gives None"),
        ("def score(expected):\n    return 1\n", "raises TypeError"),
    ],
)
def test_faults_in_ones_own_score_name_file_and_answer(tmp_path, code, said):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(UserError, match=rf"mine\.py: score\('yes', 'no'\) {said}"):
        make_score("file", file=file)("yes", "no")


def test_files_and_patterns_that_are_none_are_refused_at_once(tmp_path):
    file = tmp_path / "mine.py"
    with pytest.raises(UserError, match=r"mine\.py: not a Python file"):
        make_score("file", file=file)
    for code, said in (("score = 1", "has no function"), ("def score(", "SyntaxError")):
        file.write_text(code)
        with pytest.raises(UserError, match=said):
            make_score("file", file=file)
    with pytest.raises(UserError, match=r"found the pattern '\('"):
        make_score("regex", pattern="(")
    with pytest.raises(UserError, match="name the Python file"):
        make_score("file")
