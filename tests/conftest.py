"""Shared fixtures: small random models, and one finished run of the embedded recipe."""

import functools
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library reads it when it is imported
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Before torch counts them: runtimes wait for each other's threads in a spin, so that workers
    # on the same processors stand in each other's way.
    count, mine = (os.environ[f"PYTEST_XDIST_WORKER{end}"] for end in ("_COUNT", ""))
    processors = sorted(os.sched_getaffinity(0))
    share = processors[int(mine.removeprefix("gw")) :: int(count)]
    os.sched_setaffinity(0, share or processors)

if hasattr(os, "sched_getaffinity"):
    # Commands that tests start compute with as many threads as tests do, however busy it is.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sqft_export.cli import main
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.telemetry import disable_telemetry

disable_telemetry()
ROOT = Path(__file__).parent.parent
SQFT = str(Path(sys.executable).parent / "sqft-export")
TINY = ROOT / "sqft_export" / "builtin" / "tiny"
SHARED = ROOT.parent / "shared" / "data"
# Everything the recipe does, at a size that fits a test.
SMALL = (
    "adapt.steps=12",
    "adapt.batch=8",
    "adapt.save_steps=4",
    "calibration.samples=16",
    "benchmark.items=8",
    "benchmark.repeats=2",
    "benchmark.rounds=1",
    "benchmark.new_tokens=4",
    "verify.prompts=8",
)


# A part of the embedded problems, for models made here: checks and training read all of them.
FEW_PROBLEMS = tuple(
    f"task.{split}={ROOT / 'tests' / 'problems' / split}.jsonl" for split in ("train", "test")
)

# Files whose cases are shared among workers: each case makes an expensive fixture.
SHARED_FILES = ("tests/model/test_families.py",)
# Files that take half a minute or more, the longest first; workers take them in this order.
LONG_FILES = (
    "tests/test_documents.py",
    "tests/verify/test_certificate.py",
    "tests/commands/test_compiling.py",
    "tests/targets/test_gguf.py",
    "tests/targets/test_exports.py",
    "tests/probes/test_selftest.py",
    "tests/test_fuzz.py",
    "tests/stages/test_pipelines.py",
    "tests/test_wheel.py",
    "tests/report/test_cards.py",
    "tests/model/test_reconstruction.py",
    "tests/packed/test_packed_files.py",
    "tests/kernels/test_execution.py",
    "tests/stages/test_untrained.py",
    "tests/stages/test_given.py",
    "tests/measure/test_batches.py",
    "tests/run/test_gates.py",
    "tests/report/test_runs.py",
    "tests/measure/test_harness.py",
    "tests/verify/test_chat_answers.py",
    "tests/stages/test_chat_recipe.py",
    "tests/test_examples.py",
    "tests/test_import.py",
    "tests/verify/test_lengths.py",
    "tests/test_misuse.py",
    "tests/data/test_chat_trl.py",
)
UNITS_DURING_RUN = 4  # enough work for other workers while one runs the embedded recipe


def work_unit(nodeid: str) -> str:
    """The tests that one worker runs: of a file, of a case in a shared file, or of ``own_run``.

    Fixtures of a module are expensive, so that two workers must not make the same one.
    """
    file, _, test = nodeid.partition("::")
    if requests_fixture(file, "own_run"):
        return "own_run"
    case = test.partition("[")[2] if file in SHARED_FILES else ""
    return f"{file}[{case}" if case else file


