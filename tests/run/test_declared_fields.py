"""Keys follow from what passes read: the fields they declare, the base, the data, the machine."""

import itertools
import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from conftest import TINY, small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.data.calibration import calibration_samples
from sqft_export.data.items import Data, load_tokenizer, sample_texts
from sqft_export.data.scoring import Answers, judge, questions
from sqft_export.errors import DamagedError
from sqft_export.machine import precision
from sqft_export.recipe.passes import pass_names
from sqft_export.recipe.schema import TASK_KINDS, Recipe, Section, UndeclaredFieldError
from sqft_export.recipe.view import values_of, view_of
from sqft_export.report.provenance import model_card, origin_of
from sqft_export.run.pipeline import plan_passes
from sqft_export.stages import stage_of

EVERYTHING = (
    "sparsify.reconstruct={}",
    "adapt.distill={teacher: dense-lora}",
    "calibration.revision=abc",
    "search={strategy: hill-climb, budget: 2, items: 4}",
)
TASKS = {
    "problems": (),
    "text": ("task={kind: text, text: train.jsonl}",),
    "dataset": ("task={kind: dataset, name: gsm8k}",),
    "chat": ("task={kind: chat, train: train.jsonl}",),
}


def keys_of(recipe: Recipe, model: Path = TINY, root: Path = Path("nowhere")) -> dict[str, str]:
    return {step.name: step.key for step in plan_passes(recipe, model, Store(root))}


def changed(*overrides: str, before: tuple[str, ...] = ()) -> set[str]:
    """Passes that settings on top of others make again."""
    one, other = (keys_of(small_recipe(*before, *more)) for more in ((), overrides))
    return {name for name in one | other if one.get(name) != other.get(name)}


def kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from kinds(part)
    elif annotation is not type(None):
        yield annotation


