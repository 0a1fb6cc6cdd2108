"""The first page, and first mistakes."""

import re
import subprocess

import pytest
import typer
from click.testing import CliRunner

from conftest import SQFT


def sqft(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SQFT, *arguments], capture_output=True, text=True, check=False)


def test_without_arguments_the_help_shows_the_way_from_a_model_and_data_to_a_server():
    done = sqft()
    page = done.stdout + done.stderr
    run = page.index("sqft-export run HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl")
    chat = page.index("sqft-export chat runs/SmolLM2-135M-Instruct")
    assert run < chat < page.index("sqft-export serve runs/SmolLM2-135M-Instruct")
    assert '"role": "user"' in page and "--preset int4-untuned" in page
    assert page.index(" run ") < page.index("benchmark")  # the first command of the list


def test_the_version_is_printed():
    import sqft_export

    done = sqft("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"sqft-export {sqft_export.__version__}")


def test_completion_is_offered_and_works():
    assert "--install-completion" in sqft("--help").stdout
    environment = {"_SQFT_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": "sqft-export ch"}
    done = subprocess.run(
        [SQFT], env=environment | {"COMP_CWORD": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["chat"]


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("quantize", "--preset int4-untuned"),
        ("finetune", "sqft-export run"),
        ("prune", "--preset int4-sparse"),
        ("evaluate", "sqft-export benchmark"),
    ],
)
def test_the_word_of_another_tool_gets_our_command(word, command, sqft_here):
    done = sqft_here(word, "model")
    assert done.returncode == 2 and command in done.stderr and "Traceback" not in done.stderr


def test_a_hub_name_in_place_of_a_folder_is_named(sqft_here):
    done = sqft_here("chat", "owner/name", "-p", "x")
    assert done.returncode == 2
    assert "compile it first: sqft-export run owner/name --data" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "benchmark"])
def test_a_run_in_place_of_a_deployment_gets_a_list_of_its_deployments(
    tiny_run, command, sqft_here
):
    run = tiny_run["report"].path.parent
    done = sqft_here(command, str(run))
    assert done.returncode == 2
    assert "is a run" in done.stderr
    assert str(tiny_run["export-onnx"].path / "model") in done.stderr


def test_help_explains_every_argument_and_option():
    """As printed: an unfit version of click loses texts, and markup loses words in brackets."""
    from sqft_export.cli import app

    commands = typer.main.get_command(app).commands
    assert len(commands) > 10
    for name, command in commands.items():
        shown = re.sub("[^!-~]+", " ", CliRunner().invoke(command, ["--help"]).output).split()
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text, (name, parameter.name)
            assert set(text.split()) <= set(shown), (name, parameter.name)
