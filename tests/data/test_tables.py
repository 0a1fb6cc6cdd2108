"""Rows of every file type, and one message where a file is none."""

import gzip
import json

import datasets
import pytest

from sqft_export.data.columns import conversation_of
from sqft_export.data.tables import Table
from sqft_export.errors import UserError

MESSAGES = [
    [{"role": "user", "content": 'Hi,\n"there"'}, {"role": "assistant", "content": "Hello"}],
    [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "\u4f60\u597d"}],
]
ROWS = [{"messages": messages} for messages in MESSAGES]
CALLED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two"},
]


def rows_of(path, **options) -> list[tuple[int, dict]]:
    return list(Table(str(path), **options).rows())


def written(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_and_lists_of_json(tmp_path):
    lines = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    assert rows_of(written(tmp_path, "a.jsonl", lines)) == [(1, ROWS[0]), (3, ROWS[1])]
    assert rows_of(written(tmp_path, "b.jsonl", "\ufeff" + lines))[0] == (1, ROWS[0])
    assert rows_of(written(tmp_path, "c.json", json.dumps(ROWS))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_separated_values_stay_text(tmp_path):
    text = 'prompt,completion\nHi,007\n\n"two\nlines, ""quoted""",NA\nlast,\n'
    expected = [
        (2, {"prompt": "Hi", "completion": "007"}),
        (4, {"prompt": 'two\nlines, "quoted"', "completion": "NA"}),
        (6, {"prompt": "last", "completion": ""}),
    ]
    path = written(tmp_path, "a.csv", text)
    assert rows_of(path) == expected
    assert rows_of(written(tmp_path, "b.tsv", "prompt\tanswer\nHi\ta, b\n")) == [
        (2, {"prompt": "Hi", "answer": "a, b"})
    ]
    semicolons = written(tmp_path, "c.csv", "prompt;answer\nHi;1,5\n")
    assert rows_of(semicolons) == [(2, {"prompt": "Hi", "answer": "1,5"})]
    long = "x" * 200_000
    assert rows_of(written(tmp_path, "d.csv", f"prompt,answer\n{long},y\n"))[0][1]["prompt"] == long


def test_the_line_of_a_row_counts_lines_within_fields(tmp_path):
    path = written(tmp_path, "a.csv", 'prompt,answer\n"a\nb\nc",d\ne,f\n')
    assert [number for number, _ in rows_of(path)] == [2, 5]


def test_parquet_and_saved_folders_have_no_null_fields(tmp_path):
    """Arrow gives every message the fields of all."""
    table = datasets.Dataset.from_list([*ROWS, {"messages": CALLED}])
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "splits"))
    expected = [(1, ROWS[0]), (2, ROWS[1]), (3, {"messages": CALLED})]
    assert rows_of(tmp_path / "a.parquet") == expected
    assert rows_of(tmp_path / "saved") == expected
    assert rows_of(tmp_path / "splits") == expected
    assert rows_of(tmp_path / "splits", split="test") == expected[:1]
    row = rows_of(tmp_path / "a.parquet")[2][1]
    assert "tool_calls" not in conversation_of(row, "x").messages[0]


def test_rows_are_read_one_after_the_other(tmp_path):
    """A fault far down does not keep the first rows from being read."""
    path = written(tmp_path, "a.jsonl", '{"prompt": "a", "answer": "b"}\n' * 3 + "{\n")
    rows = Table(str(path)).rows()
    assert [next(rows)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"a\.jsonl:4: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", r"a\.jsonl: has no rows"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected an object, found list"),
        ("a.jsonl", b"{}\n\xff\xfe\n", r"not UTF-8 after line \d \(0xff\); save it as UTF-8"),
        ("a.json", "{", r"a\.json:1: not JSON"),
        ("a.csv", "prompt,answer\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "prompt,answer\na\n", r"a\.csv:2: found 1 fields; the header has 2: prompt, ans"),
        ("a.csv", "prompt,prompt\na,b\n", r"a\.csv:1: the header has twice prompt"),
        ("a.csv", "prompt,\na,b\n", "a column without a name"),
        ("a.csv", 'prompt,answer\n"a,b\n', r"a\.csv:2: unexpected end of data"),
        ("a.parquet", "prompt", r"a\.parquet: not Parquet after row 0"),
        ("a.xlsx", "x", r"file type \.xlsx; known are \.jsonl"),
        ("a.pkl", b"\x80\x04.", r"file type \.pkl"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        rows_of(written(tmp_path, name, content))


def test_missing_files_folders_and_splits_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: can't be read: No such file"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="not a folder of save_to_disk"):
        rows_of(tmp_path)
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="found no split test; it has train"):
        rows_of(tmp_path / "d", split="test")


def test_a_name_that_the_hub_does_not_give_is_told():
    with pytest.raises(UserError, match=r"hub:nobody/nothing: can't be read .*a local file needs"):
        list(Table("hub:nobody/nothing").rows())


def test_compressed_text_files_are_read_like_plain_ones(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    packed = written(tmp_path, "a.jsonl.gz", gzip.compress(("\ufeff" + lines).encode()))
    assert rows_of(packed) == [(1, ROWS[0]), (2, ROWS[1])]
    table = written(tmp_path, "b.CSV.GZ", gzip.compress(b"prompt,answer\r\nHi,there\r\n"))
    assert rows_of(table) == [(2, {"prompt": "Hi", "answer": "there"})]
    cut = written(tmp_path, "c.jsonl.gz", gzip.compress(lines.encode())[:-20])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz: damaged after line \d"):
        rows_of(cut)
    with pytest.raises(UserError, match=r"d\.csv\.gz: damaged after line 0: Not a gzipped file"):
        rows_of(written(tmp_path, "d.csv.gz", "prompt,answer\n"))
    with pytest.raises(UserError, match=r"file type \.json\.gz; known are .*\.jsonl\.gz"):
        rows_of(written(tmp_path, "e.json.gz", gzip.compress(b"[]")))