@functools.cache
def requests_fixture(file: str, *fixtures: str) -> bool:
    """Whether the tests of a file ask for one of these fixtures."""
    path = ROOT / file
    text = path.read_text() if path.is_file() else ""
    return any(re.search(rf"\b{fixture}\b", text) for fixture in fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put work units that take long first, so that all workers end at about the same time.

    One worker runs the embedded recipe first. Meanwhile the others have units without it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    files: dict[str, set[str]] = {}
    for item in items:
        files.setdefault(work_unit(item.nodeid), set()).add(item.nodeid.partition("::")[0])
    order = {file: number for number, file in enumerate(LONG_FILES)}
    units = sorted(files, key=lambda unit: min(order.get(f, len(order)) for f in files[unit]))
    with_run = [
        u for u in units if any(requests_fixture(f, "tiny_run", "tiny_cli") for f in files[u])
    ]
    without = [unit for unit in units if unit not in with_run]
    first = [*with_run[:1], *without[:UNITS_DURING_RUN]]
    units = [*first, *(unit for unit in units if unit not in first)]
    place = {unit: number for number, unit in enumerate(units)}
    items.sort(key=lambda item: place[work_unit(item.nodeid)])


def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Give work units to workers; xdist 3.8's groups have no effect in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class WorkUnitScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return work_unit(nodeid)

    config.option.loadscopereorder = False  # units stay in the order of the items
    return WorkUnitScheduling(config, log)


def pytest_collection_finish() -> None:
    """Leave libraries out of later collections of garbage, which exports request by themselves."""
    gc.collect()
    gc.freeze()


def small_recipe(*overrides: str, name: str = "tiny", model_path: Path | None = None) -> Recipe:
    """A recipe at the size of a test; models made here have rows that no blocks of 32 fit."""
    few = FEW_PROBLEMS if model_path and name == "tiny" else ()
    targets = ("export.targets=[openvino, onnx]",) if model_path else ()
    settings = (*SMALL, *targets, *few, *overrides)
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", settings, model_path)


def start_run(root: Path) -> subprocess.Popen:
    """The embedded recipe on the command line, as a user starts it."""
    return subprocess.Popen(
        [SQFT, "run", "recipes/tiny.yaml", *SMALL, "--runs", str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def sqft_here(monkeypatch, capfd):
    """The command line in this process: it saves the start of Python for every command."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [SQFT, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code, out, err)

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def tiny_cli(tmp_path_factory) -> subprocess.CompletedProcess:
    """The finished command; ``args[-1]`` is a copy of its runs that belongs to this process."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded"
    record = shared / "command.json"
    with FileLock(f"{shared}.lock"):
        if not record.exists():
            _run_once(shared / "runs", record)
    shutil.copytree(shared / "runs", base / "runs")
    out, err = json.loads(record.read_text())
    args = ["sqft-export", "run", "recipes/tiny.yaml", "--runs", str(base / "runs")]
    return subprocess.CompletedProcess(args, 0, out, err)


def _run_once(root: Path, record: Path) -> None:
    root.mkdir(parents=True)
    process = start_run(root)
    out, err = process.communicate()
    assert process.returncode == 0, err
    record.write_text(json.dumps([out, err]))


@pytest.fixture(scope="session")
def tiny_run(tiny_cli) -> dict:
    """Artifacts of the embedded recipe, run to its report."""
    return run_recipe(small_recipe(), Path(tiny_cli.args[-1]) / "tiny")


def random_model(folder: Path, seed: int = 0, model_type: str = "llama", **config) -> Path:
    """A folder of a model with random weights and the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    known = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in sizes.items() if hasattr(known, name)}
    made = AutoConfig.for_model(model_type, **(sizes | config))
    model = AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "proj_bias")):  # else zeros, which would hide a lost one
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1:  # norms: else ones
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    for name, value in model.state_dict().items():
        if name.endswith("layer_scalar"):  # a stored buffer: else one
            value.normal_(1, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory) -> Path:
    return random_model(tmp_path_factory.mktemp("llama"))


def exact_pipeline(folder: Path, **properties: str):
    """A folder in OpenVINO GenAI, in float32 throughout."""
    import openvino_genai

    return openvino_genai.LLMPipeline(
        str(folder),
        "CPU",
        INFERENCE_PRECISION_HINT="f32",
        DYNAMIC_QUANTIZATION_GROUP_SIZE=0,
        KV_CACHE_PRECISION="f32",
        **properties,
    )


def exact_onnx(deployed: Path, folder: Path) -> Path:
    """A copy of an ONNX folder that does not round activations to int8, as torch does not."""
    import onnx

    from sqft_export.targets.onnx.session import set_accuracy

    shutil.copytree(deployed, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    set_accuracy(model.graph, 1)
    onnx.save(model, folder / "model.onnx")
    return folder


def said_by_onnx_genai(model, prompt, new_tokens: int) -> list[int]:
    """Greedy ids that an ``onnxruntime_genai.Model`` puts after a prompt's."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    said = []
    while not generator.is_done():
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    return said


def copy_run(artifacts: dict, root: Path) -> Path:
    """A private copy of a run's folder, to damage."""
    source = next(iter(artifacts.values())).path.parent
    return Path(shutil.copytree(source, root / "copy"))


def test_prompts(count: int) -> list[str]:
    lines = (TINY / "test.jsonl").read_text().splitlines()[:count]
    return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]


test_prompts.__test__ = False


# What `run` decides for a model and data is kept; only training and measurements are shortened.
SHORT = (
    "adapt.epochs=1",
    "benchmark.items=2",
    "benchmark.repeats=2",
    "benchmark.new_tokens=4",
    "verify.prompts=2",
)


def write_conversations(file: Path, count: int) -> Path:
    """A file of conversations about sums, all different."""
    with file.open("w") as lines:
        for number in range(count):
            a, b = number % 9 + 1, number // 9 + 1
            messages = [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


@dataclass(frozen=True)
class OwnRun:
    """A finished run of a model and data: its working folder and its output."""

    folder: Path
    done: subprocess.CompletedProcess

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "tiny"


@pytest.fixture(scope="session")
def own_run(tmp_path_factory) -> OwnRun:
    """The embedded model on conversations, by one command without a recipe."""
    folder = tmp_path_factory.mktemp("own")
    write_conversations(folder / "chats.jsonl", 40)
    command = [SQFT, "run", "builtin:tiny", "--data", "chats.jsonl", *SHORT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return OwnRun(folder, done)
