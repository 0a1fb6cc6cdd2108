"""A site answers in a real browser as the deployment answers in ONNX Runtime."""

import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from conftest import SQFT
from sqft_export.inference.text import open_deployment
from sqft_export.targets import target
from sqft_export.web.graph import write_graph
from sqft_export.web.library import fetch_library
from sqft_export.web.server import open_server
from sqft_export.web.site import onnx_deployment, write_site

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SOFTWARE_GPU = [
    *("--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--enable-features=Vulkan", "--disable-gpu-sandbox"),
]
BROWSER_TIMEOUT = 120_000  # milliseconds
PROMPT = "3 + 4 ="


@pytest.fixture(scope="module")
def deployment(tiny_run) -> Path:
    return tiny_run["export-onnx"].path / "model"


@pytest.fixture(scope="module")
def site(tiny_run, deployment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "site"
    return write_site(onnx_deployment(deployment), folder, "Sums", False).folder


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian's package chromium)")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_GPU)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(site, tmp_path_factory):
    """The site on a local server, with the library in its folder."""
    folder = tmp_path_factory.mktemp("served") / "site"
    shutil.copytree(site, folder)
    (folder / "library").mkdir()
    fetch_library(folder / "library")
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"library": "./library/transformers.min.js", "wasm": "./library/"}
    (folder / "settings.json").write_text(json.dumps(settings))
    with open_server(folder, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def opened_page(browser, url: str):
    page = browser.new_page()
    page.goto(url)
    page.wait_for_function("document.body.dataset.device", timeout=BROWSER_TIMEOUT)
    return page


def ask(page, prompt: str, tokens: int) -> str:
    page.fill("#limit", str(tokens))
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_function("document.body.dataset.answers", timeout=BROWSER_TIMEOUT)
    return page.inner_text(".turn.assistant")


@pytest.mark.parametrize("device", ["wasm", pytest.param("webgpu", marks=pytest.mark.slow)])
def test_the_browser_answers_as_onnx_runtime(browser, address, deployment, device):
    page = opened_page(browser, f"{address[0]}?device={device}")
    name = {"wasm": "WebAssembly", "webgpu": "WebGPU"}[device]
    assert page.inner_text("#status") == f"Ready on {name}"
    # Later tokens may differ: WebAssembly rounds activations in another order.
    expected = open_deployment(deployment).generate(PROMPT, 4)
    assert ask(page, PROMPT, 4).strip() == expected.strip()
    assert f"{name}: 4 tokens," in page.inner_text("#status")
    page.close()


def test_a_device_that_computes_wrongly_is_named(browser, address):
    """Here the expectation is changed, as if the device had computed another token."""
    url, folder = address
    file = folder / "settings.json"
    settings = json.loads(file.read_text())
    wrong = [token ^ 1 for token in settings["check"]["expected"]]
    file.write_text(json.dumps(settings | {"check": settings["check"] | {"expected": wrong}}))
    page = opened_page(browser, f"{url}?device=wasm")
    assert "WebAssembly computes this model wrongly here" in page.inner_text("#status")
    file.write_text(json.dumps(settings))
    page.close()


def test_the_check_is_what_the_deployment_computes(site, deployment):
    check = json.loads((site / "settings.json").read_text())["check"]
    assert len(check["prompt"]) > 8 and len(check["expected"]) > 2
    session = open_deployment(deployment).session
    ids, found = check["prompt"], []
    for _ in check["expected"]:
        found += session.argmax_tokens(np.array([ids], np.int64)).tolist()
        ids = found[-1:]
    assert found == check["expected"]


def test_the_model_folder_has_the_same_codes(site, deployment, tmp_path):
    """Read back by our reader, after the names of an ONNX deployment are restored."""
    shutil.copyfile(site / "model/onnx/model_q4.onnx", tmp_path / "model.onnx")
    shutil.copyfile(site / "model/onnx/model_q4.onnx_data", tmp_path / "model_q4.onnx_data")
    both = zip(
        target("onnx").read_back(deployment), target("onnx").read_back(tmp_path), strict=True
    )
    for (name, ours), (other, theirs) in both:
        assert name == other
        assert np.array_equal(ours.codes, theirs.codes)
        assert np.array_equal(ours.scale, theirs.scale)


def test_parts_stay_below_the_limit_and_hold_the_same_bytes(deployment, tmp_path):
    written = write_graph(deployment, tmp_path, 500_000)
    files = sorted(tmp_path.glob("*_data*"))
    assert written.parts == len(files) > 2
    assert all(file.stat().st_size <= 500_000 for file in files)
    whole, split = (
        {t.name: onnx.numpy_helper.to_array(t, str(folder)).tobytes() for t in graph.initializer}
        for folder, graph in (
            (deployment, onnx.load(deployment / "model.onnx", load_external_data=False).graph),
            (tmp_path, onnx.load(tmp_path / "model_q4.onnx", load_external_data=False).graph),
        )
    )
    assert whole == split


def test_a_run_gives_prompt_and_stop_texts(site):
    settings = json.loads((site / "settings.json").read_text())
    assert settings["chat"] is False
    assert settings["example"].startswith("Question: ")  # without the start token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MISSING", "site"), "no such folder"),
        (("GGUF", "site"), "found a deployment for gguf; a site needs one for onnx"),
        (("ONNX",), "name a folder for the site, or use --serve"),
        (("ONNX", "."), "exists already"),
    ],
)
def test_a_mistake_is_one_message(tiny_run, deployment, tmp_path, arguments, message):
    names = {"GGUF": tiny_run["export-gguf"].path / "model", "ONNX": deployment}
    words = [str(names.get(word, word)) for word in arguments]
    done = subprocess.run(
        [SQFT, "web", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
