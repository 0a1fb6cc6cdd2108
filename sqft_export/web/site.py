"""Write a site that runs an ONNX deployment in the browser: page, model folder, library.

``model/`` has the layout of Transformers.js, so it can also be published on a hub and loaded by
name. ``settings.json`` has the page's settings and a check of the device: a prompt and the tokens
that the model continues it with, computed here in float32.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sqft_export.data.stops import stop_texts
from sqft_export.errors import UserError
from sqft_export.inference.locate import Deployment, best_of, deployments_of_run, is_model
from sqft_export.inference.templates import read_chat_template, read_special_tokens
from sqft_export.packed.folders import packed_file
from sqft_export.recipe.schema import Recipe
from sqft_export.report.document import REPORT, read_report
from sqft_export.report.runs import latest_report
from sqft_export.targets import Session, runner
from sqft_export.targets.folder import GENAI_CONFIG, kind_of
from sqft_export.textfiles import read_json
from sqft_export.web.graph import BROWSER_GRAPH, GraphFiles, write_graph
from sqft_export.web.library import CDN_MODULE, fetch_library

PAGE = Path(__file__).parent / "page" / "index.html"
MODEL_FOLDER, LIBRARY_FOLDER, PAGE_SETTINGS = "model", "library", "settings.json"
BROWSER_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Model types whose config Transformers.js 4.3 reads under the names that ``_model_config`` writes
# (``getNormalizedConfig`` in its ``configs.js``). Another type is declared as llama: the page only
# takes the sizes of the key-value cache from it, and the graph computes the model.
READ_TYPES = {
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2"),
    *("gemma3_text", "smollm3", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2"),
    *("starcoder2", "glm", "helium", "ernie4_5", "hunyuan_v1_dense", "apertus", "arcee"),
}
CHECKED_TOKENS = 8  # at most; a device check ends before the first close decision
CLEAR_MARGIN = 0.5  # difference of the two largest logits that rounding does not turn around
PROBE_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Site:
    """A written site.

    download_bytes: size of the model folder, which a browser downloads before the first answer.
    """

    folder: Path
    deployment: Deployment
    download_bytes: int


def onnx_deployment(folder: Path) -> Deployment:
    """Return the ONNX deployment in a folder, or that of a run.

    :raises UserError: if it is missing or packed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not is_model(folder):
        plain = [one for one in deployments_of_run(folder) if packed_file(one.path) is None]
        found = best_of([one for one in plain if kind_of(one.path) == "onnx"])
        if found is None:
            raise UserError(
                f"{folder}: has no ONNX deployment; add onnx to export.targets and run it again"
            )
        return found
    kind = kind_of(folder)
    if kind != "onnx":
        raise UserError(f"{folder}: found a deployment for {kind}; a site needs one for onnx")
    if packed_file(folder) is not None:
        raise UserError(f"{folder}: is packed; first: sqft-export unpack {folder} <folder>")
    return Deployment(kind, folder)


