"""Commands of README and docs run exactly as printed.

Words in angle brackets stand for a folder or file of the finished run. A command that takes long
runs in a dry form: `make` prints its commands, the recipes of `run` and `sweep` are loaded, and
`benchmark` measures little. Every other block is in EXPLAINED, with the reason.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import ROOT, SQFT
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.overrides import split_values

COMMANDS = ("make", "sqft-export", "python", ".venv/bin/python", "pip", "git", "llama-cli", "echo")
COMMANDS += ("lms",)
# The first words of a block or command that does not run here, and why.
EXPLAINED = {
    "git clone": "needs the network",
    "make test": "is this suite itself",
    "pip install": "needs the network; tests/test_makefile.py tests what `make` installs",
    "llama-cli": "llama.cpp's programs are not installed; model cards run the file in cyllama",
    "llama-server": "llama.cpp's programs are not installed",
    "sqft-export llama-plugin --check": "needs a program of llama.cpp; tests/kernels has one",
    "GGML_BACKEND_PATH=": "needs a program of llama.cpp; tests/kernels has one",
    "sqft_export.use_in_llama_cpp": "needs llama-cpp-python; tests/kernels compiles it",
    "docker run": "needs the image of OpenVINO Model Server",
    '{"messages"': "a line of a data file",
    "sqft-export run HuggingFaceTB": "needs the hub; tests/commands has another model",
    "sqft-export run google/gemma": "needs the hub; tests/model/test_wrappers.py has small models",
    "sqft-export chat runs/SmolLM2": "needs that run; the same command for runs/tiny is run",
    "sqft-export benchmark deployed/openvino deployed/onnx --data": "needs a chat template; "
    "tests/measure/test_own_data.py has one",
    "sqft-export serve runs/SmolLM2": "needs that run; tests/commands serves another",
    "sqft-export serve <folder>": "serves until Ctrl-C; tests/commands/test_serving.py starts it",
    "sqft-export serve --web": "serves until Ctrl-C; tests/web opens the page",
    "sqft-export verify <deployment> --device vulkan": "needs a GPU or .software-gpu; "
    "tests/targets/test_vulkan.py",
    "export AWS_ENDPOINT_URL": "needs an object store; tests/artifacts/test_remote.py",
    "vllm serve": "needs vLLM; tests/targets/test_gptq_readers.py",
    "sqft-export benchmark <deployment> --device cuda": "needs a GPU for inference",
    "cd runs/tiny/export-gguf": "needs Ollama",
    "cp -r runs/tiny/export-onnx": "needs Foundry Local",
    "tensorboard --logdir": "starts a server; tests/report/test_loggers.py reads the files",
    "ollama create": "needs Ollama",
    "lms": "needs LM Studio",
    "adapt            340/2000": "a line that a run prints",
    "within a day": "a line that `plan` prints",
    "sparsify: {method": "two fields of a recipe, checked below",
    "openvino_genai.AdapterConfig": "a part of model cards (tests/report/test_cards.py)",
    "adapters = onnxruntime_genai": "a part of model cards as well",
}
# Options of `benchmark` that need what is not here.
UNAVAILABLE = {"--lm-eval": "data from the hub", "--device gpu": "a GPU for inference"}
PROJECT_FILES = ("Makefile", "pyproject.toml", "constraints.txt")
RECIPE_COMMANDS = ("run", "plan", "export", "sweep")
# Options of RECIPE_COMMANDS whose value is no setting.
OPTIONS_WITH_VALUES = ("--shard", "--search", "--trials", "--minimize", "--maximize", "--threads")
OPTIONS_WITH_VALUES += ("--ray-address",)
QUICK = "--rounds 1 --prompt-tokens 8 --new-tokens 2 --batch 1 --items 2"


@dataclass(frozen=True)
class Block:
    """A block of a document: where it is, its language (empty if indented) and its text."""

    place: str
    language: str
    text: str


def blocks_of(file: Path) -> list[Block]:
    """Fenced and indented blocks, and commands in inline code that have an argument."""
    lines, found, at = file.read_text().split("\n"), [], 0
    name = file.relative_to(ROOT)
    while at < len(lines):
        end = at + 1
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1) + 1
            text = "\n".join(lines[at + 1 : end - 1])
            found.append(Block(f"{name}:{at + 1}", lines[at].removeprefix("```"), text))
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            text = "\n".join(line[4:] for line in lines[at:end])
            found.append(Block(f"{name}:{at + 1}", "", text))
        else:
            for code in re.findall(r"`((?:make|sqft-export|python -m) [^`]* [^`]*)`", lines[at]):
                found.append(Block(f"{name}:{at + 1}", "", code))
        at = end
    return found


GENERATED = ("cli.md", "recipe.md")  # tests/test_reference.py compares these
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(f for f in (ROOT / "docs").rglob("*.md") if f.name not in GENERATED),
    *sorted((ROOT / "benchmarks" / "notes").glob("*.md")),
]
BLOCKS = [block for file in DOCUMENTS for block in blocks_of(file)]


def explained(text: str) -> bool:
    return any(text.startswith(words) for words in EXPLAINED)


def is_shell(block: Block) -> bool:
    words = block.text.split()
    return block.language == "sh" or (not block.language and words[0] in COMMANDS)


def shell_lines() -> dict[str, str]:
    """Command -> the first place where it is printed; a command of several pages runs once."""
    found: dict[str, str] = {}
    for block in filter(is_shell, BLOCKS):
        for line in (raw.partition("  #")[0].strip() for raw in block.text.splitlines()):
            if line and not explained(line):
                found.setdefault(line, block.place)
    return found


SHELL = [pytest.param(line, id=f"{place} {line[:60]}") for line, place in shell_lines().items()]


def test_every_block_is_run_or_explained():
    for block in BLOCKS:
        known = is_shell(block) or block.language in ("python", "yaml") or explained(block.text)
        assert known, f"{block.place}: no test runs this block, and EXPLAINED has no reason"


def test_every_explanation_is_used():
    lines = [line for block in BLOCKS for line in block.text.splitlines()]
    for words in EXPLAINED:
        assert any(line.startswith(words) for line in lines), words


@pytest.fixture(scope="module")
def stage(tiny_run, tmp_path_factory) -> Path:
    """A folder that looks like a clone after `make recipe`, with another run next to it."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "data", "benchmarks", "sqft_export", *PROJECT_FILES):
        (root / name).symlink_to(ROOT / name)
    run = tiny_run["report"].path.parent
    shutil.copytree(run, root / "runs" / "tiny")
    shutil.copytree(run, root / "runs" / "other")
    openvino = tiny_run["export-openvino"].path
    (root / "folder").symlink_to(openvino / "packed")
    (root / "out").symlink_to(openvino / "sparse")
    return root


