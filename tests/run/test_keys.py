"""Keys of artifacts depend on everything that their bytes depend on, and on nothing else."""

import shutil
from pathlib import Path

import pytest

from conftest import TINY, small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.errors import HostError
from sqft_export.model.hub import _is_complete
from sqft_export.plan import disk
from sqft_export.run.pipeline import needed_passes, plan_passes, run_recipe


def keys(*overrides: str, model: Path = TINY, root: Path = Path("nowhere")) -> dict[str, str]:
    recipe = small_recipe(*overrides)
    return {step.name: step.key for step in plan_passes(recipe, model, Store(root))}


@pytest.mark.parametrize(
    ("override", "first"),
    [
        # Held-out training data is not used for calibration.
        ("search.strategy=hill-climb", "sparsify"),
        ("seed=9", "sparsify"),
        ("quantize.bits=8", "quantize"),
        ("adapt.batch=4", "adapt"),
        ("search.strategy=maximal", "search"),
        ("verify.divergence=0.2", "export-openvino"),  # the self-test in it states the limit
        ("verify.tolerance=0.2", "verify"),
    ],
)
def test_an_option_changes_the_key_of_what_it_changes(override, first):
    one, other = keys(), keys(override)
    assert next(name for name in one if one[name] != other[name]) == first


def test_a_baseline_counts_only_for_what_is_taught_by_it():
    """Without the row of dense + LoRA nothing but the benchmark is made again."""
    one, other = keys(), keys("benchmark.baselines=[dense, merged]")
    assert "teacher" in one and "teacher" not in other
    changed = {name for name in other if one[name] != other[name]}
    assert changed == {"benchmark", "report"}
    assert "teacher" not in needed_passes(small_recipe(), ("verify",))
    taught = small_recipe("adapt.distill={teacher: dense-lora}")
    assert needed_passes(taught, ("adapt",))[-2:] == ["teacher", "adapt"]


def test_ranks_in_a_file_count_by_what_it_says(tmp_path):
    chosen = tmp_path / "ranks.json"
    override = f"search={{strategy: configured, configuration: {chosen}}}"

    def written(text: str) -> dict[str, str]:
        chosen.write_text(text)
        return keys(override)

    one = written('{"0.attn": 32}')
    assert written('{ "0.attn":   32 }') == one
    other = written('{"0.attn": 16}')
    assert other["adapt"] == one["adapt"]
    assert other["search"] != one["search"]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja"])
def test_every_file_of_the_base_counts(tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    before = keys(model=model)
    file = model / name
    file.write_text((file.read_text() if file.exists() else "") + "\n")
    assert keys(model=model)["sparsify"] != before["sparsify"]


def test_a_cached_run_needs_no_disk(tiny_run, monkeypatch):
    root = tiny_run["merge"].path.parent
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert run_recipe(small_recipe(), root)["report"].key == tiny_run["report"].key
    with pytest.raises(HostError, match=r"disk: .* needed in .*, 0 .*free"):
        run_recipe(small_recipe("quantize.bits=8"), root)


def test_a_download_that_was_cut_short_is_not_whole(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    assert _is_complete(model)
    (model / "model.safetensors").unlink()
    assert not _is_complete(model)
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (model / "one.safetensors").write_bytes(b"")
    assert not _is_complete(model)
    (model / "two.safetensors").write_bytes(b"")
    assert _is_complete(model)
    index.write_text('{"weight_map": {"a": "one.saf')
    assert not _is_complete(model)


def test_an_adapter_names_no_place_of_this_machine(tiny_run):
    folder = tiny_run["search"].path / "adapter"
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    text = (folder / "adapter_config.json").read_text()
    assert str(tiny_run["merge"].path.parent) not in text
    assert '"/' not in text


def test_training_leaves_no_pickle(tiny_run):
    files = [file for file in tiny_run["adapt"].path.parent.rglob("*") if file.is_file()]
    assert {f.suffix for f in files if f.suffix in (".pt", ".pth", ".pkl", ".ckpt")} == set()
    for file in files:
        if file.suffix == ".bin" and "openvino" not in file.name:
            assert file.read_bytes()[:2] != b"PK", file
