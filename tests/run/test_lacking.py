"""A lack of memory or disk: named with its place and the setting to lower, exit code 3."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SQFT, TINY, copy_run, small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.errors import HostError
from sqft_export.machine.host import exhausted_resource, writing_to
from sqft_export.machine.progress import silent
from sqft_export.measure.jobs import MeasuredModel
from sqft_export.measure.worker import failure_of
from sqft_export.plan import memory
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.memory import check_memory
from sqft_export.plan.workload import workload_of
from sqft_export.report.loggers import open_loggers
from sqft_export.run import pipeline
from sqft_export.run.pipeline import _run_pass, plan_passes

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.9 GiB\n"
    "of which 1.2 GiB is free."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_of_the_host_or_an_accelerator_that_is_used_up(error):
    said = exhausted_resource(error, None)
    assert said and said.startswith("out of memory: ") and "\n" not in said


def test_a_device_without_memory_says_what_to_lower():
    """A worker's message becomes one line with exit code 3."""
    model = MeasuredModel(kind="onnx", folder=Path("deployed"), threads=None, device="gpu")
    error = failure_of(model, f"OutOfMemoryError: {CUDA}")
    assert isinstance(error, HostError) and "\n" not in str(error)
    assert "deployed: gpu: out of memory: " in str(error)
    assert "lower --prompt-tokens, --new-tokens or --batch" in str(error)


def test_a_pass_that_an_accelerator_has_no_memory_for_says_what_to_lower(tmp_path, monkeypatch):
    recipe, store = small_recipe(), Store(tmp_path)
    step = next(s for s in plan_passes(recipe, TINY, store) if s.name == "adapt")

    class Refused:
        CONSUMES, RESUMES, FREE = (), True, ()

        @staticmethod
        def fields(recipe, name):
            return ()

        @staticmethod
        def run(context):
            raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(pipeline, "stage_of", lambda _: Refused)
    message = r"adapt: out of memory: CUDA.*lower adapt.batch"
    with (
        open_loggers(recipe, tmp_path) as loggers,
        pytest.raises(HostError, match=message) as found,
    ):
        _run_pass(step, recipe, TINY, {}, store, silent, loggers)
    assert found.value.code == 3


def test_memory_of_the_device_is_checked_before_the_run(monkeypatch):
    recipe = small_recipe()
    layout, workload = check_recipe(recipe, TINY), workload_of(recipe, TINY)
    passes = ["sparsify", "adapt", "merge"]
    check_memory(recipe, layout, workload, passes)
    monkeypatch.setattr(memory, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "device_name", lambda _: "cuda (a small one)")
    monkeypatch.setattr(memory, "device_memory", lambda _: 2**20)
    with pytest.raises(
        HostError, match=r"memory of cuda \(a small one\): .* needs .*, 1.0 MiB are"
    ):
        check_memory(recipe, layout, workload, passes)
    check_memory(recipe, layout, workload, ["merge"])  # on the CPU wherever torch computes
    monkeypatch.setattr(memory, "device_memory", lambda _: 2**40)
    check_memory(recipe, layout, workload, passes)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("1509184 requested and 1224704 written"),  # numpy's, without a number
        RuntimeError("Error while writing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_by_the_place_that_was_written_to(tmp_path, error):
    place = tmp_path / "not" / "there" / "yet"
    with pytest.raises(HostError, match=rf"no space to write {place}; .* free"), writing_to(place):
        raise error


def test_a_place_that_is_not_known_is_not_made_up():
    said = exhausted_resource(OSError(errno.ENOSPC, "No space left on device"), None)
    assert said == "no space to write a file"


def sqft(*arguments: object, temporary: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"TMPDIR": str(temporary)} if temporary else {})
    return subprocess.run(
        [SQFT, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def mounted(*arguments: object) -> None:
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("root alone mounts")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("command", ["pack", "specialize"])
def test_a_copy_that_the_disk_has_no_room_for(tiny_run, small_disk, command):
    folder = tiny_run["export-openvino"].path / "model"
    done = sqft(command, folder, small_disk / "out")
    assert done.returncode == 3, done.stderr
    assert f"no space to write {small_disk / 'out'}" in done.stderr
    assert not list(small_disk.iterdir())


def test_a_run_on_a_read_only_medium_is_verified(tiny_run, tmp_path):
    """What is inflated goes to TMPDIR; nothing is written into the run."""
    root, temporary = copy_run(tiny_run, tmp_path), tmp_path / "temporary"
    temporary.mkdir()
    mounted("--bind", root, root)
    try:
        mounted("-o", "remount,ro,bind", root)
        done = sqft("verify", root, temporary=temporary)
        assert done.returncode == 0, done.stderr
        assert "artifacts match their seals" in done.stdout
        assert not list(temporary.glob("sqft-*"))  # torch keeps files there
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_a_full_temporary_folder_is_named_by_verify(tiny_run, small_disk, tmp_path):
    root = copy_run(tiny_run, tmp_path)
    (small_disk / "filling").write_bytes(bytes(900_000))
    done = sqft("verify", root, temporary=small_disk)
    assert done.returncode == 3, done.stderr
    assert f"no space to write {small_disk}" in done.stderr
