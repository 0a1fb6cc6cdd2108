"""`chat` and `generate` as a user types them."""

import shutil
import subprocess

import pytest

from conftest import SQFT, test_prompts


def sqft(*arguments: str, typed: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [SQFT, *arguments], input=typed, capture_output=True, text=True, check=False
    )


def test_generate_on_a_run_names_its_best_deployment_and_its_speed(tiny_run):
    run = str(tiny_run["report"].path.parent)
    (prompt,) = test_prompts(1)
    done = sqft("generate", run, "-p", prompt, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert f"the best deployment of {run}" in done.stderr
    assert "tokens per second" in done.stderr
    piped = sqft("generate", run, "--max-new-tokens", "8", typed=prompt)
    assert piped.stdout == done.stdout


@pytest.mark.parametrize("stage", ["export-openvino", "export-onnx", "export-gguf", "merge"])
def test_chat_reads_one_message_per_line(tiny_run, stage):
    folder = str(tiny_run[stage].path / "model")
    one, two = test_prompts(2)
    lines = f"{one.replace(chr(10), ' ')}\n\n/new\n{two.replace(chr(10), ' ')}\n"
    done = sqft("chat", folder, "--max-new-tokens", "4", typed=lines)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert done.stderr.count("prompt tokens in") == 2
    assert "has no chat template" in done.stderr


def test_a_system_message_without_a_template_is_refused(tiny_run):
    done = sqft("chat", str(tiny_run["export-onnx"].path / "model"), "-p", "x", "--system", "y")
    assert done.returncode == 2 and "--system: needs a chat template" in done.stderr


def test_chat_with_what_is_no_deployment_is_one_message(tmp_path):
    for folder in ("nowhere", str(tmp_path), "README.md"):
        done = sqft("chat", folder, "-p", "x")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


def test_a_long_conversation_goes_on_without_its_oldest_messages(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run["export-onnx"].path / "model", tmp_path / "chat")
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    typed = "Question: What is 2 plus 3?\n" * 40
    done = sqft("chat", str(folder), "--system", "Count.", "--max-new-tokens", "8", typed=typed)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("prompt tokens in") == 40
    assert "tokens is full: 2 messages are left out" in done.stderr
