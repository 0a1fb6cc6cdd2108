"""A ``tokenizer.json`` with values of wrong kinds: one message, where llama.cpp's is made of it."""

import json
import shutil

import pytest

from conftest import TINY
from sqft_export.errors import UserError
from sqft_export.targets.gguf.tokenizer import NotExpressible, read_vocabulary


@pytest.fixture
def tokenizer(tmp_path):
    """A copy of the embedded tokenizer, and what is in it."""
    file = shutil.copy(TINY / "tokenizer.json", tmp_path / "tokenizer.json")
    return file, json.loads(file.read_text())


def first_of(document, *path):
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda d: d["model"]["vocab"].update(a="text"),
            r"model.vocab: found 'a': 'text'; a token",
        ),
        (lambda d: d["model"]["vocab"].update(a=-1), "model.vocab: found 'a': -1"),
        (lambda d: d["model"]["vocab"].update(a=2**70), "a token and its id are expected"),
        (lambda d: d["model"]["merges"].insert(0, [["a"], "b"]), r"model.merges: 0: found"),
        (lambda d: d["model"]["merges"].insert(0, 5), "two tokens are expected"),
        (lambda d: d["added_tokens"].append({"content": "x", "id": "7"}), "added_tokens: found"),
        (lambda d: d["added_tokens"].append(5), "expected a list of objects"),
        (lambda d: d.update(model=[]), "model: expected its type and vocabulary"),
        (lambda d: d.pop("added_tokens"), "added_tokens"),
        (
            lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 5}),
            "pre_tokenizer",
        ),
        (lambda d: d.update(normalizer="NFC"), "normalizer: expected steps"),
        (lambda d: d["model"].update(merges={}), "merges, a list"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named(tokenizer, change, fault):
    file, document = tokenizer
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=fault) as refused:
        read_vocabulary(file.parent, 416)
    assert "tokenizer.json" in str(refused.value) and "\n" not in str(refused.value)


def test_any_value_of_a_wrong_kind_is_one_message(tokenizer):
    """Every section is replaced by values that it can't have, one at a time."""
    file, document = tokenizer
    for path in (
        ("model",),
        ("model", "vocab"),
        ("pre_tokenizer",),
        ("normalizer",),
        ("added_tokens",),
    ):
        for value in (None, True, 3, "x", [], [[]], {}, {"type": 5}, {"type": "Split"}):
            changed = json.loads(json.dumps(document))
            first_of(changed, *path[:-1])[path[-1]] = value
            file.write_text(json.dumps(changed))
            try:
                read_vocabulary(file.parent, 416)
            except (UserError, NotExpressible) as error:
                assert 0 < len(str(error)) < 1000
