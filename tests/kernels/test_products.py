"""Products straight from mask and kept codes: against sums in float64, on every kernel."""

import ctypes
import platform
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy as np
import pytest
from compiled import CHECKED, TESTS, emulated_library, objects, run
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft_export.errors import DamagedError
from sqft_export.kernels.extension import HERE
from sqft_export.kernels.library import (
    Matrix,
    _pointer,
    allocate_aligned,
    count_kept,
    find_kernels,
    kernel_library,
    multiply,
    open_library,
    pack_matrix,
    plan_matrix,
    read_header,
    unpack_matrix,
)

X86 = platform.machine() == "x86_64"
KERNELS = ["plain", *(["avx2", "avx2-vnni", "avx512", "avx512-amx"] if X86 else ["neon"])]


@cache
def emulated() -> Any:
    """Kernels of all x86 processors, on any of them."""
    return open_library(emulated_library(Path(mkdtemp(prefix="sqft-kernels-"))))


def library(kernels: str | None = None) -> Any:
    """The package's own, where this machine runs those kernels; else they are emulated."""
    return kernel_library() if find_kernels(kernels) else emulated()


class Case(NamedTuple):
    """A matrix, its codes with one byte each, and the zero point of each code."""

    matrix: Matrix
    codes: np.ndarray
    zero: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """float64 ``[rows, inputs]``."""
        scale = np.repeat(self.matrix.scale.astype(np.float64), self.matrix.group, 1)
        return (self.codes.astype(np.float64) - self.zero) * scale


