"""Records of a file of problems are read once per process, and again if the file changes."""

import json
import os
import time

import pytest

from conftest import small_recipe
from sqft_export.data import problems
from sqft_export.data.problems import problem_records
from sqft_export.errors import UserError


def write_problem(file, question: str, seconds_ago: float) -> None:
    file.write_text(json.dumps({"question": question, "answer": "#### 1"}) + "\n")
    then = time.time() - seconds_ago
    os.utime(file, (then, then))


def prompts(file, *settings: str) -> list[str]:
    return [record.prompt for record in problem_records(small_recipe(*settings).task, file)]


@pytest.fixture
def reads(monkeypatch) -> list:
    """Files that are read from now on."""
    found, really = [], problems.numbered_rows

    def counted(file):
        found.append(file)
        return really(file)

    monkeypatch.setattr(problems, "numbered_rows", counted)
    return found


def test_a_file_is_read_once_for_each_template(tmp_path, reads):
    file = tmp_path / "train.jsonl"
    write_problem(file, "one", 60)
    assert prompts(file) == prompts(file) == ["Question: one\nAnswer:"]
    assert len(reads) == 1
    assert prompts(file, "task.prompt='Q: {question}'") == ["Q: one"]
    assert len(reads) == 2


def test_a_changed_file_is_read_again(tmp_path, reads):
    file = tmp_path / "train.jsonl"
    for question, age in (("one", 60), ("two", 50), ("six", 50), ("longer", 0)):
        file.unlink(missing_ok=True)
        write_problem(file, question, age)
        assert prompts(file) == [f"Question: {question}\nAnswer:"]
    write_problem(file, "again!", 0)  # within one tick: the same size and perhaps the same mtime
    assert prompts(file) == ["Question: again!\nAnswer:"]


def test_a_large_file_is_not_kept_in_memory(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(problems, "_MAX_CACHED_BYTES", 10)
    write_problem(tmp_path / "a", "one", 60)
    assert prompts(tmp_path / "a") == prompts(tmp_path / "a") and len(reads) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        prompts(tmp_path / "none.jsonl")
