"""The self-test of a deployment passes where nothing is broken, and names what is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf import GGUFReader
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import ROOT, SQFT, random_model
from sqft_export.errors import UserError
from sqft_export.kernels import build
from sqft_export.kernels.library import find_kernels
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.packed import loaders
from sqft_export.packed.seal import write_seal
from sqft_export.probes.document import PROBE, Probe, ProbeChat, ProbeText, read_probe
from sqft_export.probes.results import SelfTest
from sqft_export.probes.selftest import test_deployment as self_test
from sqft_export.probes.setup import Setup
from sqft_export.probes.texts import equal_engines
from sqft_export.probes.writing import answer_prompts
from sqft_export.recipe.schema import Export
from sqft_export.targets import openvino, target
from sqft_export.targets.openvino import OpenVinoSession
from sqft_export.targets.tokenizers import write_openvino_tokenizers
from sqft_export.targets.torch import TorchSession

RUNTIMES = ("openvino", "onnx", "gguf")
TEXTS = ("Question: how many apples are left?\nAnswer:", "1,234.50 + 7")
MESSAGES = [{"role": "user", "content": "How many apples are left?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = 200  # tokens of the long prompt; the context is 256


def make_model(folder: Path, **config) -> Path:
    """A random model with a chat template and a probe."""
    random_model(folder, **config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return add_probe(folder)


def add_probe(folder: Path) -> Path:
    """Write the probe of a model folder."""
    session, tokenizer = TorchSession(load_model(Checkpoint(folder))), load_tokenizer(folder)
    draw = np.random.RandomState(0)
    prompts = [draw.randint(5, 400, length).tolist() for length in (12, 17, 20)]
    made = answer_prompts(session, prompts, 6)
    [long] = answer_prompts(session, [draw.randint(5, 400, LONG).tolist()], 3)
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    chat = ProbeChat(messages=MESSAGES, arguments={}, ids=ids, readers=[])
    Probe(
        version=1,
        vocabulary=session.vocabulary,
        divergence=0.1,
        prompts=[*made, long.model_copy(update={"beyond": f"{LONG} tokens"})],
        texts=[ProbeText(text=text, ids=tokenizer(text)["input_ids"]) for text in TEXTS],
        chat=chat,
    ).write(folder)
    return folder


def load_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def deploy(model: Path, folder: Path, runtime: str) -> Path:
    """Export a model with its probe."""
    folder.mkdir(parents=True)
    target(runtime).export(model, folder, Export())
    probe = read_probe(model)
    readers = {"readers": equal_engines(probe.chat, runtime, folder)}
    probe = probe.model_copy(update={"chat": probe.chat.model_copy(update=readers)})
    probe.write(folder)
    write_seal(folder, {})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("probed") / "model")


@pytest.fixture(scope="module")
def deployments(model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("deployments")
    return {runtime: deploy(model, root / runtime, runtime) for runtime in RUNTIMES}


@pytest.fixture
def copies(deployments, tmp_path) -> dict[str, Path]:
    """Deployments of this test, to damage."""
    return {name: Path(shutil.copytree(f, tmp_path / name)) for name, f in deployments.items()}


def run(folder: Path, long: bool = False) -> SelfTest:
    """The self-test of a folder after a change by another program."""
    write_seal(folder, {})
    return self_test(folder, read_probe(folder), 1, Setup(threads=1), long)


def change_probe(folder: Path, **fields) -> None:
    read_probe(folder).model_copy(update=fields).write(folder)


def only_cause(found: SelfTest) -> str:
    assert not found.passed
    [cause] = found.causes
    return cause


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nothing_is_named_where_nothing_is_broken(deployments, runtime, threads):
    probe = read_probe(deployments[runtime])
    assert probe.chat.readers
    found = self_test(deployments[runtime], probe, 1, Setup(threads=threads), long=True)
    assert found.passed and not found.causes, found.lines()
    assert [mode.mode for mode in found.modes] == ["exact", "default"]
    exact = found.modes[0]
    assert exact.same_top == exact.positions > 30 and exact.largest_kl < 1e-5
    assert len(found.texts) == 2 + len(probe.chat.readers)


def computes_in_bfloat16() -> bool:
    """Whether OpenVINO's default mode rounds everything to bfloat16 on this processor."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("instructions", ["AVX", "AVX2", "AVX512_CORE_BF16"])
