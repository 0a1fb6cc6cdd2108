"""The plug-in for llama.cpp, in a small host of our own: products, settings, refusals.

``test_llama_build.py`` runs it in llama.cpp itself.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ggml_products import (
    BLOCK,
    Q4_0,
    Q4_1,
    Q8_0,
    load_host,
    multiply,
    multiply_experts,
    random_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft_export.errors import UserError
from sqft_export.kernels.llama_plugin import (
    PLUGIN_FILE,
    check_build,
    load_plugin,
    require_plugin,
    use_in_llama_cpp,
)

HERE = Path(__file__).parent
ORDER = "the structures of this ggml differ from those we know"
WRONG = "a test product was wrong"
# What DOCTOR changes in the host -> why the plug-in refuses it.
DOCTORED = {
    "size": ORDER,
    "field": ORDER,
    "operator": ORDER,
    "buffer": ORDER,
    "version": "this ggml has an interface version that we do not know",
    "no cpu": "this ggml has loaded no CPU backend",
    "no list": "the CPU backend of this ggml has no list of buffer types",
    "late": "a model was loaded before; load the plug-in first",
    "functions": WRONG,
    "product": WRONG,
}
# What a version script hides -> why the plug-in refuses the host.
HIDDEN = {
    "local: ggml_barrier;": "the CPU backend of this ggml hides its barrier",
    "local: _Z39ggml_backend_cpu_get_extra_buffer_typesv;": "hides its list of buffer types",
    "local: ggml_new_graph;": "this ggml has no function ggml_new_graph",
    "global: ggml_backend_load; local: *;": "a static build",
}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing"),
    pytest.mark.skipif(
        not PLUGIN_FILE.is_file(), reason="the plug-in: python -m sqft_export.kernels.build"
    ),
]


@pytest.fixture(scope="module")
def host_object(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("host") / "host.o"
    flags = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden")
    subprocess.run(["g++", *flags, "-c", HERE / "ggml_host.cpp", "-o", out], check=True)
    return out


def link(host_object: Path, hidden: str = "") -> Path:
    """Return the host as a library, without some of its symbols."""
    out = host_object.with_name(f"host{abs(hash(hidden))}.so")
    options = []
    if hidden:
        script = out.with_suffix(".map")
        script.write_text(f"{{ {hidden} }};")
        options = [f"-Wl,--version-script={script}"]
    command = ["g++", "-shared", host_object, "-pthread", "-ldl", *options, "-o", out]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def host_file(host_object) -> Path:
    return link(host_object)


@pytest.fixture(scope="module")
def host(host_file):
    """The plug-in, loaded with its defaults."""
    return load_host(host_file, PLUGIN_FILE)


def run(host: Path, code: str, **environment: str) -> str:
    """Run Python that finds the host as ``HOST`` and the plug-in as ``PLUGIN``; return stderr."""
    code = f"HOST, PLUGIN = {str(host)!r}, {str(PLUGIN_FILE)!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


LOAD = """
import ctypes
library = ctypes.CDLL(HOST)
library.ggml_backend_load.restype = ctypes.c_void_p
assert bool(library.ggml_backend_load(PLUGIN.encode())) is EXPECTED
"""
TAKEN, REFUSED = LOAD.replace("EXPECTED", "True"), LOAD.replace("EXPECTED", "False")


@pytest.mark.parametrize("doctor", DOCTORED)
def test_a_host_with_another_interface_is_refused_with_one_line(host_file, doctor):
    said = run(host_file, REFUSED, DOCTOR=doctor)
    assert said == f"sqft: our kernels are not used: {DOCTORED[doctor]}\n"


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_host_with_hidden_functions_is_refused_with_one_line(host_object, hidden):
    said = run(link(host_object, hidden), REFUSED)
    assert HIDDEN[hidden] in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("doctor", ["number", "newer"])
def test_operator_numbers_and_buffer_types_are_read_from_the_host(host_file, doctor):
    """Version 3 of the interface has more functions in a buffer type."""
    assert run(host_file, TAKEN, DOCTOR=doctor) == ""


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SQFT_GGML", "off", "SQFT_GGML=off"),
        ("SQFT_GROUP", "7", "SQFT_GROUP: found '7'; allowed are 32, 64 and 128"),
        ("SQFT_FORM", "x" * 99, f"SQFT_FORM: found '{'x' * 40}'; allowed are auto, dense and spar"),
        ("SQFT_EXACT", "yes", "SQFT_EXACT: found 'yes'; allowed are 0 and 1"),
        ("SQFT_CHOICE", "fast", "SQFT_CHOICE: found 'fast'; allowed are ours and measured"),
        ("SQFT_KERNELS", "mmx", "SQFT_KERNELS: this processor has no kernels of that name"),
    ],
)
def test_settings_that_keep_our_kernels_out(host_file, variable, value, message):
    said = run(host_file, REFUSED, **{variable: value})
    assert said.startswith(f"sqft: our kernels are not used: {message}")
    assert len(said.splitlines()) == 1


def test_a_second_ggml_of_a_process_is_refused(host_file, tmp_path):
    other = shutil.copy(host_file, tmp_path / "other.so")
    second = f"HOST = {str(other)!r}\n{REFUSED}"
    assert "another ggml of this process uses them" in run(host_file, TAKEN + second)


def rounded(x: np.ndarray, group: int = 32) -> np.ndarray:
    """Return activations rounded to 8 bits per group, as the kernels round them."""
    parts = x.reshape(len(x), -1, group)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    factor = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0)
    codes = np.rint(parts * factor.astype(np.float32)).astype(np.float64)
    return (codes * (largest / np.float32(127))).reshape(x.shape)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Q4_0, Q4_1, Q8_0]),
    rows=st.integers(1, 80),
    blocks_per_row=st.integers(1, 9),
    tokens=st.sampled_from([1, 2, 3, 5, 9]),
    zeros=st.sampled_from(["none", "half", "pairs"]),
    repeats=st.sampled_from([1, 2, 4]),
    threads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_file(
    host, kind, rows, blocks_per_row, tokens, zeros, repeats, threads, seed
):
    """Weights are exact; activations are rounded in groups of 32. All bytes come back."""
    shape = (rows, blocks_per_row * BLOCK)
    blocks, weight = random_weight(kind, shape, zeros, repeats, seed)
    x = np.random.default_rng(seed).normal(size=(tokens, shape[1])).astype(np.float32)
    y, stored = multiply(host, kind, blocks, x, rows, threads)
    expected = rounded(x) @ weight.T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(stored, blocks)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([Q4_0, Q4_1, Q8_0]),
    experts=st.integers(1, 5),
    rows=st.integers(1, 70),
    blocks_per_row=st.integers(1, 5),
    tokens=st.sampled_from([1, 2, 9, 70]),
    used=st.integers(1, 3),
    threads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_every_token_is_multiplied_with_its_experts(
    host, kind, experts, rows, blocks_per_row, tokens, used, threads, seed
):
    """Groups differ between experts: one has a scale per block, others share scales."""
    inputs, rng = blocks_per_row * BLOCK, np.random.default_rng(seed)
    made = [
        random_weight(kind, (rows, inputs), "half" if n % 2 else "none", 1 << n % 3, seed + n)
        for n in range(experts)
    ]
    blocks, weights = np.concatenate([one for one, _ in made]), [w for _, w in made]
    x = rng.normal(size=(tokens, inputs)).astype(np.float32)
    ids = rng.integers(0, experts, (tokens, used)).astype(np.int32)
    found = multiply_experts(host, kind, blocks, (experts, rows, inputs), x, ids, threads)
    assert found is not None
    expected = np.stack(
        [[weights[e] @ v for e in row] for row, v in zip(ids, rounded(x), strict=True)]
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(found[1], blocks)


def test_experts_stay_with_a_host_that_computes_them_differently(host_file):
    """Only experts do: other weights are on our kernels."""
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import numpy as np\nfrom pathlib import Path\n"
        "from ggml_products import *\n"
        "host = load_host(Path(HOST), Path(PLUGIN))\n"
        "blocks, weight = random_weight(Q4_0, (70, 64), 'none', 1, 0)\n"
        "x, ids = np.ones((1, 64), np.float32), np.zeros((1, 1), np.int32)\n"
        "multiply(host, Q4_0, blocks, x, 70)\n"
        "assert multiply_experts(host, Q4_0, blocks, (1, 70, 64), x, ids) is None\n"
    )
    assert "1 tensors on our kernels" in run(host_file, code, DOCTOR="experts")


CHOICE = """
import sys
sys.path.insert(0, HERE)
import numpy as np
from pathlib import Path
from ggml_products import *
host = load_host(Path(HOST), Path(PLUGIN))
blocks, weight = random_weight(Q4_1, (700, 640), "none", 1, 0)
x, ids = np.ones((1, 640), np.float32), np.zeros((1, 1), np.int32)
try:
    multiply(host, Q4_1, blocks, x, 700)
    taken = True