def case(bits, rows, inputs, group, asymmetric, kept, signed=False, seed=0) -> Case:
    """:param kept: share of the codes, or "2:4"."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (rows, inputs)).astype(np.uint8)
    zero = np.full((rows, inputs // group), 2 ** (bits - 1), np.uint8)
    if asymmetric:
        zero = random.integers(0, 2**bits, zero.shape).astype(np.uint8)
    beside = np.repeat(zero, group, 1)
    if kept == "2:4":
        chosen = (random.random((rows, inputs // 4, 4)).argsort(2) < 2).reshape(rows, inputs)
    else:
        chosen = random.random(codes.shape) < kept
    codes = np.where(chosen, codes, beside)
    flip = 2 ** (bits - 1) if signed else 0
    stored = codes.reshape(-1) ^ np.uint8(flip)
    if bits == 4:
        stored = np.append(stored, np.zeros(stored.size % 2, np.uint8))
        stored = stored[0::2] | stored[1::2] << 4
    scale = (random.random(zero.shape) * 0.02 + 0.001).astype(np.float16)
    matrix = Matrix(bits, rows, inputs, stored, flip, zero if asymmetric else None, scale)
    return Case(matrix, codes, beside)


def laid_out(found: Case, form: str, kernels: str) -> np.ndarray:
    here = find_kernels(kernels, library(kernels))
    assert here is not None, kernels
    kept = count_kept(found.matrix, library(kernels)).counts
    header = plan_matrix(found.matrix, form, here.lanes, kept, library(kernels))
    assert header is not None
    out = allocate_aligned(header.bytes, 64)
    pack_matrix(header, found.matrix, kept, out, library(kernels))
    return out


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """Activations as int8 by groups make them, float64."""
    parts = x.reshape(len(x), -1, group)
    most = np.abs(parts).max(2, keepdims=True)
    factor = np.float32(127) / np.where(most > 0, most, 1)
    whole = np.rint((parts * factor).astype(np.float32)).astype(np.float64)
    return (whole * (most / np.float32(127))).reshape(x.shape)


SHAPES = st.sampled_from(
    [
        *((32, 128, 32), (33, 128, 16), (7, 48, 48), (64, 512, 128), (5, 64, 64), (3, 30, 30)),
        *((40, 384, 384), (1, 16, 16), (17, 256, 256)),
    ]
)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    shape=SHAPES,
    bits=st.sampled_from([4, 8]),
    asymmetric=st.booleans(),
    kept=st.sampled_from(["2:4", 0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 11),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_every_format_is_the_product_in_float64(
    kernels, shape, bits, asymmetric, kept, seed, tokens, size
):
    rows, inputs, group = shape
    if kept == "2:4" and inputs % 4:
        kept = 0.5
    found = case(bits, rows, inputs, group, asymmetric, kept, signed=not asymmetric, seed=seed)
    x = np.random.default_rng(seed).standard_normal((tokens, inputs)) * size
    x = x.astype(np.float32)
    for form in ["dense", "mask", *(["pairs"] if kept == "2:4" else [])]:
        blob = laid_out(found, form, kernels)
        for mode in ("one", "many", "exact"):
            y = multiply(blob, x, mode, kernels, library(kernels))
            seen = x if mode == "exact" else rounded(x, read_header(blob, "x", library()).group)
            expected = seen.astype(np.float64) @ found.weight.T
            scale = np.abs(seen).astype(np.float64) @ np.abs(found.weight).T
            assert (np.abs(y - expected) <= 1e-6 * scale + 1e-30).all(), (form, mode)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits, asymmetric", [(4, False), (4, True), (8, False), (8, True)])
def test_a_token_is_multiplied_alike_whatever_stands_beside_it(bits, asymmetric, kernels):
    """Bit for bit, in parts of blocks of 16 and of 32 tokens."""
    found = case(bits, 40, 384, 96, asymmetric, 0.5)
    x = np.random.default_rng(0).standard_normal((69, 384)).astype(np.float32)
    for form in ("dense", "mask"):
        blob = laid_out(found, form, kernels)
        together = multiply(blob, x, "many", kernels, library(kernels))
        for count in (1, 15, 16, 17, 31, 32, 33):
            some = multiply(blob, x[-count:], "many", kernels, library(kernels))
            assert np.array_equal(some, together[-count:]), (form, count)


@pytest.mark.skipif(not X86, reason="names the kernels of x86")
def test_matrix_registers_give_the_same_bits():
    found = case(4, 40, 384, 96, True, 0.5)
    x = np.random.default_rng(0).standard_normal((37, 384)).astype(np.float32)
    both = [
        multiply(laid_out(found, "mask", kernels), x, "many", kernels, library(kernels))
        for kernels in ("avx512", "avx512-amx")
    ]
    assert np.array_equal(*both)


@pytest.mark.parametrize("form", ["dense", "mask", "pairs"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_laid_out_is_read_back_bit_for_bit(form, kernels):
    for bits, asymmetric in ((4, False), (4, True), (8, False), (8, True)):
        found = case(bits, 37, 256, 128, asymmetric, "2:4")
        back = unpack_matrix(laid_out(found, form, kernels), "x", library(kernels))
        assert np.array_equal(back.codes, found.codes)
        assert np.array_equal(back.scale, found.matrix.scale)
        assert np.array_equal(np.repeat(back.zero_point, back.grid.group_size, 1), found.zero)


@pytest.mark.parametrize("form", ["dense", "mask", "pairs"])
@pytest.mark.parametrize("bits, asymmetric", [(4, False), (4, True), (8, False), (8, True)])
def test_a_row_is_looked_up_as_it_was(bits, asymmetric, form):
    found = case(bits, 37, 192, 192, asymmetric, "2:4")
    for kernels in KERNELS:
        blob, row = laid_out(found, form, kernels), np.empty(192, np.float32)
        for index in (0, 7, 8, 31, 36):
            library(kernels).sqft_row(_pointer(blob), ctypes.c_size_t(index), _pointer(row))
            assert np.array_equal(row, found.weight[index].astype(np.float32)), (kernels, index)


def test_two_of_four_is_seen_only_where_it_is():
    assert count_kept(case(4, 8, 64, 32, False, "2:4").matrix).pairs
    assert not count_kept(case(4, 8, 64, 32, False, 0.7).matrix).pairs


def test_zeros_make_it_smaller():
    dense = laid_out(case(4, 64, 1024, 128, False, 0.5), "dense", "plain")
    sizes = [len(laid_out(case(4, 64, 1024, 128, False, k), "mask", "plain")) for k in (0.5, 0.25)]
    assert sizes[1] < sizes[0] < 0.8 * len(dense)


def test_a_damaged_matrix_is_refused_by_name():
    """Every number that says where something is, and a mask that keeps more than there is."""
    whole = laid_out(case(4, 33, 128, 32, False, 0.5), "mask", "plain")
    header = read_header(whole, "layer", library())
    places = [(0, 1), *((at, 4) for at in range(8, 52, 4)), *((at, 8) for at in range(64, 104, 8))]
    for at, size in places:
        if at == 48:  # group, which follows from the others, is compared as a whole
            continue
        broken = allocate_aligned(len(whole), 64)
        broken[:] = whole
        broken[at : at + size] ^= 85
        with pytest.raises(DamagedError, match="layer"):
            read_header(broken, "layer", library())
    broken = allocate_aligned(len(whole), 64)
    broken[:] = whole
    broken[header.fixed + 2 * 16 :][:64] = 255
    with pytest.raises(DamagedError, match="layer"):
        read_header(broken, "layer", library())
    with pytest.raises(DamagedError, match="layer"):
        read_header(whole[:-1], "layer", library())


def compiled_cases(folder: Path, compiler: str, *flags: str, emulated: bool = False) -> str:
    made = folder / "every_shape"
    parts = objects(folder, *flags, compiler=compiler, emulated=emulated)
    source = str(TESTS / "every_shape.c")
    run(compiler, *flags, "-I", str(HERE), source, *parts, "-lm", "-o", str(made))
    return str(made)


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="names the kernels of x86")
def test_no_byte_outside_is_touched(tmp_path):
    """Every shape under AddressSanitizer and UBSan, in buffers of exactly their size."""
    program = compiled_cases(tmp_path, "gcc", *CHECKED, emulated=True)
    assert "cases" in run(program, *KERNELS)


@pytest.mark.slow
def test_neon_is_right_too(tmp_path):
    """Cross-compiled, and run by qemu-user: right, not timed."""
    compiler = "aarch64-linux-gnu-gcc"
    if not shutil.which(compiler) or not shutil.which("qemu-aarch64"):
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user")
    program = compiled_cases(tmp_path, compiler, "-static")
    assert "cases" in run("qemu-aarch64", program, "plain", "neon")