def test_instruction_sets_give_no_false_alarm(deployments, instructions):
    # OpenVINO chooses bfloat16 by the processor, and fails if oneDNN may not use it.
    if computes_in_bfloat16() != (instructions == "AVX512_CORE_BF16"):
        pytest.skip(f"OpenVINO can't run on this processor with oneDNN's {instructions}")
    done = verify(deployments["openvino"], "--long", ONEDNN_MAX_CPU_ISA=instructions)
    assert done.returncode == 0, done.stderr


def verify(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """`sqft-export verify` in a process that can't import torch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sqft_export.cli import main\n"
        f"sys.argv = ['sqft-export', 'verify', {str(folder)!r}, *{options!r}]\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_deployment_is_tested_without_torch(deployments, runtime):
    done = verify(deployments[runtime], "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "match their seal" in done.stdout and "exact mode" in done.stdout
    assert "default mode" in done.stdout and "--long" in done.stdout


def test_a_merged_folder_is_tested_in_torch(model):
    found = self_test(model, read_probe(model), 0, Setup(), long=True)
    assert found.passed and found.runtime == "torch", found.lines()


def permute_head(folder: Path, runtime: str) -> None:
    if runtime == "gguf":
        reader = GGUFReader(folder / "model.gguf", "r+")
        [head] = [one for one in reader.tensors if one.name == "output.weight"]
        head.data[:] = head.data[::-1].copy()
        return
    if runtime == "onnx":
        change_initializers(folder, lambda name: "lm_head" in name, lambda array: flip(array))
        return
    import openvino as ov
    from openvino import opset13 as ops

    graph = ov.Core().read_model(folder / "openvino_model.xml")
    [head] = [n for n in graph.get_ops() if n.get_friendly_name().endswith("lm_head.weight")]
    permuted = ops.constant(head.data[::-1].copy())
    for consumer in head.output(0).get_target_inputs():
        consumer.replace_source_output(permuted.output(0))
    ov.save_model(graph, folder / "changed.xml", compress_to_fp16=False)
    del graph
    for ending in ("xml", "bin"):
        (folder / f"changed.{ending}").replace(folder / f"openvino_model.{ending}")


def flip(array: np.ndarray) -> np.ndarray:
    """Reverse the vocabulary, which is one of the axes."""
    axis = max(range(array.ndim), key=lambda one: array.shape[one])
    return np.flip(array, axis).copy()


def change_initializers(folder: Path, wanted, change) -> None:
    """Change initializers of the ONNX graph whose names are wanted."""
    graph = onnx.load(folder / "model.onnx")
    found = [one for one in graph.graph.initializer if wanted(one.name)]
    assert found, [one.name for one in graph.graph.initializer]
    for one in found:
        one.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(one)), one.name))
    (folder / "model.onnx.data").unlink()
    onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_permuted_head_is_named(copies, runtime):
    permute_head(copies[runtime], runtime)
    assert only_cause(run(copies[runtime])).startswith("output head: its rows are in another order")


def test_another_rope_theta_is_named(copies, model, tmp_path):
    reader = GGUFReader(copies["gguf"] / "model.gguf", "r+")
    field = reader.fields["llama.rope.freq_base"]
    field.parts[field.data[0]][0] = 500_000.0
    del reader
    assert only_cause(run(copies["gguf"])).startswith("positions: the rotary table, rope theta")
    merged = Path(shutil.copytree(model, tmp_path / "merged"))
    config = json.loads((merged / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500_000.0
    (merged / "config.json").write_text(json.dumps(config))
    cause = only_cause(self_test(merged, read_probe(merged), 0, Setup()))
    assert cause.startswith("positions: the rotary table, rope theta")


def test_a_truncated_rope_table_is_named_by_the_long_prompts(copies):
    def repeat_last(table: np.ndarray) -> np.ndarray:
        return np.concatenate([table[:100], np.repeat(table[99:100], len(table) - 100, axis=0)])

    change_initializers(copies["onnx"], lambda name: name.endswith("_cache"), repeat_last)
    assert run(copies["onnx"]).passed  # short prompts end before the cut
    cause = only_cause(run(copies["onnx"], long=True))
    assert cause.startswith("positions beyond 200 tokens: the rotary table"), cause


def test_an_8_bit_cache_is_named(copies):
    """OpenVINO reads the cache's type from the graph."""
    import openvino as ov

    if computes_in_bfloat16():
        pytest.skip("bfloat16 products differ more than an 8-bit cache")
    folder = copies["openvino"]
    change_probe(folder, divergence=1e-5)
    assert run(folder).passed
    graph = ov.Core().read_model(folder / "openvino_model.xml")
    graph.set_rt_info("u8", ["runtime_options", "KV_CACHE_PRECISION"])
    ov.save_model(graph, folder / "changed.xml", compress_to_fp16=False)
    del graph
    (folder / "changed.xml").replace(folder / "openvino_model.xml")
    (folder / "changed.bin").replace(folder / "openvino_model.bin")
    found = run(folder)
    assert [mode.passed for mode in found.modes] == [True, False], found.lines()
    assert only_cause(found).startswith("cache precision: with KV_CACHE_PRECISION=f32")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory) -> Path:
    """The same attention with keys that float16 can't hold."""
    folder = random_model(tmp_path_factory.mktemp("overflow") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name:
            tensor *= 2.0**20
        if "q_proj" in name:
            tensor *= 2.0**-20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return add_probe(folder)


@pytest.mark.parametrize("runtime", ["openvino", "gguf"])
def test_float16_overflow_of_the_cache_is_named(overflowing, tmp_path, runtime):
    if runtime == "openvino" and computes_in_bfloat16():
        pytest.skip("OpenVINO's cache has keys in bfloat16, which hold them")
    found = run(deploy(overflowing, tmp_path / runtime, runtime))
    assert [mode.passed for mode in found.modes] == [True, False], found.lines()
    assert any(cause.startswith("cache precision") for cause in found.causes), found.causes
    assert any(cause.startswith("float16 overflow") for cause in found.causes), found.causes


def rotate_ids(folder: Path) -> None:
    """The tokenizer of another model: the same tokens in another order."""
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    ids = [vocabulary[token] for token in tokens]
    document["model"]["vocab"] = dict(zip(tokens, ids[:4] + ids[5:] + ids[4:5], strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_swapped_tokenizer_is_named(copies, runtime):
    rotate_ids(copies[runtime])
    if runtime == "openvino":
        write_openvino_tokenizers(copies[runtime], copies[runtime])
    found = run(copies[runtime])
    cause = only_cause(found)
    assert cause.startswith("another tokenizer")
    failed = {one.name.rpartition(" by ")[2] for one in found.texts if not one.passed}
    own = {"openvino": {"OpenVINO GenAI"}, "onnx": {"ONNX Runtime GenAI"}}.get(runtime, set())
    assert {"tokenizer.json"} | own <= failed, failed


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_stale_chat_template_is_named(copies, runtime):
    folder = copies[runtime]
    file = folder / "chat_template.jinja"
    file.write_text(TEMPLATE.replace("<assistant>", "<|assistant|>"))
    found = run(folder)
    assert only_cause(found) == "another chat template than the one of training"
    file.unlink()
    if runtime != "gguf":  # the template inside of the file is used then
        assert "a chat template is missing" in run(folder).causes


def test_activation_rounding_is_named(tiny_run, tmp_path):
    values = {"onnx": "accuracy_level=1", "gguf": "float32 weights and activations"}
    for runtime, value in values.items():
        source = tiny_run[f"export-{runtime}"].path / "model"
        folder = Path(shutil.copytree(source, tmp_path / runtime))
        change_probe(folder, divergence=1e-6)
        assert only_cause(run(folder)).startswith(f"activation rounding: with {value}")


class Fault:
    """An error of a kernel in this process: the logits of some calls are halved."""

    def __init__(self, monkeypatch, happens):
        forward = OpenVinoSession.forward

        def halved(session, ids, mask=None, last=None):
            logits = forward(session, ids, mask, last)
            return 0.5 * logits if happens(session, ids) else logits

        monkeypatch.setattr(OpenVinoSession, "forward", halved)


def test_a_kernel_that_is_wrong_on_one_instruction_set_is_named(copies, monkeypatch):
    """A process that is limited to another instruction set has no such kernel."""
    Fault(monkeypatch, lambda session, ids: True)
    cause = only_cause(run(copies["openvino"]))
    assert cause.startswith("instruction set: with ONEDNN_MAX_CPU_ISA=")


def test_wrong_prompts_with_right_single_tokens_are_named(copies, monkeypatch):
    Fault(monkeypatch, lambda session, ids: ids.shape[1] > 1)
    cause = only_cause(run(copies["openvino"]))
    assert cause.startswith("prompts of several tokens in one pass: with prompts token by token")


def test_a_number_of_threads_that_computes_wrongly_is_named(copies, monkeypatch):
    open_session, wanted = openvino.open_session, {}

    def recorded(folder, exact, threads, *others, **options):
        session = open_session(folder, exact, threads, *others, **options)
        wanted[id(session)] = threads  # a machine with one processor uses fewer
        return session

    monkeypatch.setattr(openvino, "open_session", recorded)
    Fault(monkeypatch, lambda session, ids: wanted[id(session)] == 2)
    folder = copies["openvino"]
    found = self_test(folder, read_probe(folder), 1, Setup(threads=2))
    assert only_cause(found).startswith("thread count: with --threads 1")


@pytest.mark.slow
def test_a_wrong_kernel_of_this_package_is_named(tiny_run, tmp_path, monkeypatch):
    """Only the AVX2 kernels are wrong; the products in float32 are right."""
    if find_kernels().name != "avx2":
        pytest.skip("this processor runs other kernels")
    sources = tmp_path / "kernels"
    shutil.copytree(build.HERE, sources)
    text = (sources / "avx2.c").read_text()
    product = "madd_epi16(a, _mm256_set1_epi16("
    assert f"{product}1))" in text
    (sources / "avx2.c").write_text(text.replace(f"{product}1))", f"{product}2))"))
    monkeypatch.setattr(build, "HERE", sources)
    monkeypatch.setattr(build, "extension_file", lambda: sources / "broken.so")
    library = str(build.build_extension())
    monkeypatch.setattr(loaders, "openvino_extension", lambda: library)
    folder = Path(shutil.copytree(tiny_run["export-openvino"].path / "sparse", tmp_path / "sparse"))
    found = run(folder)
    assert [mode.passed for mode in found.modes] == [True, False], found.lines()
    assert only_cause(found).startswith("kernels of this package (avx2)")


def test_faults_exit_with_5_and_the_cause_is_in_the_message(copies):
    permute_head(copies["gguf"], "gguf")
    write_seal(copies["gguf"], {})
    done = verify(copies["gguf"])
    assert done.returncode == 5
    assert "FAILED  exact mode" in done.stdout
    assert "verify failed" in done.stderr and "likely cause: output head" in done.stderr
    document = json.loads(verify(copies["gguf"], "--json").stdout)
    assert document["passed"] is False and document["causes"][0].startswith("output head")


def test_a_changed_file_is_refused_before_the_runtime_reads_it(copies):
    permute_head(copies["gguf"], "gguf")
    done = verify(copies["gguf"])
    assert done.returncode == 4 and "model.gguf" in done.stderr
    (copies["gguf"] / "provenance.json").unlink()
    done = verify(copies["gguf"])
    assert done.returncode == 5 and "no seal to compare with" in done.stdout


def test_a_wrong_device_is_refused(deployments):
    done = verify(deployments["onnx"], "--device", "cuda")
    assert (
        done.returncode == 2 and "found cuda, which onnx can't use on this machine" in done.stderr
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"more": 1}, "more"),
        ({"divergence": "nan"}, "divergence"),
        ({"prompts": []}, "prompts"),
        ({"vocabulary": 10}, "the vocabulary has 10 tokens"),
    ],
)
def test_a_hostile_probe_is_refused(copies, change, message):
    file = copies["gguf"] / PROBE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as raised:
        read_probe(copies["gguf"])
    assert PROBE in str(raised.value)


def test_a_probe_that_is_too_large_or_inconsistent_is_refused(copies):
    file = copies["gguf"] / PROBE
    document = json.loads(file.read_text())
    document["prompts"][0]["continuation"][0] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="token 0 is not the most likely one"):
        read_probe(copies["gguf"])
    file.write_text(" " * 2**23)
    with pytest.raises(UserError, match="at most 4,194,304 are read"):
        read_probe(copies["gguf"])


def test_every_deployment_of_a_run_carries_the_probe(tiny_run):
    merged = read_probe(tiny_run["merge"].path / "model")
    assert [one.beyond for one in merged.prompts] == [None] * 6 + ["126 tokens", "252 tokens"]
    for runtime in RUNTIMES:
        for kind in ("model", "packed", "sparse"):
            folder = tiny_run[f"export-{runtime}"].path / kind
            if folder.is_dir():
                probe = read_probe(folder)
                assert probe.prompts == merged.prompts
                command = [SQFT, "verify", str(folder), "--long"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