def substituted(text: str, stage: Path, new: Path) -> str:
    """The text with a path in place of every placeholder."""
    runs = stage / "runs" / "tiny"
    (onnx,), (openvino,), (gguf,) = (
        runs.glob(f"export-{target}-*") for target in ("onnx", "openvino", "gguf")
    )
    for pattern, path in {
        r"export-onnx-<key>": onnx.name,
        r"export-openvino-<key>": openvino.name,
        r"export-gguf-<key>": gguf.name,
        r"\[<folder> \.\.\.\]": "",
        r"unpack <packed folder> <folder>": f"unpack {onnx}/packed {new}",
        r"<packed folder>": new,
        r"<out>": new,
        r"<folder of sets>": stage / "data",
        r"--data <folder>": f"--data {stage / 'data'}",
        r"<merge-\*/model>|<Hugging Face folder>": next(runs.glob("merge-*")) / "model",
        r"<(absolute path of a )?text( file)?>|<file>": ROOT / "README.md",
        r"<deployment>|<folder>": openvino / "model",
        r"<run>": "runs/tiny",
        r"<name>": "tiny",
    }.items():
        text = re.sub(pattern, str(path), text)
    return text.replace("sparse|dense|auto", "sparse")


def execute(command: str, stage: Path) -> subprocess.CompletedProcess:
    path = f"{Path(SQFT).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-ec", command], cwd=stage, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done


