"""Hybrids: recurrent layers continue a state by any number of tokens, in torch and in runtimes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import FAMILIES
from sqft_export.model.floats import load_model
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.schema import Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import Session, target
from sqft_export.verify.compute import prompt_logits

HYBRIDS: dict[str, dict] = {
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "intermediate_size": 192,
        "block_multiple_of": 32,
    },
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "intermediate_size": 128,
        "head_dim": 32,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 10000.0},
            **{"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
RUNTIMES = ("openvino", "onnx", "gguf")
# Tokens: one, fewer than a convolution's columns, as many, and beyond a chunk of the delta rule.
LENGTHS = (1, 2, 3, 4, 70)
MAX_DIFFERENCE = 1e-3  # standard deviations of logits


def write_hybrid(folder: Path, model_type: str, **settings) -> Path:
    return random_model(folder, model_type=model_type, **(HYBRIDS[model_type] | settings))


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request, tmp_path_factory) -> Path:
    return write_hybrid(tmp_path_factory.mktemp(request.param) / "model", request.param)


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(seed).randint(5, 400, length).tolist()


def assert_close(ours: np.ndarray, theirs: np.ndarray, allowed: float = MAX_DIFFERENCE) -> None:
    assert np.abs(ours - theirs).max() / ours.std() < allowed


def test_every_family_with_recurrent_layers_has_its_case():
    assert {name for name, family in FAMILIES.items() if family.recurrent} >= set(HYBRIDS)


@torch.no_grad()
def test_a_state_is_continued_by_any_number_of_tokens(hybrid):
    """The class of transformers is right without a cache; it continues by one token only."""
    ids = torch.tensor([ids_of(80), ids_of(80, 1)])
    expected = AutoModelForCausalLM.from_pretrained(hybrid).eval()(input_ids=ids).logits.numpy()
    session, start = target("torch").open_session(hybrid, True, None), 0
    for stop in (1, 2, 7, 75, 76, 80):
        found = session.forward(ids[:, start:stop].numpy())
        assert_close(expected[:, start:stop], found)
        start = stop


def test_padding_before_a_prompt_changes_nothing(hybrid):
    session = target("torch").open_session(hybrid, True, None)
    prompts = [ids_of(5), ids_of(9, 1), ids_of(2, 2)]
    together = prompt_logits(session, prompts)
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = prompt_logits(session, [prompt])
        assert_close(alone, found)


@pytest.fixture(scope="module", params=RUNTIMES)
def deployed(request, hybrid, tmp_path_factory) -> tuple[Session, Session]:
    """A session in torch and one of a deployment."""
    folder = tmp_path_factory.mktemp(request.param)
    target(request.param).export(hybrid, folder, Export())
    sessions = (target("torch"), hybrid), (target(request.param), folder)
    ours, theirs = (runner.open_session(place, True, None) for runner, place in sessions)
    return ours, theirs


def test_runtimes_agree_at_every_length(deployed):
    """A prefill, then one token; alone, and in a batch of unequal prompts."""
    texts = [ids_of(length, length) for length in LENGTHS]
    for one, other in zip(*(prompt_logits(session, texts) for session in deployed), strict=True):
        assert_close(one, other)
    for text in texts:
        [one], [other] = (prompt_logits(session, [text]) for session in deployed)
        assert_close(one, other)


def test_runtimes_continue_by_several_tokens(deployed):
    ids = np.array([ids_of(40)])
    for session in deployed:
        session.reset()
    for start, stop in ((0, 7), (7, 8), (8, 30), (30, 40)):
        ours, theirs = (session.forward(ids[:, start:stop]) for session in deployed)
        assert_close(ours, theirs)


def test_answers_share_the_state_of_their_prompt(deployed):
    """Each answer begins from a copy, and prompts of one batch have unequal lengths."""
    prompts = [ids_of(6), ids_of(6), ids_of(6), ids_of(11, 1), ids_of(11, 1)]
    answers = [ids_of(3, 2), ids_of(5, 3), ids_of(1, 4), ids_of(4, 5), ids_of(2, 6)]
    ours, theirs = (log_likelihoods(session, prompts, answers) for session in deployed)
    np.testing.assert_allclose([x for x, _ in theirs], [x for x, _ in ours], rtol=1e-3, atol=1e-3)
    assert [hits for _, hits in theirs] == [hits for _, hits in ours]
    alone = [
        log_likelihoods(deployed[0], [p], [a])[0][0] for p, a in zip(prompts, answers, strict=True)
    ]
    np.testing.assert_allclose([x for x, _ in ours], alone, rtol=1e-3, atol=1e-3)


def test_gates_and_short_convolutions_stay_in_floats(hybrid):
    checkpoint = Checkpoint(hybrid)
    family = checkpoint.family
    inside = {
        name.removeprefix(f"{family.blocks}.").partition(".")[2] for name in checkpoint.linears
    }
    assert not inside & set(family.floats)
    assert all(family.floats.values())  # each has its reason
    assert not [name for name in inside if name.endswith(("conv", "conv1d"))]
    assert {name.rpartition(".")[2] for name in inside} >= set(family.targets)


def test_a_packed_row_would_mix_states(hybrid):
    """Positions restart in a packed row, but states do not."""
    from sqft_export.adapters.packing import separates_packed

    assert not separates_packed(load_model(Checkpoint(hybrid)), 400)


@pytest.mark.parametrize(
    ("name", "settings", "recipe", "message"),
    [
        (
            "lfm2",
            {},
            ("export.targets=[onnx]", "export.onnx_graph=standard"),
            "no operators of rec",
        ),
        ("lfm2", {"conv_bias": True}, ("export.targets=[gguf]",), "lfm2 has conv_bias False"),
        (
            "qwen3_5_text",
            {"linear_value_head_dim": 16},
            ("export.targets=[gguf]",),
            "qwen35 has square states, not 32 by 16",
        ),
        (
            "qwen3_5_text",
            {"layer_types": ["full_attention", "linear_attention"] * 2},
            ("export.targets=[gguf]",),
            "qwen35 has full attention in every nth block",
        ),
    ],
)
def test_what_a_runtime_lacks_is_refused_before_any_work(name, settings, recipe, message, tmp_path):
    folder = write_hybrid(tmp_path, name, **settings)
    small = ("quantize.group_size=32", "export.on_unsupported=error")
    with pytest.raises(UserError, match=message):
        check_recipe(small_recipe(*recipe, *small, model_path=folder), folder)


@pytest.mark.slow
def test_hybrids_go_through_all_passes(hybrid, tmp_path):
    """Also texts shorter than a convolution, and beyond a chunk of the delta rule."""
    recipe = small_recipe(
        *("adapt.steps=2", "adapt.ranks=[8, 4]", "adapt.target_modules=null"),
        *("adapt.elastic_groups=null", "quantize.group_size=32", "verify.prompts=4"),
        *("benchmark.baselines=[]", "export.sparse_files=true"),
        f"export.targets=[{', '.join(RUNTIMES)}]",
        model_path=hybrid,
    )
    run = run_recipe(recipe, tmp_path, ("verify",))
    checks = {check["name"]: check["passed"] for check in run["verify"].metrics["checks"]}
    assert all(checks.values())
    for runtime in RUNTIMES:
        assert f"greedy tokens: merged in torch and {runtime}" in checks
        within = [n for n in checks if n.startswith("logits within") and n.endswith(runtime)]
        assert len(within) == 1
