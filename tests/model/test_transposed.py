"""GPT-2's Conv1D: matrices are ``[in, out]`` in its folders and ``[out, in]`` everywhere else."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import random_model, small_recipe
from sqft_export.adapters.files import read_low_rank
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Reference
from sqft_export.model.miniature import write_miniature
from sqft_export.numerics.gptq_layout import from_gptq
from sqft_export.run.pipeline import run_recipe

SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
QKV = "transformer.h.0.attn.c_attn"
IDS = list(range(5, 45))
SHORT = (
    *("adapt.steps=2", "adapt.ranks=[8, 4]", "adapt.target_modules=null"),
    *("adapt.elastic_groups=null", "benchmark.baselines=[merged]", "export.targets=[]"),
)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("gpt2"), model_type="gpt2", **SIZES)


def stock_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([IDS])).logits[0]


def agrees(folder) -> bool:
    """Whether transformers, with its Conv1D, computes the logits that are computed here."""
    theirs = stock_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours = torch.from_numpy(Reference(folder).logits([IDS])[0])
    return bool((theirs - ours).abs().max() < 1e-4 * ours.std())


def test_matrices_are_read_as_those_of_linears(gpt2):
    stored, checkpoint = load_file(gpt2 / "model.safetensors"), Checkpoint(gpt2)
    assert stored[f"{QKV}.weight"].shape == (64, 192)
    assert checkpoint.linears[QKV] == (192, 64)
    assert torch.equal(checkpoint.tensor(f"{QKV}.weight"), stored[f"{QKV}.weight"].T)
    embedding = "transformer.wte.weight"
    assert torch.equal(checkpoint.tensor(embedding), stored[embedding])
    assert agrees(gpt2)


def test_published_names_lack_the_outer_module_and_have_masks(gpt2, tmp_path):
    """As in openai-community/gpt2."""
    stored = load_file(gpt2 / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    save_file(short, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    Checkpoint(tmp_path).check()
    ours, theirs = (Reference(folder).logits([IDS])[0] for folder in (tmp_path, gpt2))
    assert (ours == theirs).all()


def test_every_pass_writes_a_folder_that_transformers_reads(gpt2, tmp_path):
    recipe = small_recipe(
        "adapt.pipeline=sparsepeft", "quantize.method=none", *SHORT, model_path=gpt2
    )
    run = run_recipe(recipe, tmp_path, ("merge",))
    for name in ("sparsify", "merge"):
        assert agrees(run[name].path / "model"), name
    pruned = load_file(run["merge"].path / "model" / "model.safetensors")[f"{QKV}.weight"]
    assert pruned.shape == (64, 192)
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_codes_are_in_the_layout_of_gptq_which_is_the_same_for_both(gpt2, tmp_path):
    """``qweight`` is [in / 8, out], for a Conv1D as for a Linear."""
    recipe = small_recipe("quantize.group_size=32", *SHORT, model_path=gpt2)
    run = run_recipe(recipe, tmp_path, ("merge",))
    assert agrees(run["quantize"].path / "model")
    merged = load_file(run["merge"].path / "model" / "model.safetensors")
    assert merged[f"{QKV}.qweight"].shape == (64 // 8, 192)
    parts = {part: merged[f"{QKV}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    codes, _ = from_gptq(parts, 4, 32, 1)
    assert codes.shape == (192, 64)


def test_an_unmerged_adapter_is_one_of_peft_on_conv1d(gpt2, tmp_path):
    recipe = small_recipe("adapt.pipeline=shears", "quantize.method=none", *SHORT, model_path=gpt2)
    folder = run_recipe(recipe, tmp_path, ("merge",))["merge"].path
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    theirs = stock_logits(PeftModel.from_pretrained(base, folder / "adapter"))
    updates = read_low_rank(folder / "adapter")
    ours = torch.from_numpy(Reference(folder / "model", updates).logits([IDS])[0])
    assert (updates[QKV][1] != 0).any()
    assert (theirs - ours).abs().max() < 1e-4 * ours.std()


def test_a_miniature_is_read_as_it_was_made(gpt2, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(gpt2).config
    write_miniature(config, tmp_path)
    assert agrees(tmp_path)
