"""A page answers in a real browser as the deployment answers in ONNX Runtime."""

import json
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import pytest

from conftest import SQFT, copy_run, small_recipe
from sqft_export.errors import DamagedError
from sqft_export.inference.text import open_deployment
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.exporters import drop_unsupported
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target
from sqft_export.targets.web.graph import write_graph
from sqft_export.web.library import fetch_library
from sqft_export.web.server import open_server
from sqft_export.web.site import find_source, write_site

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SOFTWARE_GPU = [
    *("--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--enable-features=Vulkan", "--disable-gpu-sandbox"),
]
BROWSER_TIMEOUT = 120_000  # milliseconds
PROMPT = "3 + 4 ="


@pytest.fixture(scope="module")
def onnx_deployment(tiny_run) -> Path:
    return tiny_run["export-onnx"].path / "model"


@pytest.fixture(scope="module")
def web_run(tiny_run, tmp_path_factory) -> dict:
    """Artifacts of the embedded recipe with the target web, in a copy of its run."""
    root = copy_run(tiny_run, tmp_path_factory.mktemp("web_run"))
    return run_recipe(small_recipe("export.targets=[web]"), root, ("verify",))


@pytest.fixture(scope="module")
def deployment(web_run) -> Path:
    return web_run["export-web"].path / "model"


@pytest.fixture(scope="module")
def site(onnx_deployment, tmp_path_factory) -> Path:
    """A site from an ONNX deployment."""
    folder = tmp_path_factory.mktemp("web") / "site"
    return write_site(find_source(onnx_deployment), folder, "Sums").folder


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
def address(deployment, tmp_path_factory):
    """The deployment on a local server, with the library in its folder."""
    folder = tmp_path_factory.mktemp("served") / "site"
    shutil.copytree(deployment, folder)
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


@pytest.fixture
def probe(address):
    """The served self-test as a dict, and a function that replaces it; it is restored."""
    file = address[1] / "probe.json"
    text = file.read_text()
    yield json.loads(text), lambda document: file.write_text(json.dumps(document))
    file.write_text(text)


def state_of(browser, url: str) -> str:
    page = opened_page(browser, f"{url}?device=wasm")
    text = page.inner_text("#status")
    page.close()
    return text


def test_a_device_that_computes_wrongly_is_named(browser, address, probe):
    """Here the reference's last clear token is changed, as if the device had computed another."""
    document, write = probe
    for prompt in document["prompts"]:
        prompt["continuation"] = [token ^ 1 for token in prompt["continuation"]]
    write(document)
    assert "WebAssembly computes this model wrongly here" in state_of(browser, address[0])


def test_a_close_decision_does_not_fail_the_check(browser, address, probe):
    """Tokens after it may differ by rounding; a page without a clear one says so."""
    document, write = probe
    for prompt in document["prompts"]:
        prompt["continuation"] = [*prompt["continuation"][:1], 0, 0]
        for position in prompt["positions"]:
            if position["position"] == len(prompt["ids"]):
                position["log_probabilities"][1] = position["log_probabilities"][0] - 0.1
    write(document)
    assert state_of(browser, address[0]) == "Ready on WebAssembly"
    write(document | {"prompts": []})
    assert "It was not checked" in state_of(browser, address[0])


def test_the_certificate_covers_the_file_of_the_page(web_run):
    parts = json.loads((web_run["verify"].path / "verify.json").read_text()).values()
    checks = [check for part in parts for check in part]
    names = [check["name"] for check in checks if check["passed"]]
    assert len(names) == len(checks)
    for name in (
        "codes, scales, zero points: merged and web",
        "pruned positions zero in web",
        "logits: merged in torch and web",
        "greedy tokens: merged in torch and web",
    ):
        assert name in names


