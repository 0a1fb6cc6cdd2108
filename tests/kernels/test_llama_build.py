"""The plug-in in unmodified llama.cpp, built from the source package of llama-cpp-python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llama_builds
import numpy as np
import pytest
from compiled import CHECKED, objects

from conftest import ROOT
from sqft_export.kernels.build import PLUGIN_SOURCES
from sqft_export.kernels.llama_plugin import PLUGIN_FILE, check_build

sys.path.insert(0, str(ROOT / "benchmarks"))
import llama_plugin as benchmark

HERE = Path(__file__).parent
Q8_KEYS = 8  # ggml's type of quantized keys and values

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(llama_builds.missing_tools()), reason=f"missing: {llama_builds.missing_tools()}"
    ),
    pytest.mark.skipif(
        not PLUGIN_FILE.is_file(), reason="the plug-in: python -m sqft_export.kernels.build"
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The embedded model with its weights quantized: INT4 dense and at 50 %, INT8 at 50 %."""
    from sqft_export.packed.gguf_file import read_gguf
    from sqft_export.recipe.schema import Export
    from sqft_export.targets.gguf import export

    folder = tmp_path_factory.mktemp("gguf")
    export(ROOT / "sqft_export" / "builtin" / "tiny", folder, Export())
    floats, made = read_gguf(folder / "model.gguf"), {}
    for name, (bits, sparsity) in benchmark.FILES.items():
        made[name] = folder / f"{name}.gguf"
        benchmark.write_quantized(floats, made[name], bits, sparsity)
    return made


@pytest.fixture(scope="module")
def shared() -> dict[str, str]:
    return llama_builds.environment("shared")


class Result:
    """Logits per model ``[1 + new tokens, vocabulary]``, and the lines of the plug-in."""

    def __init__(self, out: Path, stderr: str):
        arrays = np.load(out)
        self.logits = [arrays[name] for name in arrays.files]
        self.lines = [line for line in stderr.splitlines() if line.startswith("sqft:")]

    @property
    def tokens(self) -> list[int]:
        return self.logits[0].argmax(axis=1).tolist()