def planned(command: str, stage: Path) -> None:
    """Load every recipe that `run`, `plan`, `export` or `sweep` would work on."""
    words = shlex.split(command)
    words = words[next(at for at, word in enumerate(words) if word in RECIPE_COMMANDS) + 1 :]
    file = stage / words[0] if "/" in words[0] else Path(words[0])
    path, axes, settings = None, [], []
    values = iter(words[1:])
    for word in values:
        if word == "--over":
            setting, _, listed = next(values).partition("=")
            axes.append([f"{setting}={value}" for value in split_values(listed)])
        elif word == "--model-path":
            path = Path(next(values))
        elif word in OPTIONS_WITH_VALUES:
            next(values)
        elif word in ("--target", "--only"):
            settings.append(f"export.targets=[{next(values)}]")
        elif not word.startswith("--"):
            settings.append(word)
    for chosen in itertools.product(*axes):
        load_recipe(file, (*settings, *chosen), path)


@pytest.fixture(scope="module")
def executed() -> set[str]:
    """Commands that worked: two pages may print one command with other placeholders."""
    return set()


@pytest.mark.parametrize("line", SHELL)
def test_a_command_works_as_printed(line, stage, executed, tmp_path):
    optional_words = r"(?<!=)\[([^\]<>]*)\]"  # a list of a setting is none
    command = re.sub(optional_words, r"\1", substituted(line, stage, tmp_path / "new"))
    if missing := [reason for option, reason in UNAVAILABLE.items() if option in command]:
        pytest.skip(f"needs {missing[0]}")
    if (same := " ".join(command.split())) in executed:
        return
    if command.startswith("make") and "wheel" not in command:
        mark = "INSTALLED=runs"  # newer than the sources
        printed = execute(f"make -n {mark} {command.removeprefix('make')}", stage).stdout
        command = next(
            words
            for words in printed.splitlines()
            if "sqft-export" in words or "_export.cli" in words
        )
    if re.search(
        r"\b(sqft-export|sqft_export\.cli) (run|plan|sweep|export) (recipes|tiny|mistral)", command
    ):
        planned(command, stage)
    elif "benchmarks/" in command:
        execute(f"{sys.executable} {shlex.split(command)[1]} --help", stage)
    elif command.startswith("sqft-export benchmark"):
        execute(f"{command} {QUICK}", stage)
    elif "pretrain" not in command:
        execute(command, stage)
    executed.add(same)


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_python_works_as_printed(block, stage):
    """`folder` is a deployment of the runtime that the line names; `out` is a specialized one."""
    code = substituted(block.text, stage, stage / "new")
    (onnx,) = (stage / "runs" / "tiny").glob("export-onnx-*")
    code = re.sub(r'(load_onnx(?:_genai)?\()"folder"', rf'\1"{onnx}/packed"', code)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=stage, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block.place}\n{code}\n{done.stderr}"


FIELDS = [block for block in BLOCKS if block.language == "yaml" or "sparsify: {" in block.text[:12]]


@pytest.mark.parametrize("block", FIELDS, ids=lambda block: block.place)
def test_fields_of_a_recipe_are_allowed(block, tmp_path):
    """The block takes the place of the same sections of the embedded recipe."""
    recipe = (ROOT / "recipes" / "tiny.yaml").read_text()
    for section in re.findall(r"^(\w+):", block.text, re.MULTILINE):
        recipe = re.sub(rf"^{section}:.*\n(?:  .*\n)*", "", recipe, flags=re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(f"{recipe}\n{block.text}\n")
    assert load_recipe(tmp_path / "mine.yaml").name == "tiny"
