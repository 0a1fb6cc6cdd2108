"""Kernels compiled for a test: for other processors, or with a checker of memory."""

import subprocess
from pathlib import Path

from sqft_export.kernels.build import SOURCES
from sqft_export.kernels.extension import HERE

TESTS = Path(__file__).parent
# Instructions that this machine may lack, as functions.
EMULATED = {
    "avx512.c": "emulated_avx512.h",
    "amx.c": "emulated_amx.h",
    "avx2_vnni.c": "emulated_avx_vnni.h",
}
PLAIN = ("-O1", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
CHECKED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def objects(folder: Path, *flags: str, compiler: str = "gcc", emulated: bool = False) -> list[str]:
    """Every source, compiled."""
    made = []
    for source in SOURCES:
        made.append(str(folder / f"{source}.o"))
        instead = []
        if emulated and source in EMULATED:
            instead = ["-DSQFT_EMULATED", "-include", str(TESTS / EMULATED[source])]
        run(compiler, *PLAIN, *flags, *instead, "-c", str(HERE / source), "-o", made[-1])
    return made


def emulated_library(folder: Path) -> Path:
    """One that has the kernels of all x86 processors on any of them."""
    out = folder / "emulated.so"
    run("gcc", "-shared", *objects(folder, emulated=True), "-lm", "-o", str(out))
    return out
