"""``push``: the uploaded files are the deployment with a full card, and its seal holds."""

import os
import socket
import subprocess
import types
from pathlib import Path

import pytest
from hub_server import Hub

from conftest import SQFT
from sqft_export.packed.seal import check_seal
from sqft_export.report.document import read_report


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def push(
    hub: Hub | types.SimpleNamespace | None, home: Path, *words: str
) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    if hub is not None:
        address = f"http://127.0.0.1:{hub.server_port}"
        environment |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    command = [SQFT, "push", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_run_is_published_with_its_best_deployment_and_a_full_card(tiny_run, hub, tmp_path):
    run = tiny_run["report"].path.parent
    done = push(hub, tmp_path / "home", str(run), "me/tiny-int4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"/me/tiny-int4/commit/{'d' * 40}")
    files = hub.repositories["models/me/tiny-int4"]["d" * 40]
    for name, content in files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert check_seal(tmp_path / "got", whole=True)
    card = files["README.md"].decode()
    report = read_report(tiny_run["report"].path / "report.json")
    names = [line.split(" | ")[0].removeprefix("| ") for line in card.splitlines()]
    compared = {report.recommendation.ours, report.recommendation.peer}
    expected = {row.name for row in report.rows if row.kind == "base" or row.id in compared}
    assert report.best.name in expected
    assert {row.name for row in report.rows if row.name in names} == expected
    for part in ("base_model_relation: quantized", "metrics:", "## How to", "## Measured"):
        assert part in card
    assert card.index("## Measured") < card.index("## Origin")


def test_the_card_is_shown_without_a_hub(tiny_run, tmp_path):
    folder = tiny_run["export-onnx"].path / "model"
    done = push(None, tmp_path, str(folder), "me/tiny", "--card")
    assert done.returncode == 0, done.stderr
    assert "library_name: onnxruntime-genai" in done.stdout


@pytest.mark.parametrize("name", ["tiny", "me/../x", "me/a b", "-x/y"])
def test_a_wrong_name_is_refused_before_anything_is_read(name, sqft_here):
    done = sqft_here("push", "nowhere", "--", name)
    assert done.returncode == 2
    assert "expected owner/name" in done.stderr


def test_a_changed_deployment_is_not_published(tiny_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run["report"].path.parent, run)
    file = next(run.glob("export-gguf-*/model/config.json"))
    file.write_text(file.read_text() + " ")
    done = push(None, tmp_path, str(file.parent), "me/tiny", "--card")
    assert done.returncode == 4
    assert "config.json" in done.stderr


def test_a_hub_that_can_not_be_reached_is_named(tiny_run, tmp_path):
    folder = tiny_run["export-onnx"].path / "model"
    with socket.socket() as closed:  # bound, but it does not listen
        closed.bind(("127.0.0.1", 0))
        hub = types.SimpleNamespace(server_port=closed.getsockname()[1])
        done = push(hub, tmp_path / "home", str(folder), "me/tiny")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "push: the hub can't be reached: " in done.stderr
