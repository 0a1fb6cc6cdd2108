"""The presets: recipes for any model and data, up to the settings that depend on both."""

from typing import Any

from sqft_export.errors import UserError
from sqft_export.machine.host import installed
from sqft_export.recipe.peers import default_files

SectionMapping = dict[str, Any]  # a section of a recipe, or all of them, as in its YAML
# Preset -> description in help texts.
PRESETS = {
    "int4": "INT4, tuned through its grid: loses least",
    "int4-sparse": "INT4 with 50 % zeros, tuned through its grid: smaller files",
    "int4-npu": "INT4 in groups of 128, tuned through its grid: for Intel NPUs, not run by us",
    "int8": "INT8, tuned through its grid",
    "int4-untuned": "INT4 without training; the data only calibrates and scores",
}
DEFAULT_PRESET = "int4"
EPOCHS, MOST_EPOCHS = 3, 10
# Training examples per optimizer step. Fewer where a small set gives less than ``MIN_STEPS`` steps:
# SmolLM2-135M on 180 conversations answers with repeated words after 27 steps of 16.
STEP_EXAMPLES = (16, 8, 4)
MIN_STEPS = 100
SPARSITY = 0.5
# Target -> package that exports it.
TARGET_PACKAGES = {"openvino": "optimum", "onnx": "onnx_ir", "gguf": "gguf"}


def preset_sections(preset: str) -> SectionMapping:
    """Return the sections of a preset's recipe, without name, model and task.

    :raises UserError: if there is no such preset.
    """
    if preset not in PRESETS:
        known = "; ".join(f"{name} ({about})" for name, about in PRESETS.items())
        raise UserError(f"preset: found {preset!r}; allowed are {known}")
    sparse, tuned = preset == "int4-sparse", preset != "int4-untuned"
    groups = 128 if preset == "int4-npu" else 64
    return {
        "calibration": {"samples": 128, "sequence_length": 512},
        "sparsify": {"method": "sparsegpt", "sparsity": SPARSITY} if sparse else {"method": "none"},
        "quantize": _quantize_section(8 if preset == "int8" else 4, groups, tuned),
        "adapt": _adapt_section() if tuned else "none",
        "export": _export_section(sparse),
        "verify": {"prompts": 16},
        "benchmark": {"items": 50, "rounds": 1, "baselines": _baselines(tuned)},
    }


def _baselines(tuned: bool) -> list[str]:
    """Return the rows of the report; a trained model is compared with LoRA quantized afterwards."""
    if not tuned:
        return ["dense", "merged"]
    files = default_files(_targets())
    return ["dense", "dense-lora", "merged", "lora-then-int4", *files]


def _quantize_section(bits: int, groups: int, tuned: bool) -> SectionMapping:
    section = {"method": "gptq", "bits": bits, "group_size": groups, "symmetric": True}
    return section if tuned else section | {"reconstruct": {}}


def _adapt_section() -> SectionMapping:
    return {
        "pipeline": "qa-sparsepeft",
        "ranks": [32, 24, 16],
        "alpha": 64,
        "dropout": 0.05,
        "learning_rate": 3e-4,
        "schedule": "linear",
        "warmup_steps": 1,
        "epochs": EPOCHS,
        "stop": {},
        "batch": STEP_EXAMPLES[0],
    }


def _export_section(sparse: bool) -> SectionMapping:
    copies = {"sparse_files": True, "sparse_execution": True} if sparse else {}
    return {"targets": _targets(), **copies}


def _targets() -> list[str]:
    """Return the runtimes whose exporters are installed; OpenVINO if none is."""
    found = [name for name, package in TARGET_PACKAGES.items() if installed(package)]
    return found or ["openvino"]
