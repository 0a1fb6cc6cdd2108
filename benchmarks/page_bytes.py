"""Bytes that a page downloads, and seconds to unpack them: plain, gzip, brotli, packed (.sqft).

    python benchmarks/page_bytes.py runs/tiny/export-onnx-<key>/model [--megabits 20 100]

The weights of a page are those of the ONNX deployment. Hosts send gzip or brotli, which the browser
unpacks by itself; a packed file would be unpacked by code of the page. The seconds of gzip and
brotli are those of their C libraries on one thread, those of .sqft of our C code on one thread.
A page waits for the download and for the part of unpacking that does not overlap with it.
"""

import argparse
import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from document import finish, spread, table

from sqft_export.machine.host import installed
from sqft_export.packed.folders import NothingSaved, pack, packed_file, unpack
from sqft_export.targets.folder import graph_and_weights

REPEATS = 3
BROTLI_QUALITY = 11  # the highest; hosts compress static files once
GZIP_LEVEL = 9


def seconds_of(work: Callable[[], object]) -> dict[str, float]:
    samples = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        samples.append(time.perf_counter() - started)
    return spread(samples)


def compressed(data: bytes) -> dict[str, tuple[int, dict[str, float]]]:
    """Form -> bytes and seconds to unpack, of the forms that a host sends."""
    zipped = gzip.compress(data, GZIP_LEVEL)
    found = {
        "plain": (len(data), spread([0.0])),
        "gzip": (len(zipped), seconds_of(lambda: gzip.decompress(zipped))),
    }
    if installed("brotli"):
        import brotli

        small = brotli.compress(data, quality=BROTLI_QUALITY)
        found["brotli"] = (len(small), seconds_of(lambda: brotli.decompress(small)))
    else:
        print("brotli: missing: pip install brotli")
    return found


def packed(deployment: Path, scratch: Path) -> dict[str, tuple[int, dict[str, float]]]:
    """Form -> bytes and seconds to unpack, of the packed files."""
    found = {}
    for form, entropy in ((".sqft", False), (".sqft, entropy", True)):
        folder = scratch / form
        try:
            pack(deployment, folder, entropy)
        except NothingSaved as error:
            print(f"{form}: {error}")
            continue
        file = packed_file(folder)
        assert file is not None
        found[form] = (file.stat().st_size, seconds_of(partial(unpack_once, folder)))
    return found


def unpack_once(folder: Path) -> None:
    out = folder.with_name(f"{folder.name} unpacked")
    shutil.rmtree(out, ignore_errors=True)
    unpack(folder, out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--megabits", type=float, nargs="+", default=[20.0, 100.0])
    chosen = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    _, weights = graph_and_weights(chosen.deployment)
    with tempfile.TemporaryDirectory() as scratch:
        found = compressed(weights.read_bytes()) | packed(chosen.deployment, Path(scratch))
    rows, values = [], {}
    plain = found["plain"][0]
    for form, (size, unpacking) in found.items():
        waits = [8 * size / rate / 1e6 + unpacking["median"] for rate in chosen.megabits]
        rows.append([form, size, size / plain, unpacking["median"], *waits])
        values[form] = {"bytes": size, "unpack_seconds": unpacking}
    speeds = [f"s at {rate:g} Mbit/s" for rate in chosen.megabits]
    table(["", "bytes", "of plain", "unpack s", *speeds], rows)
    finish("page_bytes", {}, values)


if __name__ == "__main__":
    main()