def write_site(
    deployment: Deployment,
    folder: Path,
    title: str,
    bundle: bool,
    example: str | None = None,
) -> Site:
    """Write a site; it appears under its name only when it is complete.

    :param bundle: write the library into the site; else the page loads it from a CDN.
    :param example: text in the page's input field; None: the first test prompt of the run, if its
        task is without a chat template.
    :raises UserError: if the folder exists, or the deployment lacks a file.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / MODEL_FOLDER / "onnx").mkdir(parents=True)
    _write_model(deployment.path, partial / MODEL_FOLDER)
    if bundle:
        (partial / LIBRARY_FOLDER).mkdir()
        fetch_library(partial / LIBRARY_FOLDER)
    settings = {
        "title": title,
        "library": f"./{LIBRARY_FOLDER}/transformers.min.js" if bundle else CDN_MODULE,
        "wasm": f"./{LIBRARY_FOLDER}/" if bundle else None,
        **_prompt_settings(deployment.path, example),
        "check": _device_check(deployment.path),
    }
    (partial / PAGE_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(PAGE, partial / PAGE.name)
    partial.rename(folder)
    model = [file for file in (folder / MODEL_FOLDER).rglob("*") if file.is_file()]
    return Site(folder, deployment, sum(file.stat().st_size for file in model))


def _prompt_settings(deployment: Path, example: str | None) -> dict[str, object]:
    """Return whether prompts are messages, the first prompt, and the texts that end an answer."""
    chat = read_chat_template(deployment) is not None
    report = latest_report(deployment.resolve().parent.parent)
    if report is None:
        return {"chat": chat, "example": example or "", "stop": []}
    found = read_report(report / REPORT)
    if example is None and not chat and found.samples:
        start = read_special_tokens(deployment).get("bos_token", "")
        example = found.samples[0].prompt.removeprefix(start)  # the tokenizer adds it again
    stop = stop_texts(Recipe.model_validate(found.recipe).task)
    return {"chat": chat, "example": example or "", "stop": list(stop)}


def _write_model(deployment: Path, folder: Path) -> None:
    """Write the folder that Transformers.js loads."""
    found = read_json(deployment / GENAI_CONFIG)["model"]
    written = write_graph(deployment, folder / "onnx")
    documents = {
        "config.json": _model_config(found, written),
        "generation_config.json": {
            name: found[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if name in found
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    for name in BROWSER_TOKENIZER_FILES:
        if (deployment / name).is_file():
            shutil.copyfile(deployment / name, folder / name)
    if not (folder / BROWSER_TOKENIZER_FILES[0]).is_file():
        raise UserError(
            f"{deployment}: has no tokenizer.json, the only tokenizer format of a browser"
        )


def _model_config(found: dict, written: GraphFiles) -> dict[str, object]:
    """Return the ``config.json`` of a site: the sizes of the key-value cache.

    :param found: the section ``model`` of ``genai_config.json``.
    """
    decoder, kind = found["decoder"], found["type"]
    sizes = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size")
    return {
        "model_type": kind if kind in READ_TYPES else "llama",
        **{name: decoder[name] for name in sizes},
        "head_dim": decoder["head_size"],
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": found["context_length"],
        "eos_token_id": found["eos_token_id"],
        "transformers.js_config": {
            "dtype": "q4",
            "use_external_data_format": {BROWSER_GRAPH: written.parts},
            "kv_cache_dtype": {"q4": written.cache_type},
        },
    }


def _device_check(deployment: Path) -> dict[str, list[int]]:
    """Return a prompt and its continuation up to the first decision that rounding may turn around.

    The prompt has several tokens and the continuation goes token by token, since a device may
    compute one of the two wrongly.
    """
    vocabulary = int(read_json(deployment / GENAI_CONFIG)["model"]["vocab_size"])
    session = runner("onnx").open_session(deployment, True, None)
    # Any tokens do; the longest continuation of several prompts checks most.
    checks = (_continuation(session, _prompt(seed, vocabulary)) for seed in range(8))
    return max(checks, key=lambda check: len(check["expected"]))


def _prompt(seed: int, vocabulary: int) -> list[int]:
    low = min(vocabulary // 8, 256)  # special tokens have the lowest ids
    draw = np.random.default_rng(seed)
    return [int(token) for token in draw.integers(low, vocabulary // 2, PROBE_PROMPT_TOKENS)]


def _continuation(session: Session, prompt: list[int]) -> dict[str, list[int]]:
    session.reset()
    expected: list[int] = []
    fresh = prompt
    while len(expected) < CHECKED_TOKENS:
        logits = session.forward(np.array([fresh], np.int64), None, 1)[0, -1]
        second, first = np.sort(logits)[-2:]
        if first - second < CLEAR_MARGIN:
            break
        expected.append(int(logits.argmax()))
        fresh = expected[-1:]
    return {"prompt": prompt, "expected": expected}
