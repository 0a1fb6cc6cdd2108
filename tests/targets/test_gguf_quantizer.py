"""llama.cpp's quantizer in this process, with an importance matrix from activations."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from conftest import random_model
from sqft_export.machine.device import CPU
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.recipe.schema import Export
from sqft_export.targets import target
from sqft_export.targets.gguf.importance import importance_matrix
from sqft_export.targets.gguf.quantizer import fallback_notes, quantize_gguf

TENSOR = "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A small model in float32, as Hugging Face folder and as GGUF folder."""
    root = tmp_path_factory.mktemp("floats")
    model = random_model(root / "model", hidden_size=64, intermediate_size=256)
    (root / "gguf").mkdir()
    target("gguf").export(model, root / "gguf", Export())
    return root


def tensors(folder) -> dict[str, np.ndarray]:
    found = GGUFReader(folder / "model.gguf").tensors
    return {t.name: dequantize(t.data, t.tensor_type) for t in found}


def test_the_importance_is_the_mean_squared_input(floats):
    samples = [torch.arange(5, 25), torch.arange(40, 50)]
    found = importance_matrix(Checkpoint(floats / "model"), samples, CPU)
    model = AutoModelForCausalLM.from_pretrained(floats / "model")
    inputs = []
    linear = model.model.layers[1].mlp.down_proj
    linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for sample in samples:
            model(sample[None])
    expected = torch.cat(inputs).square().mean(dim=0).numpy()
    np.testing.assert_allclose(found[TENSOR], expected, rtol=1e-3)
    assert len(found) == 2 * 7


def test_important_inputs_are_rounded_more_closely(floats, tmp_path):
    important = np.ones(256, np.float32)
    important[::2] = 1e4
    plain = quantize_gguf(floats / "gguf", tmp_path / "plain", "Q4_0", {}, 1)
    guided = quantize_gguf(floats / "gguf", tmp_path / "guided", "Q4_0", {TENSOR: important}, 1)
    assert plain == guided == []  # no note: this binding takes a matrix
    exact, one, other = (tensors(f)[TENSOR] for f in (floats / "gguf", *sorted(tmp_path.iterdir())))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["guided", "plain"]
    guided_error, plain_error = (np.square(x - exact)[:, ::2].mean() for x in (one, other))
    assert guided_error < 0.8 * plain_error


def test_matrices_that_k_quants_cannot_hold_are_counted(floats, tmp_path):
    notes = quantize_gguf(floats / "gguf", tmp_path / "made", "Q4_K_M", {}, 1)
    assert len(notes) == 1 and notes[0].startswith("12 of 14 matrices are not K-quants")
    assert "Q5_0" in notes[0]  # the two of 256 inputs are K-quants
    assert fallback_notes(floats / "gguf" / "model.gguf") == []