def run(models: list[Path], variables: dict[str, str], out: Path, **job) -> Result:
    text = json.dumps({"models": list(map(str, models)), "out": str(out), **job})
    done = subprocess.run(
        [sys.executable, HERE / "llama_run.py", text],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Result(out, done.stderr)


def divergence(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the mean KL divergence from ``exact``."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("name", benchmark.FILES)
def test_greedy_tokens_and_kl_are_those_of_llama_cpp(files, shared, tmp_path, name):
    """Activations in groups of 32 cost no more than in llama.cpp; ``SQFT_EXACT`` costs nothing."""
    out = tmp_path / "logits.npz"
    # With the same tokens, so that positions can be compared.
    job = {"new_tokens": 40, "forced": True}
    stock = run([files[name]], shared, out, plugin=False, **job)
    exact = run([files[name]], shared | {"SQFT_EXACT": "1"}, out, **job)
    ours = run([files[name]], shared, out, **job)
    assert ours.lines == exact.lines and "tensors on our kernels" in ours.lines[0]
    assert stock.lines == []
    assert np.mean(np.array(ours.tokens) == exact.tokens) > 0.9
    of_stock, of_ours = (divergence(one.logits[0], exact.logits[0]) for one in (stock, ours))
    assert 0 < of_ours < max(1.5 * of_stock, 0.005)
    usual = run([files[name]], shared, out, plugin=False)
    assert run([files[name]], shared, out).tokens[:3] == usual.tokens[:3]


@pytest.mark.parametrize("name", benchmark.FILES)
def test_shapes_can_be_timed_against_those_of_llama_cpp(files, shared, tmp_path, name):
    """llama.cpp takes no weight of another type or shape than its own repacking knows."""
    out = tmp_path / "logits.npz"
    usual = run([files[name]], shared, out)
    timed = run([files[name]], shared | {"SQFT_CHOICE": "measured"}, out)
    assert timed.tokens[:3] == usual.tokens[:3]


def test_sparse_and_dense_forms_give_the_same_bits(files, shared, tmp_path):
    out = tmp_path / "logits.npz"
    for name in ("int4_50", "int8_50"):
        sparse, dense = (
            run([files[name]], shared | {"SQFT_FORM": form}, out) for form in ("sparse", "dense")
        )
        assert "; 0 sparse" in dense.lines[0] and "; 0 sparse" not in sparse.lines[0]
        assert np.array_equal(sparse.logits[0], dense.logits[0])


@pytest.mark.parametrize(
    "job",
    [
        {"threads": 1},
        {"threads": 4},
        {"batch": 5},
        {"load_mode": 0},
        {"load_mode": 3},
        {"again": True},
    ],
    ids=str,
)
def test_results_do_not_depend_on_threads_batches_and_loading(files, shared, tmp_path, job):
    file, out = files["int4_50"], tmp_path / "logits.npz"
    usual, other = run([file], shared, out), run([file], shared, out, **job)
    assert other.tokens == usual.tokens
    np.testing.assert_allclose(other.logits[0], usual.logits[0], atol=0.05)
    if "batch" not in job:  # llama.cpp's attention sums otherwise for other batches
        assert np.array_equal(other.logits[0], usual.logits[0])


def test_quantized_keys_and_two_models_at_once(files, shared, tmp_path):
    out, names = tmp_path / "logits.npz", ("int4_50", "int8_50")
    both = run([files[name] for name in names], shared, out)
    assert "28 q4_0, 30 q8_0" in both.lines[0]  # and the Q8_0 heads of both
    for name, logits in zip(names, both.logits, strict=True):
        assert np.array_equal(run([files[name]], shared, out).logits[0], logits)
    assert run([files["int4_50"]], shared, out, kv=Q8_KEYS).tokens[0] == both.tokens[0]


@pytest.fixture(scope="module")
def adapter(files) -> Path:
    """A random LoRA file for two matrices of the first block."""
    import gguf

    from sqft_export.packed.gguf_file import read_gguf

    reader = read_gguf(files["int4_50"])
    shapes = {t.name: tuple(map(int, t.shape[::-1])) for t in reader.tensors}
    out, rng = files["int4_50"].with_name("lora.gguf"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        rows, inputs = shapes[name]
        for part, shape in (("lora_a", (4, inputs)), ("lora_b", (rows, 4))):
            values = rng.normal(size=shape).astype(np.float32) * np.float32(0.1)
            writer.add_tensor(f"{name}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_an_adapter_is_added_to_the_products_of_our_kernels(files, adapter, shared, tmp_path):
    file, out = [files["int4_50"]], tmp_path / "logits.npz"
    job = {"lora": str(adapter), "forced": True}
    stock, ours = run(file, shared, out, plugin=False, **job), run(file, shared, out, **job)
    exact = run(file, shared | {"SQFT_EXACT": "1"}, out, **job)
    without = run(file, shared | {"SQFT_EXACT": "1"}, out, forced=True)
    assert "tensors on our kernels" in ours.lines[0]
    of_stock, of_ours = (divergence(one.logits[0], exact.logits[0]) for one in (stock, ours))
    assert of_ours < max(1.5 * of_stock, 0.005)
    assert divergence(without.logits[0], exact.logits[0]) > 10 * of_ours


def test_the_cache_is_shifted_in_the_middle_of_an_answer(files, shared, tmp_path):
    """Not with quantized keys: llama.cpp itself crashes there (ggml 0.25.3)."""
    file, out = [files["int8_50"]], tmp_path / "logits.npz"
    job = {"shift": 8, "forced": True}
    sparse, dense = (
        run(file, shared | {"SQFT_FORM": form}, out, **job) for form in ("sparse", "dense")
    )
    assert np.array_equal(sparse.logits[0], dense.logits[0])
    stock = run(file, shared, out, plugin=False, **job)
    assert divergence(sparse.logits[0], stock.logits[0]) < 0.01
    unshifted = run(file, shared, out, forced=True)
    assert divergence(unshifted.logits[0][1:], sparse.logits[0][1:]) > 0.01


def test_releases_with_separate_backends_load_it_by_a_variable(files, shared, tmp_path):
    variables = llama_builds.environment("dynamic")
    found = check_build(Path(variables["LLAMA_CPP_LIB_PATH"]) / "libggml.so")
    assert found.supported and found.variable == "GGML_BACKEND_PATH"
    out = tmp_path / "logits.npz"
    variables["GGML_BACKEND_PATH"] = str(PLUGIN_FILE)
    ours = run([files["int4_50"]], variables, out, plugin=False)
    assert "tensors on our kernels" in ours.lines[0]
    assert ours.tokens == run([files["int4_50"]], shared, out).tokens


def test_a_program_with_the_backend_linked_in_takes_it_preloaded(files, shared, tmp_path):
    """llama.cpp's own example program, compiled here."""
    bin_folder, vendored = llama_builds.build("shared"), llama_builds.source() / "vendor/llama.cpp"
    program = tmp_path / "llama-simple"
    includes = ["-I", vendored / "include", "-I", vendored / "ggml/include"]
    libraries = ["-L", bin_folder, "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{bin_folder}"]
    source = vendored / "examples/simple/simple.cpp"
    subprocess.run(["g++", "-std=c++17", source, *includes, *libraries, "-o", program], check=True)
    found = check_build(program)
    assert found.supported and found.variable == "LD_PRELOAD"
    command = [program, "-m", files["int4_50"], "-n", "6", "Tom has"]
    texts = []
    for setting in ("off", ""):
        preloaded = {"LD_PRELOAD": str(PLUGIN_FILE), "SQFT_GGML": setting}
        done = subprocess.run(command, env=os.environ | preloaded, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("tensors on our kernels" in done.stderr) == (setting == "")
        texts.append(done.stdout)
    assert "Tom has" in texts[0] and texts[0] == texts[1]


def test_the_benchmark_ends_with_ratios(shared, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "llama_plugin.py", "--small", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--threads", "1", "--only", "7b_int4_50"],
        env=os.environ | shared,
        capture_output=True,
        text=True,
        check=True,
    )
    ratios = json.loads(done.stdout.splitlines()[-1])["ratios"]
    assert ratios["7b_int4_50_decode_1_over_llama_cpp"]["median"] > 0
    assert ratios["7b_int4_50_prompt_1_over_llama_cpp"]["median"] > 0


def test_benchmark_measures_a_folder_on_both_kernels(files, shared, tmp_path):
    folder = files["int4_50"].parent / "deployment"
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    folder.mkdir()
    for name in names:
        shutil.copy(files["int4_50"].parent / name, folder)
    shutil.copy(files["int4_50"], folder / "model.gguf")
    command = [sys.executable, "-m", "sqft_export.cli", "benchmark", folder, "--json"]
    command += ["--execution", "stock,auto", "--prompt-tokens", "8", "--new-tokens", "2"]
    command += ["--batch", "1", "--rounds", "1"]

    def measure(**variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | shared | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = measure()
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["folders"]
    assert set(measured) == {"deployment, stock", "deployment, auto"}
    refused = measure(SQFT_GGML="off")
    assert refused.returncode == 2 and "not used: SQFT_GGML=off" in refused.stderr


def test_no_access_outside_memory(tmp_path):
    """The plug-in and the small host as one program, with checkers of memory and arithmetic."""
    program = tmp_path / "checked"
    sources = [HERE / "ggml_checked.cpp", HERE / "ggml_host.cpp"]
    sources += [PLUGIN_FILE.parent / name for name in PLUGIN_SOURCES]
    # Host and plug-in declare the same virtual functions in classes of different names.
    flags = (*CHECKED, "-fno-sanitize=vptr", "-rdynamic")
    command = ["g++", "-std=c++17", "-O1", *flags, *sources]
    command += [*objects(tmp_path, *CHECKED), "-pthread", "-ldl", "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "products" in done.stdout


def test_cyllama_hides_its_ggml():
    """Why the extra ``gguf-runtime`` can't run our kernels."""
    cyllama = pytest.importorskip("cyllama")
    (library, *_) = Path(cyllama.__file__).parent.rglob("llama_cpp*.so")
    assert "static build" in check_build(library).reason
