"""Where torch computes."""

import pytest
import torch

from conftest import small_recipe
from sqft_export.errors import UserError
from sqft_export.machine import device
from sqft_export.machine.device import CPU, device_of, fast_in_bfloat16, training_dtype
from sqft_export.model.hub import model_folder
from sqft_export.numerics import hessian
from sqft_export.plan.checks import check_recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.stages import benchmark
from sqft_export.verify.certify import certify_again

HAS_GPU = torch.cuda.is_available()


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device_of("auto") == device_of("cpu") == CPU


def test_an_accelerator_is_taken_unless_the_recipe_says_cpu(monkeypatch):
    found = torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    assert device_of("auto") == device_of("xpu") == found
    assert device_of("cpu") == CPU
    with pytest.raises(UserError, match=r"device: found cuda.*allowed are auto, cpu, xpu"):
        device_of("cuda")


@pytest.mark.skipif(HAS_GPU, reason="has what is asked for")
def test_a_device_that_is_not_here_is_refused_before_any_work():
    recipe = small_recipe("device=cuda")
    with pytest.raises(UserError, match=r"device: found cuda.*allowed are auto, cpu"):
        check_recipe(recipe, model_folder(recipe, download=False))


@pytest.mark.parametrize("fast", [True, False])
def test_precision_auto_is_the_faster_one(monkeypatch, fast):
    monkeypatch.setattr(device, "fast_in_bfloat16", lambda _: fast)
    assert training_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    assert training_dtype("bfloat16", CPU) == torch.bfloat16
    assert training_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    "float32, bfloat16, fast",
    [
        ([1.0] * 5, [0.5] * 5, True),
        # other work on the machine: slow calls say nothing
        ([9.0, 9.0, 1.0, 9.0, 9.0], [7.0] * 5, False),
        ([1.0] * 5, [5.0, 5.0, 5.0, 5.0, 0.5], True),
    ],
)
def test_which_is_faster_is_measured(monkeypatch, float32, bfloat16, fast):
    taken = iter([second for both in zip(float32, bfloat16, strict=True) for second in both])
    monkeypatch.setattr(device, "seconds_of", lambda *_: next(taken))
    assert fast_in_bfloat16.__wrapped__(CPU) is fast


def test_factors_are_the_same_by_lapack_and_by_torch():
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    square = x.T @ x + torch.eye(48)
    ours, theirs = square.clone(), square.clone()
    assert hessian._solve_with_lapack(ours) and hessian._solve_with_torch(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for solve in (hessian._solve_with_lapack, hessian._solve_with_torch):
        wrong = -square
        assert not solve(wrong)
        off = ~torch.eye(48, dtype=torch.bool)
        assert torch.equal(wrong[off], -square[off]), "more damping is tried on what it was"


def test_torch_rows_run_on_the_accelerator_and_made_ones_where_they_will_live(
    tiny_run, monkeypatch, tmp_path
):
    from sqft_export.stages import Context

    recipe = small_recipe()
    monkeypatch.setattr(benchmark, "device_of", lambda _: torch.device("cuda"))
    folder = model_folder(recipe, download=False)
    context = Context("benchmark", recipe, folder, tiny_run, tmp_path, lambda total: None)
    where = {row.name: row.device for row in benchmark.rows(context)}
    assert where["dense base"] == where["merged"] == where["tuned, unmerged"] == "gpu"
    assert where["OpenVINO"] == where["ONNX Runtime"] == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
def test_every_pass_runs_on_the_gpu_and_its_certificate_holds_on_the_cpu(tmp_path):
    artifacts = run_recipe(small_recipe("device=cuda"), tmp_path / "tiny")
    for name in ("sparsify", "quantize", "adapt", "search", "verify"):
        assert artifacts[name].metrics["device"].startswith("cuda"), name
    _, certificate = certify_again(tmp_path / "tiny", tmp_path)
    certificate.require()
