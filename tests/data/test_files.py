"""Data files as users have them are read, or refused with file, place and the value found."""

import pytest

from conftest import small_recipe
from sqft_export.data.datasets import parse_number, plain_number, records
from sqft_export.data.files import numbered_rows, read_rows, read_text
from sqft_export.data.items import Data, Item
from sqft_export.data.scoring import is_right
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Dataset, Problems
from sqft_export.recipe.templates import fill_template, template_fault

LINE = '{"question": "q", "answer": "a"}'


def written(tmp_path, content: bytes, name: str = "data.jsonl"):
    file = tmp_path / name
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (f"{LINE}\n{LINE}\n\n \n".encode(), 2),
        (f"\ufeff{LINE}\n".encode(), 1),
        (f"{LINE}\r\n{LINE}\r\n".encode(), 2),
        ('{"question": "one\u2028line", "answer": "a"}\n'.encode(), 1),
        ('{"question": "one\x85line", "answer": "a\x0b"}\n'.encode().replace(b"\x0b", b""), 1),
    ],
)
def test_lines_end_with_a_line_feed_alone(tmp_path, content, count):
    assert len(read_rows(written(tmp_path, content))) == count


def test_a_blank_line_does_not_shift_the_numbers(tmp_path):
    file = written(tmp_path, f"\n{LINE}\n\n{LINE}".encode())
    assert [number for number, _ in numbered_rows(file)] == [2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caf\xe9".encode("latin-1"), r"data.jsonl: not UTF-8 at byte 3 \(0xe9\)"),
        (b"PAR1\x15\x04", "data.jsonl: is a parquet file; text in UTF-8"),
        (b"\x1f\x8b\x08\x00", "data.jsonl: is gzipped"),
        (b"", "data.jsonl: has no items"),
        (b"[1]\n", "data.jsonl:1: expected an object, found list"),
        (b'{"a": }\n', "data.jsonl:1: not JSON"),
        (b"[" * 100_000, "data.jsonl:1: is nested too deeply"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_rows(written(tmp_path, content))


def test_a_folder_where_a_file_is_expected_is_named(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        read_text(tmp_path)


ITEM = {"question": "q", "n": 3, "none": None, "messages": [{"content": "hi"}]}


def test_templates_take_fields_indices_formats_and_braces(tmp_path):
    file = tmp_path / "x"
    assert fill_template("{question} {n:03d} {{x}}", ITEM, file, 1) == "q 003 {x}"
    assert fill_template("{messages[0][content]}", ITEM, file, 1) == "hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{messages[1][content]}", r"x:6: .* needs messages\[1\]\[content\]; .* with 1 entry"),
        ("{messages}", "x:6: messages is a list, not text"),
        ("{none}", "x:6: none is null, not text"),
        ("{question:d}", "x:6: {question:d}: Unknown format code"),
        ("{messages[x]}", "x:6: the template needs"),
        ("{question[a]}", "x:6: the template needs"),
    ],
)
def test_an_item_without_a_template_field_is_named(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        fill_template(template, ITEM, tmp_path / "x", 6)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (r" \boxed{}{answer}", "has an empty {}; write {{}} for braces"),
        ("{answer", "not a template"),
        ("{answer.__class__}", "allowed are"),
        ("{answer!r}", "allowed are"),
        ("{answer:>99999999999}", "at most three digits of width"),
        ("{a:{b}}", "at most three digits"),
    ],
)
def test_an_invalid_template_is_refused_with_the_recipe(template, message):
    assert message in (template_fault(template) or "")
    with pytest.raises(UserError, match="task"):
        small_recipe(f"task.answer='{template}'")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("#### 1,234", "#### 1234", True),
        ("#### 1,2", "#### 12", False),
        ("#### (1,2)", "#### (12)", False),
        ("#### 18.0", "#### 18", True),
        ("#### $18", "#### 18", True),
        ("#### 18.", "#### 18", True),
        ("#### -$1,000.50", "#### -1000.5", True),
        ("#### 1,23,4", "#### 1234", False),
        ("#### Yes.", "#### Yes", False),
    ],
)
def test_final_answers_are_compared_as_the_named_sets_do(answer, expected, right):
    task = Problems(kind="problems", train="a", test="b", final="####")
    assert is_right(task, answer, Item([], [], expected)) is right


def test_gsm8k_is_scored_as_lm_eval_does():
    task = Dataset(kind="dataset", name="gsm8k")
    item = Item([], [], "18", "gsm8k", "mark")
    assert is_right(task, "so\n#### 18.", item) and not is_right(task, "so\n#### 18.0", item)


@pytest.mark.parametrize(
    ("answer", "number"), [("1/2", 0.5), ("-3", -3), ("3:4", None), ("12 apples", None), ("", None)]
)
def test_only_numbers_and_fractions_are_parsed_as_numbers(answer, number):
    assert parse_number(plain_number(answer)) == number


def test_a_test_row_whose_answer_is_no_number_is_refused(tmp_path):
    folder = tmp_path / "mawps"
    folder.mkdir()
    row = '{"instruction": "how many?", "output": "", "answer": "%s"}'
    (folder / "test.jsonl").write_text("\n".join(row % a for a in ("3", "1/2", "12 apples")))
    task = Dataset(kind="dataset", name="math_10k", test_sets=("mawps",))
    with pytest.raises(UserError, match="item 3: not a row of mawps: its answer '12 apples'"):
        list(records(task, "test", tmp_path, "recipe"))


def test_a_text_of_one_line_is_split_at_a_word(tmp_path):
    from conftest import TINY
    from sqft_export.data.items import load_tokenizer

    file = written(tmp_path, ("Tom has 3 pens and 4 more. " * 200).encode(), "one.txt")
    recipe = small_recipe(f"task={{kind: text, text: {file}, sequence_length: 32}}")
    data = Data(recipe, load_tokenizer(TINY))
    assert len(data.train) > len(data.test) > 0


def test_the_choices_of_a_sentence_are_its_options(tmp_path):
    folder = tmp_path / "winogrande"
    folder.mkdir()
    (folder / "test.json").write_text(
        '[{"sentence": "Ann beat Bea because _ trained.", "option1": "Ann", "option2": "Bea",'
        ' "answer": "1"}]'
    )
    task = Dataset(kind="dataset", name="winogrande")
    ((_, _, record),) = records(task, "test", tmp_path, "recipe")
    assert record.labels[record.right] == record.final == "Ann"
