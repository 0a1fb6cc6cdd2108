"""`serve`: a real server answers an OpenAI client; without one, the command is printed."""

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from conftest import SQFT
from sqft_export.kernels.llama_plugin import why_not_in_llama_cpp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    for _ in range(300):
        assert process.poll() is None, process.communicate()[1]
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


def test_serve_loads_our_kernels_into_the_server(own_run):
    """Its stderr counts the tensors on them."""
    pytest.importorskip("xllamacpp")
    if missing := why_not_in_llama_cpp("xllamacpp"):
        pytest.skip(missing)
    folder = next(own_run.root.glob("export-gguf-*/model"))
    port = free_port()
    process = subprocess.Popen(
        [SQFT, "serve", str(folder), "--port", str(port), "--execution", "auto"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/v1")
    finally:
        process.terminate()
        _, printed = process.communicate(timeout=60)
    assert "SQFT_EXPORT_KERNELS=1 SQFT_FORM=auto" in printed
    assert "tensors on our kernels" in printed


@pytest.mark.parametrize("form", ["model", "run"])
def test_a_real_server_streams_an_answer_to_an_openai_client(own_run, form):
    """llama.cpp's own server, with the chat template of the GGUF file."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("xllamacpp")
    folder = own_run.root if form == "run" else next(own_run.root.glob("export-gguf-*/model"))
    port = free_port()
    process = subprocess.Popen(
        [SQFT, "serve", str(folder), "--port", str(port), "--name", "sums"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        wait_until_ready(process, url)
        client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
        asked = [{"role": "user", "content": "What is 2 plus 3?"}]
        stream = client.chat.completions.create(
            model="sums", messages=asked, max_tokens=16, temperature=0, stream=True
        )
        pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    finally:
        process.terminate()
        _, printed = process.communicate(timeout=60)
    assert len([piece for piece in pieces if piece]) > 1
    assert f"serving {url}, model sums" in printed
    if form == "model":
        import sqft_export

        expected = sqft_export.load(folder).generate(asked, 16)
        assert "".join(pieces).strip() == expected.strip()


@pytest.mark.parametrize(("target", "program"), [("gguf", "llama-server"), ("openvino", "ovms")])
def test_without_a_server_the_command_and_its_install_are_printed(own_run, target, program):
    folder = next(own_run.root.glob(f"export-{target}-*/model"))
    code = (
        "import sys; sys.modules['xllamacpp'] = None\n"
        "from sqft_export import cli; from sqft_export.inference import servers\n"
        "servers.installed = lambda name: False\n"
        f"sys.argv = ['sqft-export', 'serve', {str(folder)!r}]; cli.main()"
    )
    done = subprocess.run(
        [Path(SQFT).parent / "python", "-c", code],
        env=os.environ | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"      {program} " in done.stderr and "8080" in done.stderr
    assert "pip install xllamacpp" in done.stderr or target == "openvino"


def test_an_onnx_folder_has_no_server(own_run):
    folder = next(own_run.root.glob("export-onnx-*/model"))
    done = subprocess.run([SQFT, "serve", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no server loads a folder of ONNX Runtime GenAI" in done.stderr


def test_a_port_in_use_is_named_before_a_server_starts(own_run):
    pytest.importorskip("xllamacpp")
    folder = next(own_run.root.glob("export-gguf-*/model"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [SQFT, "serve", folder, "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: no server can listen there" in done.stderr
    assert "Traceback" not in done.stderr and "serving" not in done.stderr
