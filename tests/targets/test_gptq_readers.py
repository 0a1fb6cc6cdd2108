"""vLLM and GPTQModel load the merged folder unchanged and answer as our reference."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_build

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.probes.document import ProbePrompt, read_probe
from sqft_export.probes.running import compare_session, divergence_of_stored
from sqft_export.targets.torch import TorchSession

VLLM_KL = 1e-4  # nats per token; 9e-7 was measured, with float16 activations
MARLIN_KL = 1e-3
VLLM_SCRIPT = Path(__file__).parent.parent / "vllm_answers.py"


@pytest.fixture(scope="module")
def merged(tiny_run) -> Path:
    return tiny_run["merge"].path / "model"


@pytest.fixture(scope="module")
def prompts(merged) -> list[ProbePrompt]:
    """Prompts with the greedy continuations and distributions of our float32 reference."""
    probe = read_probe(merged)
    assert probe is not None
    return [prompt for prompt in probe.prompts if prompt.beyond is None]


@pytest.fixture(scope="module")
def vllm(merged, prompts, tmp_path_factory) -> dict:
    """vLLM's reading of the folder, its kernels, and its answers to the prompts."""
    folder = tmp_path_factory.mktemp("vllm")
    job, result = folder / "job.json", folder / "result.json"
    asked = [{"ids": one.ids, "new_tokens": len(one.continuation)} for one in prompts]
    job.write_text(json.dumps({"folder": str(merged), "prompts": asked}))
    done = subprocess.run(
        [sys.executable, VLLM_SCRIPT, job, result],
        env=vllm_build.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.slow
def test_vllm_reads_bits_groups_and_linears_of_the_merged_folder(vllm, merged):
    config = json.loads((merged / "config.json").read_text())["quantization_config"]
    assert vllm["method"] in ("gptq", "gptq_marlin", "auto_gptq")
    read = {name: vllm["config"][name] for name in ("bits", "group_size", "sym", "desc_act")}
    assert read == {name: config[name] for name in read}
    # vLLM joins q, k and v, and gate and up.
    expected = {
        name.replace(part, joined)
        for name in Checkpoint(merged).quantized_linears
        for part, joined in JOINED.items()
        if name.endswith(part)
    }
    assert set(vllm["linears"]) == expected
    assert set(vllm["plain"]) == {"lm_head"}


JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **{name: name for name in ("o_proj", "down_proj")},
}


@pytest.mark.slow
def test_vllm_gives_the_references_tokens_within_the_divergence(vllm, prompts):
    divergences = []
    for prompt, answer in zip(prompts, vllm["answers"], strict=True):
        assert answer["tokens"] == prompt.continuation
        stored = {one.position: one for one in prompt.positions}
        for step, found in enumerate(answer["log_probabilities"]):
            one = stored[len(prompt.ids) - 1 + step]
            expected = np.array(one.log_probabilities)
            divergences.append(divergence_of_stored(expected, np.array(found)[one.ids]))
    assert len(divergences) > 10
    assert np.mean(divergences) < VLLM_KL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gptqmodel_answers_on_marlin_as_the_reference(merged, prompts):
    gptqmodel = pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    model = gptqmodel.GPTQModel.load(
        str(merged), device="cuda:0", backend=gptqmodel.BACKEND.GPTQ_MARLIN, dtype=torch.float16
    ).model
    on_marlin = {name for name, one in model.named_modules() if isinstance(one, MarlinLinear)}
    assert on_marlin == set(Checkpoint(merged).quantized_linears)
    found = compare_session(TorchSession(model, "cuda:0"), prompts)
    assert found.first_difference is None and found.mean_kl < MARLIN_KL