def test_the_folder_is_what_transformers_js_loads(deployment):
    files = {str(file.relative_to(deployment)) for file in deployment.rglob("*") if file.is_file()}
    assert files >= {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "index.html"}
    assert files >= {"generation_config.json", "tokenizer.json", "probe.json", "settings.json"}
    config = json.loads((deployment / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_q4.onnx": 1}


def test_verify_runs_the_self_test_of_a_site(site):
    done = subprocess.run(
        [SQFT, "verify", str(site), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["runtime"] == "web" and found["passed"] and found["files"] > 8
    assert [mode["positions"] > 0 for mode in found["modes"]] == [True, True]


def test_a_site_of_an_onnx_deployment_has_the_files_of_the_target(site, deployment):
    """Both ways of writing a page give the same model."""
    same = ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "probe.json")
    for name in (*same, "generation_config.json", "tokenizer.json", "index.html"):
        assert (site / name).read_bytes() == (deployment / name).read_bytes(), name


def test_a_site_of_a_web_deployment_is_a_copy_with_its_own_heading(deployment, tmp_path):
    made = write_site(find_source(deployment), tmp_path / "site", "Other", example="1 + 1 =")
    settings, ours = (
        json.loads((folder / "settings.json").read_text()) for folder in (made.folder, deployment)
    )
    assert settings == ours | {"title": "Other", "example": "1 + 1 ="}


def test_the_codes_are_those_of_the_onnx_deployment(deployment, onnx_deployment):
    both = zip(
        target("onnx").read_back(onnx_deployment), target("web").read_back(deployment), strict=True
    )
    for (name, ours), (other, theirs) in both:
        assert name == other
        assert np.array_equal(ours.codes, theirs.codes)
        assert np.array_equal(ours.scale, theirs.scale)


def test_parts_stay_below_the_limit_and_hold_the_same_bytes(onnx_deployment, tmp_path):
    written = write_graph(onnx_deployment, tmp_path, 500_000)
    files = sorted(tmp_path.glob("*_data*"))
    assert written.parts == len(files) > 2
    assert all(file.stat().st_size <= 500_000 for file in files)
    whole, split = (
        {t.name: onnx.numpy_helper.to_array(t, str(folder)).tobytes() for t in graph.initializer}
        for folder, graph in (
            (
                onnx_deployment,
                onnx.load(onnx_deployment / "model.onnx", load_external_data=False).graph,
            ),
            (tmp_path, onnx.load(tmp_path / "model_q4.onnx", load_external_data=False).graph),
        )
    )
    assert whole == split


@pytest.mark.parametrize("name", ["site", "deployment"])
def test_a_page_has_prompt_and_stop_texts_of_the_task(request, name):
    settings = json.loads((request.getfixturevalue(name) / "settings.json").read_text())
    assert settings["chat"] is False
    assert settings["example"].startswith("Question: ")  # without the start token


def test_serve_shows_the_page_of_a_run(tiny_run):
    """The run has no web deployment, so that a site is made from its ONNX deployment."""
    run = tiny_run["merge"].path.parent
    command = [SQFT, "serve", "--web", str(run), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stderr.readline().split()[1].rstrip(";")
        for file, text in (("", "<!doctype html>"), ("config.json", "transformers.js_config")):
            with urllib.request.urlopen(url + file, timeout=60) as answer:
                assert text in answer.read().decode()
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    finally:
        process.terminate()
        assert process.wait(60) == 143


def test_a_damaged_deployment_is_not_sealed_again(onnx_deployment, tmp_path):
    copy = shutil.copytree(onnx_deployment, tmp_path / "copy")
    with (copy / "model.onnx.data").open("r+b") as file:
        file.write(b"\1\2\3\4")
    with pytest.raises(DamagedError, match=r"model\.onnx\.data: is not the file"):
        write_site(find_source(copy), tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_an_unmerged_adapter_skips_the_target(random_llama):
    recipe = small_recipe(
        "adapt.pipeline=sqft", "export.targets=[onnx, web]", model_path=random_llama
    )
    kept = drop_unsupported(recipe, check_recipe(recipe, random_llama))
    assert "applies no adapter" in kept.skipped["web"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MISSING", "site"), "no such folder"),
        (("GGUF", "site"), "found a deployment for gguf; a site needs one for web or onnx"),
        (("ONNX", "."), "exists already"),
    ],
)
def test_a_mistake_is_one_message(tiny_run, onnx_deployment, tmp_path, arguments, message):
    names = {"GGUF": tiny_run["export-gguf"].path / "model", "ONNX": onnx_deployment}
    words = [str(names.get(word, word)) for word in arguments]
    done = subprocess.run(
        [SQFT, "web", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
