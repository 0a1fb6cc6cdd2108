"""Output heads of GGUF files that are rounded to Q8_0."""

from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch

from conftest import random_model
from sqft_export.measure.head import MAX_HEAD_DIVERGENCE, measure_head
from sqft_export.metrics import ExportMetrics, read_metrics
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.recipe.schema import Export
from sqft_export.targets import gguf, target
from sqft_export.targets.gguf.head import dequantize_head, quantize_head
from sqft_export.verify.heads import round_to_q8_0

HEADS = {"tied": "token_embd.weight", "untied": "output.weight"}


@pytest.fixture(scope="module", params=HEADS)
def model(request, tmp_path_factory) -> tuple[str, Path]:
    """A random float model with its head, and the name of that tensor in a GGUF file."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(folder, tie_word_embeddings=request.param == "tied")
    return HEADS[request.param], folder


def export_with(model: Path, out: Path, head: str) -> Path:
    out.mkdir()
    gguf.export(model, out, Export(gguf_head=head))
    return out


def test_a_rounded_head_is_the_only_tensor_that_differs(model, tmp_path):
    name, folder = model
    plain, rounded = (export_with(folder, tmp_path / head, head) for head in ("auto", "q8_0"))
    before, after = (
        {t.name: t for t in read_gguf(one / "model.gguf").tensors} for one in (plain, rounded)
    )
    differing = [n for n in before if not np.array_equal(before[n].data, after[n].data)]
    assert differing == [name] and after[name].tensor_type.name == "Q8_0"
    assert gguf.rounded_head(rounded) and not gguf.rounded_head(plain)
    assert gguf.metadata(rounded) == gguf.metadata(plain)


def test_a_rounded_head_is_read_as_floats_of_llama_cpps_formula(model, tmp_path):
    """Logits of llama.cpp are those of the rounded head, in float32."""
    name, folder = model
    deployed = export_with(folder, tmp_path / "made", "q8_0")
    modules = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
    floats, stored = dict(gguf.read_floats(deployed)), dict(gguf.read_back(deployed))
    state = target("torch").open_session(folder, True, None).model.state_dict()
    expected = round_to_q8_0(state[f"{modules[name]}.weight"])
    assert np.array_equal(floats[modules[name]], expected.numpy())
    assert modules[name] not in stored
    session = target("torch").open_session(folder, True, None)
    for key in {f"{modules[name]}.weight"}:
        session.model.state_dict()[key].copy_(expected)
    ids = np.arange(5, 29)[None]
    ours, theirs = session.forward(ids), gguf.open_session(deployed, True, 1).forward(ids)
    assert np.abs(ours - theirs).max() < 1e-4 * ours.std()


def test_the_formula_of_verify_is_that_of_llama_cpp():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 96)).astype(np.float32)
    values[3], values[5, :32] = 0, np.arange(32) / 2 - 7.75  # zeros, and codes that end in .5
    values[7] *= 1e-7  # scales below the smallest normal float16
    expected = dequantize_head(quantize_head(values))
    assert np.array_equal(round_to_q8_0(torch.from_numpy(values)).numpy(), expected)
    assert np.array_equal(
        expected,
        gguf_package.dequantize(
            gguf_package.quantize(values, gguf_package.GGMLQuantizationType.Q8_0),
            gguf_package.GGMLQuantizationType.Q8_0,
        ),
    )


def test_the_divergence_of_a_rounded_head_is_measured(model):
    """It grows with the weights: rounding is relative, and logits grow."""
    found = measure_head(model[1], [list(range(5, 25)), [7, 9, 11]])
    assert found is not None and found.positions == 23
    assert 0 < found.mean <= found.largest < 0.1


def test_inputs_that_fill_no_block_keep_a_float_head(tmp_path):
    folder = random_model(tmp_path / "model", hidden_size=48, num_attention_heads=4)
    assert measure_head(folder, [[5, 6, 7]]) is None
    deployed = export_with(folder, tmp_path / "made", "q8_0")
    assert not gguf.rounded_head(deployed)


def test_the_head_of_a_run_follows_its_measured_divergence(tiny_run):
    """The model card and the report state it; the certificate of the run has passed."""
    artifact = tiny_run["export-gguf"]
    folder, head = artifact.path / "model", read_metrics(artifact, ExportMetrics).head
    assert head is not None and head.positions > 50
    assert head.rounded == (head.largest < MAX_HEAD_DIVERGENCE) == gguf.rounded_head(folder)
    assert ("## Output head" in (folder / "README.md").read_text()) == head.rounded
    assert str(head) in (tiny_run["report"].path / "report.md").read_text()
