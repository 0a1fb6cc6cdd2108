"""Settings of the command line reach their field as a user types them."""

import pytest

from conftest import ROOT
from sqft_export.errors import UserError
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.overrides import split_values

TINY = ROOT / "recipes" / "tiny.yaml"
DATASET = "task={kind: dataset, name: gsm8k}"


def loaded(*overrides: str):
    return load_recipe(TINY, overrides)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("{instruction}", "{instruction}"),
        ("{instruction} {input}", "{instruction} {input}"),
        ("Question: {question}", "Question: {question}"),
        ("No. {number} # {name}", "No. {number} # {name}"),
        ("42", "42"),
        ("null", "null"),
        ("- {a}", "- {a}"),
        ('"{a}\\n{b}"', "{a}\n{b}"),
        ("'{a} {b}'", "{a} {b}"),
        ('"{a}" or "{b}"', '"{a}" or "{b}"'),
    ],
)
def test_a_text_field_takes_what_is_typed(typed, meant):
    assert loaded(f"task.prompt={typed}").task.prompt == meant


def test_null_stays_null_where_a_field_may_be_empty():
    assert loaded("task.final=null").task.final is None
    assert loaded("task.final=####").task.final == "####"
    assert loaded("sparsify={method: wanda}", "sparsify.pattern=2:4").sparsify.pattern == "2:4"
    assert loaded("benchmark.lm_eval_folder=~").benchmark.lm_eval_folder is None
    assert loaded(DATASET, "task.folder=007").task.folder == "007"


def test_other_fields_are_read_as_yaml():
    recipe = loaded("adapt.ranks=[8, 4]", "quantize.symmetric=false", "adapt.learning_rate=1e-4")
    assert recipe.training.ranks == (8, 4)
    assert recipe.quantize.symmetric is False and recipe.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("sparsify.method=none", {"method": "none"}),
        ("sparsify.method=existing", {"method": "existing"}),
        ("sparsify.method=magnitude", {"method": "magnitude", "sparsity": 0.5}),
    ],
)
def test_a_method_without_amounts_drops_those_of_the_file(setting, kept):
    assert (
        loaded(setting).sparsify.model_dump(exclude_defaults=True) | {"method": kept["method"]}
        == kept
    )


def test_a_quantizer_drops_the_settings_of_another():
    recipe = load_recipe(ROOT / "recipes" / "smollm2.yaml", ("quantize.method=none", "adapt=none"))
    assert recipe.quantize.embedding_bits is None
    assert loaded("quantize={method: nncf, nncf: {awq: false}}", "quantize.method=gptq")


def test_an_amount_that_is_typed_with_such_a_method_is_refused():
    with pytest.raises(UserError, match="method none takes no amounts; leave out sparsity"):
        loaded("sparsify.method=none", "sparsify.sparsity=0.5")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.3,0.5", ["0.3", "0.5"]),
        ("[32,16],[16,8]", ["[32,16]", "[16,8]"]),
        (
            "{method: wanda, sparsity: 0.5},{method: none}",
            ["{method: wanda, sparsity: 0.5}", "{method: none}"],
        ),
        ('"a, b",c', ['"a, b"', "c"]),
        ("[[q, k], [v]],null", ["[[q, k], [v]]", "null"]),
        ("it's,its", ["it's", "its"]),
        ("a,", ["a", ""]),
    ],
)
def test_values_are_split_at_top_level_commas(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("task={kind: text}",), r"tiny.yaml: task\.text: is missing"),
        (("text=3",), r"tiny.yaml: text: unknown key; allowed are .*task"),
        (("problems.x=3",), r"tiny.yaml: problems: unknown key"),
        (("task={kind: dataset}",), r"tiny.yaml: task\.name: is missing"),
        (
            ("task.template=alpaca",),
            r"task\.template: unknown key; .*kinds dataset and chat have",
        ),
        (("task={kind: text, text: 3}",), r"task\.text: found 3; input should be a valid string"),
    ],
)
def test_a_message_names_the_key_that_is_wrong(settings, message):
    with pytest.raises(UserError, match=message):
        loaded(*settings)