except AssertionError:
    taken = False
assert taken is EXPECTED
assert multiply_experts(host, Q4_1, blocks, (1, 700, 640), x, ids) is not None
"""


@pytest.mark.parametrize(
    ("doctor", "choice", "taken"),
    [("", "measured", True), ("fast", "measured", False), ("fast", "ours", True)],
)
def test_a_shape_that_the_host_multiplies_faster_is_left_to_it(host_file, doctor, choice, taken):
    """Experts are not."""
    code = f"HERE = {str(HERE)!r}\n{CHOICE.replace('EXPECTED', str(taken))}"
    printed = run(host_file, code, DOCTOR=doctor, SQFT_CHOICE=choice)
    assert printed.count("tensors on our kernels") == 1 + taken


def test_a_long_prompt_is_computed_in_several_passes(host):
    blocks, weight = random_weight(Q4_0, (70, 64), "none", 1, 3)
    x = np.random.default_rng(3).normal(size=(257, 64)).astype(np.float32)  # 128 + 128 + 1
    y, _ = multiply(host, Q4_0, blocks, x, 70, threads=3)
    np.testing.assert_allclose(y, rounded(x) @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_weight_set_in_parts_is_multiplied_by_the_host(host):
    blocks, weight = random_weight(Q8_0, (70, 64), "none", 1, 4)
    x = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
    y, stored = multiply(host, Q8_0, blocks, x, 70, parts=3)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(stored, blocks)


def test_a_minimum_that_is_no_multiple_of_the_scale_stays_with_the_host(host):
    blocks, weight = random_weight(Q4_1, (70, 64), "none", 1, 5)
    blocks = blocks.reshape(-1, 20)
    blocks[3, 2:4] = np.float16(0.123).reshape(1).view(np.uint8)
    x = np.zeros((1, 64), np.float32)
    x[0, 32:] = 0.3  # not exact in 8 bits
    x[0, 40] = 0.7
    y, _ = multiply(host, Q4_1, blocks.reshape(-1), x, 70)
    others = np.arange(70) != 1  # block 3 is of row 1
    exact = x.astype(np.float64) @ weight.T
    np.testing.assert_allclose(y[:, others], exact[:, others], rtol=1e-5, atol=1e-6)
    assert abs(y[0, 1] - exact[0, 1]) > 0.1


OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, HERE)
import numpy as np
from pathlib import Path
from ggml_products import *
host = load_host(Path(HOST), Path(PLUGIN))
blocks, weight = random_weight(Q8_0, (70, 64), "none", 1, 4)
x = np.random.default_rng(4).normal(size=(2, 64)).astype(np.float32)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
y, stored = multiply(host, Q8_0, blocks, x, 70, threads=1)
assert np.allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5)
assert np.array_equal(stored, blocks)
"""


