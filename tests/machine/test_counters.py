"""Energy and memory of NVIDIA GPUs, from a stand-in for NVML's module."""

import importlib.machinery
import sys
import types

import pytest

from sqft_export.machine.counters import device_memory, energy_joules


@pytest.fixture
def nvml(monkeypatch):
    """NVML with two GPUs."""
    module = types.ModuleType("pynvml")
    module.__spec__ = importlib.machinery.ModuleSpec("pynvml", None)
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: 2
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetTotalEnergyConsumption = lambda gpu: 1500 + gpu  # millijoules
    module.nvmlDeviceGetMemoryInfo = lambda gpu: types.SimpleNamespace(used=100 * (gpu + 1))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_all_gpus_are_added(nvml):
    assert energy_joules("cuda") == pytest.approx(3.001)
    assert device_memory("gpu") == 300


def test_a_gpu_without_a_counter_is_not_readable(nvml, monkeypatch):
    def unsupported(gpu: int):
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert energy_joules("gpu") is None
    assert device_memory("gpu") == 300
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: 0)
    assert device_memory("gpu") is None


@pytest.mark.parametrize("device", ["cpu", "vulkan", "webgpu", "npu"])
def test_devices_that_nvml_does_not_know_have_no_device_memory(nvml, device):
    assert device_memory(device) is None


def test_without_nvml_nothing_is_readable(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("sqft_export.machine.counters.installed", lambda module: False)
    assert energy_joules("cuda") is None and device_memory("cuda") is None
