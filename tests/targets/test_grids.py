"""`plan` and `inspect` say whether devices that we could not run on take the codes."""

from dataclasses import replace

import pytest

from conftest import small_recipe
from sqft_export.run.preview import preview
from sqft_export.targets.grids import WeightGrid, describe_acceptance
from sqft_export.targets.inspect import inspect_folder, inspection_text
from sqft_export.targets.support import DOCUMENTATION, SUPPORT, TESTS

GRID = WeightGrid("layer", 128, 256, 4, 128, True)


@pytest.mark.parametrize(
    ("runtime", "device", "changes", "found"),
    [
        ("openvino", "OpenVINO GPU", {"group_size": 16}, "groups of 16"),
        ("openvino", "OpenVINO NPU", {"group_size": 64}, "groups of 64"),
        ("openvino", "OpenVINO NPU", {"symmetric": False}, "asymmetric"),
        ("openvino", "OpenVINO NPU", {"bits": 2}, "2 bits"),
        ("torch", "Marlin (vLLM, GPTQModel)", {"group_size": 16}, "groups of 16"),
        ("torch", "Marlin (vLLM, GPTQModel)", {"symmetric": False}, "asymmetric"),
        ("torch", "Marlin (vLLM, GPTQModel)", {"bits": 3}, "3 bits"),
        ("torch", "Marlin (vLLM, GPTQModel)", {"outputs": 96}, "96x256"),
        ("torch", "Marlin (vLLM, GPTQModel)", {"inputs": 320}, "128x320"),
    ],
)
def test_a_grid_that_a_device_does_not_take_is_named(runtime, device, changes, found):
    verdicts = describe_acceptance(runtime, [GRID, replace(GRID, layer="other", **changes)])
    assert verdicts[device].startswith("does not take 1 of 2 weights: other has")
    assert found in verdicts[device] and "https://" in verdicts[device]
    assert describe_acceptance(runtime, [GRID])[device].startswith("takes all 1 weights")


@pytest.mark.parametrize("bits", [4, 8])
def test_one_group_per_row_is_taken_everywhere(bits):
    grid = replace(GRID, bits=bits, group_size=256)
    for runtime in ("openvino", "torch"):
        verdicts = describe_acceptance(runtime, [grid]).values()
        assert all(verdict.startswith("takes all") for verdict in verdicts)


def test_inspect_reads_the_merged_folder_for_marlin(tiny_run):
    found = inspect_folder(tiny_run["merge"].path / "model")
    assert len(found["layers"]) == 28
    fits = all(
        outputs % 64 == 0 and inputs % 128 == 0
        for outputs, inputs in (layer["shape"] for layer in found["layers"])
    )
    verdict = found["accepted_by"]["Marlin (vLLM, GPTQModel)"]
    assert verdict.startswith("takes all 28" if fits else "does not take")
    assert verdict in inspection_text(found)


def test_inspect_tells_that_an_npu_takes_other_groups(tiny_run):
    found = inspect_folder(tiny_run["export-openvino"].path / "model")
    assert "groups of 64, it takes 128" in found["accepted_by"]["OpenVINO NPU"]


def test_plan_tells_it_before_the_run(tmp_path):
    found = preview(small_recipe("quantize.group_size=64"), tmp_path)
    assert "groups of 64, it takes 128" in found.accepted_by["OpenVINO NPU"]


def test_every_claim_has_a_source():
    for one in SUPPORT:
        if one.evidence == DOCUMENTATION:
            assert one.source.startswith("https://")
        else:
            assert one.evidence == TESTS or one.evidence.startswith("run by us on ")