def leaves(section: Section, path: str = "") -> Iterator[str]:
    """Path of every field of a recipe's sections, of those too that it does without."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{path}{name}.")
        elif not any(isinstance(k, type) and issubclass(k, BaseModel) for k in kinds(field)):
            yield f"{path}{name}"


def another(section: type[Section], name: str, value: Any) -> Any:
    """A value that a field does not have; one that it may have where words choose a method."""
    for kind in kinds(section.model_fields[name].annotation):
        if get_origin(kind) is Literal and len(get_args(kind)) > 1:
            return next(word for word in get_args(kind) if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (*value, "another") if isinstance(value, tuple) else f"{value}, another"


def with_another(section: Section, path: list[str]) -> Any:
    name, *rest = path
    value = getattr(section, name)
    new = with_another(value, rest) if rest else another(type(section), name, value)
    return section.model_copy(update={name: new})


def declares(recipe: Recipe, name: str, path: str) -> bool:
    """Whether a pass declares a field: itself, a section around it, or by a combined one."""
    other = with_another(recipe, path.split("."))
    declared = {*stage_of(name).fields(recipe, name), *stage_of(name).fields(other, name)}
    within = any(path == d or path.startswith(f"{d}.") for d in declared)
    combined = [d for d in declared if d.split(".")[0] not in Recipe.model_fields]
    return within or values_of(recipe, combined) != values_of(other, combined)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of values that only differ
@pytest.mark.parametrize("kind", TASKS)
def test_a_key_has_exactly_the_fields_that_its_pass_declares(kind):
    recipe = small_recipe(*EVERYTHING, *TASKS[kind])
    for path in leaves(recipe):
        other = with_another(recipe, path.split("."))
        for name in pass_names(recipe):
            stage = stage_of(name)
            one, two = (values_of(r, stage.fields(r, name)) for r in (recipe, other))
            assert (one != two) == declares(recipe, name, path), f"{name}: {path}"


def test_declared_fields_are_fields_of_a_recipe():
    """A name that is misspelt would be in a key as nothing."""
    recipes = [small_recipe(*EVERYTHING, *settings) for settings in TASKS.values()]
    known = {path for recipe in recipes for path in leaves(recipe)}
    known |= {path.rsplit(".", 1)[0] for path in known} | set(Recipe.model_fields)
    known |= {f"task.{f}" for kind in TASK_KINDS.values() for f in kind.model_fields}
    for recipe, name in itertools.product(recipes, pass_names(recipes[0])):
        stage = stage_of(name)
        for path in (*stage.fields(recipe, name), *stage.FREE):
            assert path in known or hasattr(recipe, path), path


@pytest.mark.parametrize("kind", TASKS)
def test_a_view_has_what_is_declared_and_raises_on_any_other_field(kind):
    recipe = small_recipe(*EVERYTHING, *TASKS[kind])
    for path in leaves(recipe):
        section, _, name = path.rpartition(".")
        view: Any = view_of(recipe, [path])
        for part in filter(None, section.split(".")):
            view = getattr(view, part)
        assert getattr(view, name) == values(recipe, path)
        for other in type(view).model_fields:
            if other != name:
                with pytest.raises(UndeclaredFieldError, match=other):
                    getattr(view, other)


def values(found: Any, path: str) -> Any:
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_combined_fields_are_held_by_a_view_or_worked_out_from_what_it_has():
    recipe = small_recipe("quantize.symmetric=false")
    for name in ("scale_bits", "unmerged", "dense_update", "set_aside", "base_name"):
        assert getattr(view_of(recipe, [name]), name) == getattr(recipe, name)
        with pytest.raises(UndeclaredFieldError):
            getattr(view_of(recipe, ["seed"]), name)
    assert view_of(recipe, ["quantize", "export.targets"]).scale_bits == recipe.scale_bits
    # A symmetric grid has no zero points, whoever reads it.
    assert view_of(small_recipe(), ["quantize.symmetric"]).scale_bits == small_recipe().scale_bits


DEPLOYED = {"export-openvino", "export-onnx", "export-gguf"}


@pytest.mark.parametrize(
    ("before", "override", "made_again"),
    [
        ((), "adapt.save_steps=7", set()),
        ((), "task.max_new_tokens=9", {"benchmark"}),
        ((), "task.final=null", {"benchmark"}),
        ((), "search.budget=9", set()),
        ((), "search.items=9", set()),
        ((), "quantize.group_size_fallback=error", set()),
        ((), "export.onnx_graph=standard", {"export-onnx", "verify", "benchmark"}),
        ((), "export.sparse_execution=false", {"export-openvino", "verify", "benchmark"}),
        ((), "export.entropy=true", {*DEPLOYED, "verify", "benchmark"}),
        ((), "benchmark.threads=1", {"benchmark"}),
        (
            ("adapt=none", "quantize.method=rtn", "sparsify.method=magnitude"),
            "calibration.samples=9",
            set(),
        ),
    ],
)
def test_what_a_setting_can_not_change_is_not_made_again(before, override, made_again):
    assert changed(override, before=before) == {*made_again, "report"}


def test_candidates_are_scored_again_with_another_budget():
    before = ("search={strategy: hill-climb, budget: 2, items: 4}",)
    assert "search" in changed("search.budget=3", before=before)
    assert "adapt" not in changed("search.budget=3", before=before)
    assert "search" in changed("task.max_new_tokens=9", before=before)


def test_another_target_is_no_reason_to_quantize_again():
    """But for an asymmetric grid, whose scales have fewer bits where GGUF holds their products."""
    assert changed("export.targets=[openvino, onnx]") == {
        "export-gguf",
        "peers-grid",  # written for other runtimes
        "peers-gguf",
        "peers-nncf",  # in place of llama.cpp's file
        "verify",
        "benchmark",
        "report",
    }
    asymmetric = ("quantize.symmetric=false",)
    assert "quantize" in changed("export.targets=[openvino, onnx]", before=asymmetric)


def test_the_device_is_in_the_key_of_all_that_computes_on_it(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert changed("device=cpu") == {"report"}, "auto is the CPU here"
    found = changed("device=cuda", before=("sparsify.reconstruct={}",))
    assert found >= {"sparsify", "reconstruct", "quantize", "adapt", "search", "benchmark"}
    untrained = ("adapt=none", "quantize.method=none", "sparsify={method: none}")
    assert changed("device=cuda", before=untrained) == {"verify", "benchmark", "report"}


def test_the_number_of_processes_is_in_the_key_of_what_they_train(monkeypatch):
    before = keys_of(small_recipe())
    monkeypatch.setenv("WORLD_SIZE", "8")
    after = keys_of(small_recipe())
    assert {name for name in before if before[name] == after[name]} == {
        "sparsify",
        "quantize",
        "baselines",
    }
    assert before["adapt"] != after["adapt"]
    assert before["teacher"] != after["teacher"]


def test_auto_precision_is_decided_once_for_a_run(tmp_path, monkeypatch):
    """Another process, or a resume on a busier machine, that measures otherwise, takes the same."""
    recipe = small_recipe("adapt.precision=auto")
    answers = iter([torch.bfloat16, torch.float32, torch.float32])
    monkeypatch.setattr(precision, "training_dtype", lambda *_: next(answers))
    first = precision.resolve_precision(recipe, tmp_path)
    again = precision.resolve_precision(recipe, tmp_path)
    assert first.training.precision == again.training.precision == "bfloat16"
    assert first.file == recipe.file
    one = {step.name: step for step in plan_passes(recipe, TINY, Store(tmp_path))}
    assert one["adapt"].facts["options"]["adapt.precision"] == "bfloat16"
    assert one["benchmark"].facts["reads"]["precision"] == "bfloat16"
    assert next(answers) == torch.float32, "measured once"


def test_a_plan_records_nothing_where_there_is_no_run(tmp_path):
    recipe = small_recipe("adapt.precision=auto")
    precision.resolve_precision(recipe, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_record_of_another_precision_is_named(tmp_path):
    (tmp_path / "cpu-precision.json").write_text('{"precision": "int3"}')
    with pytest.raises(DamagedError, match=r"cpu-precision.json is damaged.*found 'int3'"):
        precision.resolve_precision(small_recipe("adapt.precision=auto", "device=cpu"), tmp_path)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The embedded model, one with another weight, and one with another byte of its tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    one, weight, tokenizer = (
        Path(shutil.copytree(TINY, root / name / "model"))
        for name in ("one", "weight", "tokenizer")
    )
    tensors = load_file(weight / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weight / "model.safetensors", {"format": "pt"})
    file = tokenizer / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    return one, weight, tokenizer


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_another_base_is_another_model_whatever_passes_there_are(bases, pruned, quantized, trained):
    pipeline = "qa-sparsepeft" if quantized else "sparsepeft"
    recipe = small_recipe(
        *([] if pruned else ["sparsify={method: none}"]),
        *([] if quantized else ["quantize.method=none"]),
        *([f"adapt.pipeline={pipeline}"] if trained else ["adapt=none"]),
    )
    one, *others = (keys_of(recipe, base) for base in bases)
    for other in others:
        for name in ("merge", *DEPLOYED, "verify", "benchmark"):
            assert one[name] != other[name], name


@pytest.fixture(scope="module")
def folder_of_gsm8k(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"How much is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(20)]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder.parent


@pytest.mark.parametrize("search", ["median", "hill-climb"])
@pytest.mark.parametrize("kind", ["problems", "text", "dataset"])
def test_data_of_every_kind_is_read_under_the_views_of_passes(kind, search, folder_of_gsm8k):
    """A field that is read and not declared would raise, hours into a run."""
    task = {
        "problems": (),
        "text": (f"task={{kind: text, text: {TINY / 'train.jsonl'}, sequence_length: 64}}",),
        "dataset": (f"task={{kind: dataset, name: gsm8k, folder: {folder_of_gsm8k}}}",),
    }[kind]
    settings = ("calibration.samples=2", "search.items=4", f"search.strategy={search}")
    recipe, tokenizer = small_recipe(*task, *settings), load_tokenizer(TINY)

    def view(name: str) -> Recipe:
        return view_of(recipe, (*stage_of(name).fields(recipe, name), *stage_of(name).FREE))

    for name in ("sparsify", "quantize"):
        assert len(calibration_samples(view(name), tokenizer)) == 2
    for name in ("adapt", "teacher"):
        assert list(Data(view(name), tokenizer).train) == list(Data(recipe, tokenizer).train)
    data = Data(view("search"), tokenizer)
    assert len(data.validation) == (4 if search == "hill-climb" else 0)
    if search == "hill-climb":
        questions(view("search"), data.validation, [1])
    test = Data(view("benchmark"), tokenizer).test
    assert test == Data(view("verify"), tokenizer).test
    answers = [tokenizer(item.text)["input_ids"] for item in test if item.text is not None]
    questions(view("benchmark"), test, [1])
    judge(view("benchmark"), test, Answers(answers=answers), tokenizer)
    assert sample_texts(view("verify"), 2) == sample_texts(recipe, 2)
    for name in ("merge", "export-openvino"):
        origin = origin_of(view(name), TINY, {name: {"reads": {}, "version": 1, "options": {}}})
        assert recipe.name in model_card(view(name), origin, 0.5, "")


def test_a_run_of_every_pass_reads_what_it_declares_alone(tiny_run):
    """The fixture ran all passes under views; their facts are those of their declarations."""
    for name, artifact in tiny_run.items():
        facts = json.loads((artifact.path / "manifest.json").read_text())["facts"]
        assert facts["options"].keys() == set(stage_of(name).fields(small_recipe(), name))
        assert facts["reads"].keys() == set(stage_of(name).READS)
