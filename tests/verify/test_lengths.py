"""Texts past windows, rotary switches and last positions: checked, and named where they differ."""

from pathlib import Path

import pytest

from conftest import random_model, small_recipe
from sqft_export.machine.device import CPU
from sqft_export.model.architecture import transformers_config
from sqft_export.recipe.schema import Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target
from sqft_export.verify import lengths
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.fidelity import load_reference
from sqft_export.verify.lengths import (
    LONGEST_VERIFIED,
    check_lengths,
    named_lengths,
    unverified_lengths,
)
from sqft_export.verify.subject import Asked, Subject

WINDOW = {"model_type": "mistral", "sliding_window": 16, "head_dim": 16, "num_hidden_layers": 2}
LONGROPE = {
    "model_type": "phi3",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 12,
        "long_factor": [1.0 + 0.5 * i for i in range(12)],
    },
}
DYNAMIC = {
    "model_type": "llama",
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}
UPPER_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 24,
    "max_window_layers": 1,
    "num_hidden_layers": 3,
}


def certified(root: Path, runtime: str, config: dict, **asked) -> dict[str, bool]:
    """Lines about lengths of an exported random model."""
    model = root / "merge" / "model"
    if not model.is_dir():
        random_model(model, **config)
    folder = root / runtime / "model"
    folder.mkdir(parents=True)
    target(runtime).export(model, folder, Export())
    prompts = [[5 + n % 400 for n in range(30)], [400 - n for n in range(20)]]
    subject = Subject(
        Asked(prompts, [], 4, 1e-4, 0.1, False, **asked),
        {},
        None,
        root,
        root / "merge",
        {runtime: root / runtime},
    )
    certificate = Certificate()
    check_lengths(certificate, subject, runtime, load_reference(subject, CPU))
    return {check.name: check.passed for check in certificate.checks}


def lengths_of(model_type: str, **config) -> list[tuple[str, int]]:
    config = transformers_config({"model_type": model_type, **config}, "").to_dict()
    return [(length.what, length.tokens) for length in named_lengths(config)]


def test_models_without_a_boundary_have_no_length():
    assert lengths_of("llama") == []
    assert lengths_of("qwen2") == []  # its window is not used
    assert lengths_of("bloom") == []


def test_windows_switches_and_last_positions_are_lengths():
    assert lengths_of("mistral", sliding_window=16) == [("sliding_window", 16)]
    assert lengths_of("opt") == [("max_position_embeddings", 2048)]
    assert lengths_of(**DYNAMIC) == [("max_position_embeddings", 64)]
    assert ("original_max_position_embeddings", 64) in lengths_of(**LONGROPE)
    assert lengths_of("qwen2", **UPPER_WINDOWS) == [("sliding_window", 24)]


def test_what_no_text_reaches_is_unverified():
    longer = WINDOW | {"sliding_window": LONGEST_VERIFIED, "max_position_embeddings": 131072}
    config = transformers_config(longer, "").to_dict()
    assert [length.tokens for length in unverified_lengths(config)] == [LONGEST_VERIFIED]
    assert not unverified_lengths(transformers_config(WINDOW, "").to_dict())


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
@pytest.mark.parametrize(
    "config",
    [
        LONGROPE,
        DYNAMIC,
        {"model_type": "qwen2", **UPPER_WINDOWS},
        {"model_type": "qwen3", "head_dim": 16, **UPPER_WINDOWS},
    ],
    ids=["longrope", "dynamic", "qwen2", "qwen3"],
)
def test_runtimes_agree_with_torch_past_every_length(tmp_path, runtime, config):
    lines = certified(tmp_path, runtime, config)
    assert lines and all(lines.values()), lines


def test_llama_cpp_agrees_up_to_the_context_that_it_is_given(tmp_path):
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    lines = certified(tmp_path, "gguf", {"rope_parameters": llama3})
    title = "logits past original_max_position_embeddings 64: merged in torch and gguf"
    assert lines == {title: True}
    assert certified(tmp_path / "window", "gguf", WINDOW) == {}  # its context ends there


def test_openvino_without_the_unscaled_frequencies_is_named(tmp_path, monkeypatch):
    """A trace keeps the frequencies of short texts; of a longer context it would be wrong."""
    monkeypatch.setattr("sqft_export.model.skeleton.deployed_config", lambda config: config)
    monkeypatch.setattr(lengths.Length, "text_tokens", property(lambda one: one.tokens + 8))
    config = DYNAMIC | {"max_position_embeddings": 32}
    monkeypatch.setattr(lengths, "context_of", lambda folder: 64)
    lines = certified(tmp_path, "openvino", config)
    title = "logits past max_position_embeddings 32: merged in torch and openvino"
    assert lines == {title: False}


@pytest.mark.parametrize("product", [lengths.LARGEST_PRODUCT, 0], ids=["deployed", "miniature"])
def test_a_wrong_window_in_onnx_is_named(tmp_path, monkeypatch, product):
    monkeypatch.setattr(lengths, "LARGEST_PRODUCT", product)
    what = "merged" if product else "two blocks"
    title = f"logits past sliding_window 16: {what} in torch and onnx"
    assert certified(tmp_path / "right", "onnx", WINDOW) == {title: True}
    monkeypatch.setattr("sqft_export.targets.onnx.fused.window_layers", lambda config: [12, 12])
    assert certified(tmp_path / "wrong", "onnx", WINDOW) == {title: False}


def test_a_window_that_llama_cpp_is_not_told_of_is_named(tmp_path, monkeypatch):
    """llama.cpp has no window in this architecture; a longer context than the window is wrong."""
    module = "sqft_export.targets.gguf"
    monkeypatch.setattr(f"{module}.context_of_file", lambda config: 256)
    monkeypatch.setattr(f"{module}.architectures.context_of_file", lambda config: 256)
    title = "logits past sliding_window 16: merged in torch and gguf"
    assert certified(tmp_path, "gguf", WINDOW) == {title: False}


@pytest.mark.slow
def test_a_run_is_certified_past_its_window(tmp_path):
    recipe = small_recipe(
        "adapt.steps=2",
        "export.targets=[onnx]",
        "verify.prompts=2",
        model_path=random_model(tmp_path / "model", **WINDOW),
    )
    run = run_recipe(recipe, tmp_path / "runs", ("verify",))
    checks = {check["name"]: check["passed"] for check in run["verify"].metrics["checks"]}
    assert checks["logits past sliding_window 16: merged in torch and onnx"]