def test_a_weight_stays_with_the_host_if_memory_for_packing_is_exhausted(host_file):
    """A piece of memory for packed weights has 64 MiB."""
    assert run(host_file, f"HERE = {str(HERE)!r}\n{OUT_OF_MEMORY}") == ""


def products_of(host_file: Path, **environment: str) -> tuple[str, float]:
    """Return digest and relative error of the products that ``ggml_products`` computes."""
    done = subprocess.run(
        [sys.executable, HERE / "ggml_products.py", host_file, PLUGIN_FILE],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    digest, error = done.stdout.split()
    assert "tensors on our kernels" in done.stderr
    return digest, float(error)


def test_sparse_and_dense_forms_give_the_same_bits(host_file):
    sparse, dense = (products_of(host_file, SQFT_FORM=form)[0] for form in ("sparse", "dense"))
    assert sparse == dense


def test_activations_are_exact_or_rounded_in_the_chosen_groups(host_file):
    assert products_of(host_file, SQFT_EXACT="1")[1] < 1e-6
    in_32, in_128 = (products_of(host_file, SQFT_GROUP=group)[1] for group in ("32", "128"))
    assert 1e-4 < in_32 < in_128 < 3e-2


def test_kernels_can_be_named(host_file):
    assert 1e-4 < products_of(host_file, SQFT_KERNELS="plain")[1] < 3e-2


def test_check_reports_a_supported_and_a_refused_build(host_file, host_object, monkeypatch):
    found = check_build(host_file)
    assert found.supported and not found.reason and not found.gpu and found.kernels
    monkeypatch.setenv("DOCTOR", "gpu")
    assert check_build(host_file).gpu
    monkeypatch.setenv("DOCTOR", "size")
    assert check_build(host_file).reason == ORDER
    monkeypatch.delenv("DOCTOR")
    static = check_build(link(host_object, "local: *;"))
    assert not static.supported and "a static build" in static.reason
    program = check_build(Path(shutil.which("true") or "/bin/true"))
    assert not program.supported and "no visible ggml" in program.reason
    with pytest.raises(UserError, match="no such file"):
        check_build(Path("/nowhere/llama-server"))


@pytest.fixture(scope="module")
def program(host_file) -> Path:
    """A program that is linked with the host, as llama.cpp's are with ggml."""
    source, out = host_file.with_name("program.c"), host_file.with_name("program")
    source.write_text("int main(void) { return 7; }")
    command = ["gcc", source, "-Wl,--no-as-needed", host_file, "-o", out]
    subprocess.run([*command, f"-Wl,-rpath,{host_file.parent}"], check=True)
    return out


def test_check_tells_how_a_program_loads_the_plugin(program, monkeypatch):
    linked_in = check_build(program)
    assert linked_in.supported and linked_in.variable == "LD_PRELOAD"
    monkeypatch.setenv("DOCTOR", "dynamic")
    separate = check_build(program)
    assert separate.supported and separate.variable == "GGML_BACKEND_PATH"


def test_a_program_with_the_plugin_preloaded_runs_and_prints_refusals(program):
    for doctor, printed in (("", ""), ("size", f"sqft: our kernels are not used: {ORDER}\n")):
        preloaded = {"LD_PRELOAD": str(PLUGIN_FILE), "DOCTOR": doctor}
        done = subprocess.run([program], env=os.environ | preloaded, capture_output=True, text=True)
        assert done.returncode == 7 and done.stderr == printed


def test_a_refusal_in_this_process_is_one_error(host_file, tmp_path, host):
    other = shutil.copy(host_file, tmp_path / "other.so")
    with pytest.raises(UserError, match="another ggml"):
        load_plugin(Path(other), PLUGIN_FILE)


def command(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sqft_export.cli", "llama-plugin", *words],
        capture_output=True,
        text=True,
    )


def test_the_command_prints_what_to_write_before_a_program(host_file):
    assert command().stdout == f"GGML_BACKEND_PATH={PLUGIN_FILE}\n"
    checked = command("--check", host_file)
    assert "supported (ggml test" in checked.stdout and "use_in_llama_cpp" in checked.stdout
    refused = command("--check", shutil.which("true") or "/bin/true")
    assert refused.returncode == 2 and "no visible ggml" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_without_llama_cpp_python_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("sqft_export.kernels.llama_plugin.find_spec", lambda name: None)
    monkeypatch.setattr("sqft_export.kernels.llama_plugin.extension_module", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'sqft-export\[llama-cpp\]'"):
        use_in_llama_cpp()


def test_a_plugin_that_was_not_built_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sqft_export.kernels.llama_plugin.PLUGIN_FILE", tmp_path / "libsqft.so")
    with pytest.raises(UserError, match=r"libsqft\.so is missing; python -m"):
        require_plugin()
