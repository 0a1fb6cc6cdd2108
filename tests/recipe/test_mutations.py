"""Whatever a recipe file holds: a plan, or one message on a screen, at once."""

import random
import time

import pytest

from conftest import ROOT
from sqft_export.errors import UserError
from sqft_export.recipe.load import LARGEST_BYTES, load_recipe
from sqft_export.recipe.schema import Recipe

TINY = (ROOT / "recipes" / "tiny.yaml").read_text()
SCREEN = 4000  # characters
PIECES = [
    *(
        "\x00",
        "\xe9",
        "\ud7ff",
        "{",
        "}",
        "[",
        "]",
        ":",
        "- ",
        "&a ",
        "*a",
        "!!python/object:os ",
        "|",
    ),
    *(
        "|",
        "!!bool abc",
        "2001-99-99",
        "'\\x00'",
        '"\\UFFFFFFFF"',
        "1e999",
        ".nan",
        ".inf",
        "9" * 400,
    ),
    *("null", "true", "-1", "0", "1e30", "~", "<<", "? ", "%YAML 9.9\n", "---\n", "...\n", "\t"),
    *("[" * 3000, "{a: " * 3000, "a" * 5000, "{question.__class__}", "{x:>99999999}", "$HOME"),
]


def mutated(seed: int) -> bytes:
    rng, text = random.Random(seed), TINY
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text)), rng.choice([0, 0, 1, 5, 40])
        kind = rng.randrange(4)
        if kind == 0:
            piece = rng.choice(PIECES)
        elif kind == 1:
            start = rng.randrange(len(text))
            piece = text[start : start + rng.randint(1, 80)]
        elif kind == 2:
            piece = ""
        else:
            piece = chr(rng.randrange(32, 0x2FF))
        text = text[:at] + piece + text[at + length :]
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        content = content.decode("utf-8", "replace").encode("latin-1", "replace")
    return content


def check(file, content: bytes) -> None:
    file.write_bytes(content)
    started = time.process_time()
    try:
        assert isinstance(load_recipe(file), Recipe)
    except UserError as error:
        text = str(error)
        assert 0 < len(text) < SCREEN and str(file) in text
    assert time.process_time() - started < 30, "one that keeps a reader busy"


def test_mutations_end_in_a_recipe_or_a_message(tmp_path):
    for seed in range(300):
        check(tmp_path / "r.yaml", mutated(seed))


@pytest.mark.slow
def test_ten_thousand_mutations_end_in_a_recipe_or_a_message(tmp_path):
    for seed in range(1000, 11_000):
        check(tmp_path / "r.yaml", mutated(seed))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "holds more than 10000 values, aliases counted"),
        (b"name: \x00", "not valid YAML"),
        (b"name: caf\xe9", r"not UTF-8 at byte 9 \(0xe9\)"),
        (b"a: " + b"[" * 60_000, "nested too deeply"),
        (b"x: 1\n" * LARGEST_BYTES, "a recipe has at most"),
        (b"&a [*a]", "a recipe is a mapping"),
        (b"a: &a {b: *a}", "unknown key|nested too deeply|unresolved|undefined|more than"),
        (b"a: 2001-99-99", "not valid YAML: ValueError"),
        (b"a: !!bool abc", "not valid YAML: KeyError"),
        (b'a: "\\UFFFFFFFF"', "not valid YAML"),
        (b"seed: " + b"9" * 300, "seed: found a number beyond"),
        (b"seed: .inf", "seed: found a number beyond"),
        (b'name: "a\\0b"', "name: holds a character that no text or file name has"),
        (b"name: " + b"a" * 5000, "name: has 5000 characters"),
        (b"1: 2", "recipe|unknown|1"),
        (b"", "a recipe is a mapping, found NoneType"),
    ],
)
def test_what_is_made_to_break_a_reader_is_named(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("setting", ["", "=", "a", "..=1", "adapt=", "adapt.x.y=1", "name=\x00"])
def test_overrides_that_are_none_are_named(setting):
    with pytest.raises(UserError):
        load_recipe(ROOT / "recipes" / "tiny.yaml", (setting,))


def test_what_is_no_file_is_named(tmp_path):
    for name in ("a\x00b", "x" * 5000, ".", "/dev/null"):
        with pytest.raises(UserError):
            load_recipe(tmp_path / name)
