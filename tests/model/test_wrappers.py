"""Multimodal base models: their text model is read, written and compressed."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from wrapper_models import WRAPPERS, write_wrapper

from conftest import ROOT, small_recipe
from sqft_export.artifacts.store import Store, files_of, sha256_of
from sqft_export.errors import UserError
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.tensorfiles import TensorFiles, TensorWriter
from sqft_export.model.wrappers import left_out, text_config_of, write_text_model
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import plan_passes, run_recipe
from sqft_export.targets.inspect import inspect_folder, inspection_text

IDS = torch.randint(5, 400, (2, 40), generator=torch.Generator().manual_seed(0))
PAGE = ROOT / "docs" / "how-to" / "multimodal-and-experts.md"
TARGETS = {"openvino": "OpenVINO", "onnx": "ONNX", "gguf": "GGUF"}
OLD_PREFIXES = (("gemma3", "language_model.model."), ("qwen3_vl", "model.language_model."))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in files_of(folder)}


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return small_recipe(
        *("adapt.steps=2", "adapt.ranks=[8, 4]", "adapt.target_modules=null"),
        *("adapt.elastic_groups=null", "benchmark.baselines=[]", "verify.prompts=4"),
        *("quantize.group_size=32", "export.sparse_files=false", *overrides),
        model_path=folder,
    )


@pytest.mark.parametrize(
    ("name", "prefix"),
    [*((name, None) for name in WRAPPERS), *OLD_PREFIXES],
    ids=str,
)
def test_the_text_model_computes_what_the_wrapper_computes_on_text(name, prefix, tmp_path):
    """Bit for bit, in transformers; rotary positions in three parts become one."""
    wrapper = write_wrapper(tmp_path / "wrapper", name, prefix)
    before = digests(tmp_path / "wrapper")
    write_text_model(Checkpoint(tmp_path / "wrapper"), tmp_path / "text")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        assert torch.equal(text(input_ids=IDS).logits, wrapper(input_ids=IDS).logits)
    assert digests(tmp_path / "wrapper") == before
    written = {file.name for file in files_of(tmp_path / "text")}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= written
    assert "preprocessor_config.json" not in written


def test_parts_are_left_out_with_count_and_bytes(tmp_path):
    write_wrapper(tmp_path, "qwen3_vl")
    files = TensorFiles(tmp_path)
    tensors = dict(files.tensors(files.headers))
    with TensorWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add("mtp.fc.weight", torch.zeros(64, 128))
        writer.add("mtp.norm.weight", torch.zeros(64))
    checkpoint = Checkpoint(tmp_path)
    found = {one.part: one for one in left_out(checkpoint.stored, "here")}
    assert set(found) == {"visual", "mtp"}
    assert (found["mtp"].tensors, found["mtp"].bytes) == (2, 4 * (64 * 128 + 64))
    kept = sum(header.bytes for header in checkpoint.headers.values())
    everything = sum(header.bytes for header in files.headers.values()) + found["mtp"].bytes
    assert kept + sum(one.bytes for one in found.values()) == everything


def test_plan_and_inspect_name_the_parts_and_write_nothing(tmp_path):
    write_wrapper(tmp_path / "wrapper", "gemma3")
    recipe = recipe_of(tmp_path / "wrapper", "export.targets=[onnx]")
    before = digests(tmp_path / "wrapper")
    said = next(plan_warnings(recipe, check_recipe(recipe, tmp_path / "wrapper")))
    assert "gemma3 is a multimodal model; its text model is compressed as gemma3_text" in said
    assert "vision_tower (48 tensors, 166,080 bytes)" in said
    text = inspection_text(inspect_folder(tmp_path / "wrapper"))
    assert "left out: vision_tower: 48 tensors, 166,080 bytes" in text
    assert digests(tmp_path / "wrapper") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["wrapper"]


def test_a_published_config_is_planned_before_its_download(tmp_path):
    write_wrapper(tmp_path, "gemma3")
    described = json.loads((tmp_path / "config.json").read_text())
    text = text_config_of(described, "here")
    assert (text["model_type"], text["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert text["dtype"] == "float32" and "vision_config" not in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mllama", "text_config": {}},
            "has a text model of type 'mllama_text_model'",
        ),
        (
            {"model_type": "blip", "text_config": {"model_type": "blip_text_model"}},
            "'blip_text_model'",
        ),
        ({"model_type": "other", "text_config": {"model_type": []}}, "has a text model of type"),
    ],
)
def test_a_text_model_that_is_no_causal_language_model_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        text_config_of(config, "here")


def test_a_wrapper_without_a_text_model_is_refused(tmp_path):
    write_wrapper(tmp_path, "gemma3", prefix="other.")
    with pytest.raises(UserError, match=r"embed_tokens\.weight is stored under none of"):
        Checkpoint(tmp_path).check()


def test_a_run_writes_the_text_model_and_keys_follow_the_original(tmp_path):
    folder, root = tmp_path / "wrapper", tmp_path / "runs" / "tiny"
    write_wrapper(folder, "qwen3_vl")
    before = digests(folder)
    recipe = recipe_of(folder, "sparsify.method=magnitude", "export.targets=[onnx]")
    run = run_recipe(recipe, root, ("sparsify",))
    assert digests(folder) == before
    assert len(list(root.glob("text-model-*"))) == 1
    config = json.loads((run["sparsify"].path / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen3"

    def is_cached() -> bool:
        [step] = plan_passes(recipe, folder, Store(root), ("sparsify",))
        return step.artifact is not None

    assert is_cached()
    (folder / "generation_config.json").write_text('{"max_length": 100}')
    assert not is_cached()


def test_the_page_lists_every_wrapper():
    lines = [
        "| multimodal `model_type` | text model | logits on text | all passes on a random model |",
        "| --- | --- | --- | --- |",
    ]
    for name, (text, vision, others) in WRAPPERS.items():
        kind, sections = name.partition("-")[0], {"text_config": text, "vision_config": vision}
        config = AutoConfig.for_model(kind, **sections | others).to_dict()
        made = text_config_of(config, "here")["model_type"]
        lines.append(f"| `{kind}` | `{made}` | equal bit for bit | {', '.join(TARGETS.values())} |")
    assert "\n".join(lines) in PAGE.read_text(), "\n".join([f"{PAGE.name} needs", *lines])


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_goes_through_all_passes(name, tmp_path):
    write_wrapper(tmp_path / "wrapper", name)
    before = digests(tmp_path / "wrapper")
    recipe = recipe_of(tmp_path / "wrapper", f"export.targets=[{', '.join(TARGETS)}]")
    run = run_recipe(recipe, tmp_path / "runs" / "tiny", ("verify",))
    assert all(check["passed"] for check in run["verify"].metrics["checks"])
    assert {f"export-{target}" for target in TARGETS} <= set(run)
    assert digests(tmp_path / "wrapper") == before
