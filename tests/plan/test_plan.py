import importlib.util
from dataclasses import replace

import pytest

from conftest import ROOT, random_model, small_recipe
from sqft_export.data.items import Item, count_examples
from sqft_export.errors import UserError
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.model.hub import model_folder
from sqft_export.plan import disk, memory
from sqft_export.plan.budget import settings_for_a_day
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.disk import check_disk, predict_bytes, state_bytes
from sqft_export.plan.layout import fallback_sizes, layout_of
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.seconds import predict_seconds
from sqft_export.plan.speeds import Speed, Speeds
from sqft_export.plan.workload import Workload, count_item_tokens, workload_of
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.passes import pass_names
from sqft_export.report.text import plan_text
from sqft_export.run import preview
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

CPU = Speed("cpu", {"float32": 1e11, "bfloat16": 1e11}, 1e9)
SLOW = Speed("cpu", {"float32": 1e7, "bfloat16": 1e7}, 1e6)  # a start counts for little there
MACHINE = Speeds(CPU, CPU, CPU, 1e9)
WORK = Workload(examples=None, example=80, test=None, scored=160, prompt=40, answer=40)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model whose down projections have 172 inputs."""
    return random_model(tmp_path_factory.mktemp("odd"))


def test_a_group_size_that_does_not_divide_is_shown_or_refused(odd):
    allowed = small_recipe("quantize.group_size=64", model_path=odd)
    layout = check_recipe(allowed, odd)
    assert fallback_sizes(allowed, layout) == {
        f"model.layers.{block}.mlp.down_proj": 172 for block in range(2)
    }
    refused = small_recipe(
        "quantize.group_size=64", "quantize.group_size_fallback=error", model_path=odd
    )
    with pytest.raises(UserError, match=r"64, which does not divide the 172 inputs of model.lay"):
        check_recipe(refused, odd)


def test_a_pattern_that_does_not_divide_is_refused(odd):
    recipe = small_recipe("sparsify={method: wanda, pattern: '4:8'}", model_path=odd)
    with pytest.raises(UserError, match=r"down_proj has 172 inputs, which 8 does not divide"):
        check_recipe(recipe, odd)


@pytest.mark.parametrize("amount", ["sparsity: 0.5, at_most: [32, 64]", "pattern: '4:8'"])
@pytest.mark.parametrize("instead", ["sparsity: 0.5", "skip: true", "pattern: '2:4'"])
def test_what_an_override_prunes_otherwise_need_not_divide(odd, amount, instead):
    section = f"{{method: wanda, {amount}, overrides: [{{modules: [down_proj], {instead}}}]}}"
    check_recipe(small_recipe(f"sparsify={section}", model_path=odd), odd)


def test_a_pattern_of_an_override_that_does_not_divide_is_refused_by_its_name(odd):
    overrides = "[{modules: [q_proj], skip: true}, {modules: [down_proj], pattern: '4:8'}]"
    section = f"{{method: wanda, sparsity: 0.5, overrides: {overrides}}}"
    with pytest.raises(UserError, match=r"sparsify.overrides.1.pattern: found 4:8, but model"):
        check_recipe(small_recipe(f"sparsify={section}", model_path=odd), odd)


def test_a_target_that_is_not_installed_is_refused_with_what_to_install(odd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "onnxruntime_genai" else find(n)
    )
    with pytest.raises(UserError, match=r"onnx needs onnxruntime_genai.*sqft-export\[onnx\]"):
        check_recipe(small_recipe(model_path=odd), odd)


def test_too_little_disk_is_refused_with_bytes(odd, monkeypatch, tmp_path):
    recipe = small_recipe(model_path=odd)
    layout = check_recipe(recipe, odd)
    monkeypatch.setattr(disk, "disk_bytes", lambda *_: (5 * 2**30, 2**30))
    with pytest.raises(UserError, match=r"5.0 GiB needed in .*, 1.0 GiB free"):
        check_disk(recipe, layout, tmp_path, pass_names(recipe))


def test_too_little_memory_is_refused_with_the_pass_and_bytes(odd, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_memory", lambda: 2**29)
    with pytest.raises(UserError, match=r"memory: \w+ needs \d+\.\d GiB, 512.0 MiB are free"):
        run_recipe(small_recipe(model_path=odd), tmp_path)
    assert not list(tmp_path.glob("sparsify*"))


def test_costs_grow_with_the_work(odd):
    """Twice the samples, steps and answers take longer; a wider group of them needs memory."""
    more = ("calibration.samples=64", "adapt.steps=48", "benchmark.items=64", "verify.prompts=64")
    costs = []
    for settings in ((), more):
        recipe = small_recipe(*settings, model_path=odd)
        layout = layout_of(recipe, odd)
        costs.append(predict_seconds(recipe, layout, MACHINE, WORK))
        memory = predict_memory(recipe, layout, WORK)
        assert memory.keys() == costs[-1].keys() == set(pass_names(recipe))
    for name in ("sparsify", "quantize", "adapt", "benchmark", "verify"):
        assert costs[0][name] < costs[1][name], name


def test_training_through_the_grid_is_foretold_of_quantize(odd):
    plain, grid = (
        small_recipe(f"quantize.reconstruct={steps}", model_path=odd)
        for steps in ("null", "{steps: 100}")
    )
    layout = layout_of(plain, odd)
    for predict in (
        lambda recipe: predict_seconds(recipe, layout, MACHINE, WORK),
        lambda recipe: state_bytes(recipe, layout),
        lambda recipe: predict_memory(recipe, layout, WORK),
    ):
        before, after = predict(plain), predict(grid)
        assert after["quantize"] > before["quantize"]
        assert {n for n in before if after[n] != before[n]} == {"quantize"}


def test_an_accelerator_speeds_up_what_torch_computes_alone(odd):
    """Only the torch part of `verify` uses the device; files and runtimes stay on the CPU."""
    gpu = Speed("cuda", {"float32": 1e15, "bfloat16": 1e15}, 1e15)
    recipe = small_recipe(model_path=odd)
    layout = layout_of(recipe, odd)
    slow, fast = (
        predict_seconds(recipe, layout, Speeds(SLOW, device, SLOW, 1e9), WORK)
        for device in (SLOW, gpu)
    )
    moved = {name for name in slow if fast[name] < slow[name]}
    trained = {"sparsify", "quantize", "adapt", "verify", "benchmark", "teacher"}
    assert moved == trained | {"peers-grid"}
    for name in ("verify", "benchmark"):
        assert fast[name] > slow[name] / 2


def test_nncf_is_foretold_on_the_cpu_wherever_torch_computes(odd):
    device = replace(SLOW, name="cuda", elements=100 * SLOW.elements)
    cpu, machine = Speeds(SLOW, SLOW, SLOW, 1e9), Speeds(SLOW, device, SLOW, 1e9)
    taken = {}
    for method in ("rtn", "nncf"):
        recipe = small_recipe(f"quantize.method={method}", model_path=odd)
        layout = layout_of(recipe, odd)
        both = (predict_seconds(recipe, layout, m, WORK)["quantize"] for m in (cpu, machine))
        taken[method] = list(both)
    assert taken["nncf"][0] == taken["nncf"][1]
    assert taken["rtn"][0] > taken["rtn"][1]


@pytest.mark.parametrize("strategy", ["lowest-loss", "hill-climb", "evolutionary"])
def test_evaluations_of_a_search_are_foretold(odd, strategy):
    def seconds(*settings: str) -> float:
        recipe = small_recipe(*settings, model_path=odd)
        return predict_seconds(recipe, layout_of(recipe, odd), MACHINE, WORK)["search"]

    few, many, longer = (
        seconds(f"search={{strategy: {strategy}, budget: {budget}, items: {items}}}")
        for budget, items in ((2, 64), (20, 64), (20, 128))
    )
    assert seconds("search={strategy: median}") < few < many < longer


def test_a_row_that_makes_its_weights_in_every_call_is_foretold(odd):
    """``tuned, unmerged`` takes longer than another row in torch."""
    both, other = (
        small_recipe(f"benchmark.baselines={rows}", model_path=odd)
        for rows in ("[adapted]", "[sparse]")
    )
    layout = layout_of(both, odd)
    adapted, sparse = (
        predict_seconds(recipe, layout, MACHINE, WORK)["benchmark"] for recipe in (both, other)
    )
    assert adapted > sparse


def test_steps_of_epochs_are_counted_from_the_data(odd):
    recipe = small_recipe("adapt.steps=null", "adapt.epochs=2", model_path=odd)
    layout = layout_of(recipe, odd)
    assert count_examples(recipe) == 240
    few, many, unknown = (
        predict_seconds(recipe, layout, MACHINE, replace(WORK, examples=n))["adapt"]
        for n in (100, 6000, None)
    )
    assert few < many
    assert unknown is None


def test_a_config_that_is_not_the_expected_one_is_refused(odd):
    recipe = small_recipe(f"model={{path: {odd}, config: {{hidden_size: 4096}}}}")
    with pytest.raises(UserError, match=r"hidden_size: the recipe expects 4096, .* has 64"):
        check_recipe(recipe, odd)


def test_predicted_bytes_are_those_written(tiny_run):
    recipe = small_recipe()
    folder = model_folder(recipe, download=False)
    predicted = predict_bytes(recipe, layout_of(recipe, folder))
    for name in ("sparsify", "quantize", "merge", "adapt"):
        path = tiny_run[name].path
        written = sum(f.stat().st_size for f in path.rglob("*.safetensors"))
        assert written == pytest.approx(predicted[name], rel=0.05), name


def test_a_truncated_checkpoint_is_named(odd, tmp_path):
    import shutil

    copy = shutil.copytree(odd, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(
        UserError, match=r"model.safetensors: the header lists \d+ bytes, the file has \d+"
    ):
        check_recipe(small_recipe(model_path=copy), copy)


def test_tokens_of_an_item_are_those_that_scoring_feeds(random_llama):
    """Choices share their context, and the right one is within the target of perplexity."""
    context, right = [5, 6, 7, 8], [9, 10]
    pairs = ((context, right), (context, [11, 12, 13]), (context, [14]))
    item = Item(context, [*right, 1], "A", scoring="choice", choices=pairs)
    assert count_item_tokens(item) == len(context) + 2 + 2 + 0
    session = target("torch").open_session(random_llama, True, None)
    fed = []
    forward = session.forward

    def counted(ids, mask=None, last=None):
        fed.append(ids.size if mask is None else int(mask[:, -ids.shape[1] :].sum()))
        return forward(ids, mask, last)

    session.forward = counted
    prompts, targets = zip(*pairs, (context, [*right, 1]), strict=True)
    log_likelihoods(session, list(prompts), list(targets))
    assert sum(fed) == count_item_tokens(item)


def test_a_workload_is_counted_from_the_data(odd):
    work = workload_of(small_recipe("benchmark.items=9", model_path=odd), odd)
    assert work.examples == 240 and work.test == 9
    assert 20 < work.example < 112, "the mean, not the longest that is allowed"
    assert work.scored > work.prompt > 0 and 0 < work.answer <= 56
    text = small_recipe(
        "task={kind: text, text: 'builtin:tiny/train.jsonl', sequence_length: 64}", model_path=odd
    )
    work = workload_of(text, odd)
    assert (work.example, work.prompt, work.answer) == (64, 0, 0)


def test_where_the_tokenizer_is_not_here_words_are_counted(tmp_path):
    """`make plan MODEL=mistral` comes before the download of the model, its data is in data/."""
    recipe = load_recipe(ROOT / "recipes" / "mistral.yaml")
    work = workload_of(recipe, None)
    assert work.counted == "words" and work.examples == 7473
    # What SmolLM2's tokenizer of 49,152 tokens makes of the same items.
    assert work.example == pytest.approx(182.6, rel=0.1)
    assert work.prompt == pytest.approx(68.7, rel=0.1)
    assert "lengths are estimated from words" in plan_text(preview.preview(recipe, tmp_path))
    hub = load_recipe(ROOT / "recipes" / "mistral.yaml", ("task.folder=null",))
    assert workload_of(hub, None).example == 512


def test_what_takes_more_than_a_day_is_told_with_settings_that_do_not(odd):
    recipe = small_recipe("adapt.steps=1000", model_path=odd)
    quick = {"adapt": 3600.0, "benchmark": 3600.0}
    assert settings_for_a_day(recipe, quick, WORK) is None
    slow = {"sparsify": 3600.0, "adapt": 40 * 3600.0, "benchmark": 5 * 3600.0}
    assert settings_for_a_day(recipe, slow, WORK) == (
        "benchmark.minutes=30 adapt.epochs=null adapt.steps=562"
    )
    assert "accelerator" in settings_for_a_day(recipe, slow | {"sparsify": 90000.0}, WORK)


def test_an_accelerator_is_named_with_its_memory(odd, monkeypatch, tmp_path):
    gpu = Speed("cuda (a card)", {"float32": 2e13, "bfloat16": 1e14}, 1e11, memory=2**33)
    monkeypatch.setattr(preview, "measure_speeds", lambda *_: Speeds(SLOW, gpu, SLOW, 1e9))
    recipe = small_recipe(model_path=odd)
    document = preview.preview(recipe, tmp_path)
    text = plan_text(document)
    assert "speed of cuda (a card): 20000 GFLOP/s in float32, 100000 in bfloat16" in text
    assert "device memory" in text and "8.0 GiB free" in text
    monkeypatch.setattr(preview, "measure_speeds", lambda *_: Speeds(SLOW, SLOW, SLOW, 1e9))
    slower = preview.preview(recipe, tmp_path)
    assert slower.seconds > document.seconds
    assert "device memory" not in plan_text(slower)


def test_what_passes_took_stands_beside_what_was_foretold(tiny_run, monkeypatch):
    monkeypatch.setattr(preview, "measure_speeds", lambda *_: MACHINE)
    root = tiny_run["merge"].path.parent
    recipe = small_recipe("verify.prompts=4", f"name={root.name}")
    text = plan_text(preview.preview(recipe, root.parent))
    lines = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert "cached" in lines["adapt"] and ", took " in lines["adapt"]
    assert "to run" in lines["verify"] and "took" not in lines["verify"]


def test_precision_auto_is_foretold_at_the_faster_speed(odd):
    device = Speed("x", {"float32": 1e9, "bfloat16": 1e11}, 1e9)
    machine = Speeds(CPU, device, CPU, 1e9)

    def seconds(precision: str) -> float:
        recipe = small_recipe(f"adapt.precision={precision}", model_path=odd)
        return predict_seconds(recipe, layout_of(recipe, odd), machine, WORK)["adapt"]

    assert seconds("auto") == seconds("bfloat16") < seconds("float32")


@pytest.mark.parametrize(("width", "faster"), [(2, True), (4, False)])
def test_torch_rows_are_foretold_in_what_they_run_in(odd, width, faster):
    """In bfloat16 where it is faster, but only of a model that is stored in 16 bits."""
    slow, fast = (
        Speed("cpu", {"float32": 1e9, "bfloat16": bfloat16}, 1e9) for bfloat16 in (1.1e9, 1e11)
    )
    recipe = small_recipe(model_path=odd)
    layout = replace(layout_of(recipe, odd), width=width)
    before, after = (
        predict_seconds(recipe, layout, Speeds(cpu, cpu, cpu, 1e9), WORK)["benchmark"]
        for cpu in (slow, fast)
    )
    assert (after < before) is faster


def test_a_benchmark_by_minutes_is_foretold_by_them(odd):
    recipe = small_recipe("benchmark={minutes: 7}", model_path=odd)
    assert predict_seconds(recipe, layout_of(recipe, odd), MACHINE, WORK)["benchmark"] == 420


def test_long_answers_and_large_vocabularies_need_memory(odd):
    recipe = small_recipe(model_path=odd)
    layout = layout_of(recipe, odd)
    wide = replace(layout, embedding=(300_000, layout.embedding[1]))
    plain, more = (predict_memory(recipe, each, WORK) for each in (layout, wide))
    assert more["adapt"] - plain["adapt"] > 4 * 80 * 32 * 250_000
    shorter = replace(WORK, example=WORK.example / 4)
    assert predict_memory(recipe, wide, shorter)["adapt"] < more["adapt"]


def test_a_recipe_without_training_is_foretold(monkeypatch, tmp_path):
    monkeypatch.setattr(preview, "measure_speeds", lambda *_: MACHINE)
    trained, untrained = (
        preview.preview(small_recipe(*settings), tmp_path) for settings in ((), ("adapt=none",))
    )
    passes = {step.name: step for step in untrained.passes}
    assert not {"adapt", "search", "teacher", "baselines"} & passes.keys()
    assert all(step.predicted_seconds > 0 for step in passes.values())
    assert untrained.seconds < trained.seconds
