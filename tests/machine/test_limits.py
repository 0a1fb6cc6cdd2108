"""Memory and processors of a control group, read from files as the kernel writes them."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sqft_export.artifacts.store import environment
from sqft_export.machine import host, limits
from sqft_export.machine.limits import free_memory, processor_quota

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A tree of control groups: ``groups(version, {file: text})`` puts this process into a/b."""

    def make(version: int, files: dict[str, str]) -> None:
        mount = tmp_path / "cgroup"
        for name, text in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(text + "\n")
        kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory,cpu"
        (tmp_path / "mountinfo").write_text(f"30 20 0:26 / {mount} rw,nosuid - {kind}\n")
        own = "0::/a/b" if version == 2 else "3:memory,cpu:/a/b"
        (tmp_path / "self").write_text(f"{own}\n")

    monkeypatch.setattr(limits, "CGROUP_FILE", tmp_path / "self")
    monkeypatch.setattr(limits, "MOUNTS_FILE", tmp_path / "mountinfo")
    return make


@pytest.mark.parametrize("folder", ["a/b", "a", "."])
@pytest.mark.parametrize(
    ("version", "limit", "used"),
    [
        (2, "memory.max", "memory.current"),
        (1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_free_memory_is_what_the_group_and_those_above_it_leave(
    groups, version, limit, used, folder
):
    groups(version, {f"{folder}/{limit}": str(GIB), f"{folder}/{used}": str(GIB // 4)})
    assert free_memory() == GIB - GIB // 4


def test_files_that_the_kernel_can_drop_are_free(groups):
    groups(
        2,
        {
            "a/b/memory.max": str(GIB),
            "a/b/memory.current": str(GIB),
            "a/b/memory.stat": f"anon 5\ninactive_file {GIB // 2}",
        },
    )
    assert free_memory() == GIB // 2


@pytest.mark.parametrize("unlimited", ["max", str(2**63 - 4096)])
def test_without_a_limit_the_host_decides(groups, unlimited):
    version, name = (2, "memory.max") if unlimited == "max" else (1, "memory.limit_in_bytes")
    groups(version, {f"a/b/{name}": unlimited, "a/b/cpu.max": "max 100000"})
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert free_memory() == pytest.approx(1024 * int(available[1]), rel=0.2)
    assert processor_quota() is None


def test_a_container_sees_its_own_group_as_the_root(groups, tmp_path):
    """Version 1 in docker: the path is the host's, what is mounted is the group itself."""
    groups(1, {"memory.limit_in_bytes": str(GIB), "memory.usage_in_bytes": "0"})
    mounts = tmp_path / "mountinfo"
    mounts.write_text(mounts.read_text().replace(" / ", " /a/b "))
    assert free_memory() == GIB


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (2, {"a/b/cpu.max": "150000 100000"}, 2),
        (2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "20000 100000"}, 1),
        (1, {"a/b/cpu.cfs_quota_us": "300000", "a/b/cpu.cfs_period_us": "100000"}, 3),
        (1, {"a/b/cpu.cfs_quota_us": "-1", "a/b/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_threads_are_no_more_than_the_quota_rounded_up(groups, version, files, expected):
    groups(version, files)
    assert processor_quota() == expected
    affinity = len(os.sched_getaffinity(0))
    assert host.allowed_processors() == min(affinity, expected or affinity)


def test_a_limited_address_space_is_less_memory():
    """ulimit -v, as batch systems set it."""
    code = (
        "from sqft_export.machine.limits import free_memory; from sqft_export.machine.host import "
        "float32_fits; print(free_memory(), float32_fits(2**28))"
    )
    size = 2 * GIB
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        cwd=Path(__file__).parents[2],
    )
    free, fits = done.stdout.split()
    assert 0 < int(free) < size and fits == "False"


@pytest.mark.parametrize(
    ("setting", "threads"), [("4,2", 4), ("3", 3), ("", None), ("many", None), ("0", None)]
)
def test_threads_of_openmp_as_the_standard_has_them(monkeypatch, setting, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert environment()["threads"] == (threads or host.allowed_processors())


def test_the_address_space_is_counted_in_pages(tmp_path, monkeypatch):
    """As /proc/self/statm has it; a system without it has the whole limit left."""
    with (tmp_path / "statm").open("w") as file:
        file.write("256 100 50 1 0 60 0\n")
    monkeypatch.setattr(limits, "STATM_FILE", tmp_path / "statm")
    assert limits._address_space() == 256 * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(limits, "STATM_FILE", tmp_path / "none")
    assert limits._address_space() == 0


def test_without_meminfo_memory_is_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MEMINFO_FILE", tmp_path / "none")
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert limits._host_memory() == pages
