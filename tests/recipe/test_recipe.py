from pathlib import Path

import pytest

from sqft_export.errors import UserError
from sqft_export.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsify.sparsity=1.5", r"sparsify.sparsity: found 1.5; input should be less than 1"),
        ("quantize.bits=5", r"quantize.bits: found 5; input should be 2, 3, 4 or 8"),
        ("quantize={method: nncf, bits: 3}", r"bits: found 3; NNCF has 4 and 8"),
        ("benchmark={items: 5, minutes: 3}", r"benchmark: give either items or minutes"),
        ("device=gpu", r"device: found 'gpu'"),
        ("adapt.rnaks=[8]", r"adapt.rnaks: unknown key; allowed are .*; did you mean ranks\?"),
        ("quantize.method=gpqt", r"quantize.method: found 'gpqt'.*did you mean gptq\?"),
        ("task.promt=x", r"task.promt: unknown key; .*did you mean prompt\?"),
        ("adapt.ranks=[8, a]", r"adapt.ranks.1: found 'a'"),
        ("adapt.ranks=[8, 8]", r"ranks must be positive and different, found \[8, 8\]"),
        ("adapt.epochs=3", r"adapt: give either epochs or steps"),
        ("adapt.elastic_groups=[[o_proj]]", r"elastic_groups name \['o_proj'\]"),
        ("sparsify.pattern='2:4'", r"sparsify: give either sparsity or pattern"),
        ("sparsify.at_most=[24, 64]", r"which keeps 38% at most; sparsity 0.5 keeps 50%"),
        ("sparsify.at_most=[64, 64]", r"at least 1 is kept and 1 dropped"),
        ("adapt.pipeline=sparsepeft", r"sparsepeft does not go with quantize.method gptq"),
        ("export.targets=[tflite]", r"export.targets.0: found 'tflite'"),
        ("nonsense", r"expected path=value"),
        ("name.x=1", r"name is a value, not a section"),
    ],
)
def test_a_fault_is_told_with_its_place_and_the_way_out(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(TINY, (override,))


def test_every_fault_is_told_at_once():
    with pytest.raises(UserError) as caught:
        load_recipe(TINY, ("sparsify.sparsity=2", "quantize.bits=5", "typo=1"))
    assert len(str(caught.value).splitlines()) == 3
    assert all(line.startswith(str(TINY)) for line in str(caught.value).splitlines())


def test_yaml_is_1_2(tmp_path):
    text = TINY.read_text().replace("sparsity: 0.5", "pattern: 2:4")
    text = text.replace("learning_rate: 2e-3", "learning_rate: 1e-4")
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.sparsify.n_of_m() == (2, 4)
    assert recipe.adapt.learning_rate == 1e-4


def test_broken_yaml_names_the_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("name: [tiny\nseed: 1")
    with pytest.raises(UserError, match=r"broken.yaml: not valid YAML.*line 2"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(
        UserError,
        match=r"recipes there: bloom, gemma4-e2b, lfm2-1\.2b, llama3, llama3\.2-1b, mistral, opt, "
        r"phi3, qwen2\.5, qwen3\.5-0\.8b, smollm2, stories, tiny",
    ):
        load_recipe(ROOT / "recipes" / "nope.yaml")


def test_paths_are_relative_to_the_recipe():
    recipe = load_recipe(ROOT / "recipes" / "mistral.yaml")
    assert recipe.resolve("../data/x") == ROOT / "data" / "x"
    assert recipe.resolve("builtin:tiny") == ROOT / "sqft_export" / "builtin" / "tiny"


def test_training_can_be_left_out(tmp_path):
    text = (ROOT / "recipes" / "tiny.yaml").read_text()
    before, section, after = text.partition("adapt:\n")
    rest = after[after.index("search:") :]
    for words in ("adapt: none\n", ""):
        (tmp_path / "untrained.yaml").write_text(before + words + rest)
        assert load_recipe(tmp_path / "untrained.yaml").adapt is None
    (tmp_path / "untrained.yaml").write_text(before + section + rest)
    with pytest.raises(UserError, match="adapt: found None; is empty; none, or no such section"):
        load_recipe(tmp_path / "untrained.yaml")
