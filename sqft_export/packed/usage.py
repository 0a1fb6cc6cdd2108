"""Write the code that loads and runs a deployment, for model cards and `inspect`.

A deployment has one of three forms, and each runtime loads some of them:

plain        the files that the runtime itself loads
packed       a packed weight file, which this package loads
specialized  an IR whose products run on this package's kernels
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sqft_export.artifacts.store import sha256_of
from sqft_export.kernels.extension import unavailable_reason
from sqft_export.kernels.ir import is_specialized
from sqft_export.model.chat import has_template
from sqft_export.packed.seal import read_seal, write_provenance
from sqft_export.targets.folder import (
    ADAPTER_FOLDER,
    GENAI_CONFIG,
    GRAPHS,
    SUFFIX,
    WEIGHT_FILES,
    context_of,
    runtime_of,
)

CARD = "README.md"
_NEW_TOKENS = 64
LONGEST_SEQUENCE = 512  # tokens, prompt and answer, of the example for ONNX Runtime GenAI
_SECTION = re.compile(r"^## How to run it\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_JSON_STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"'
_PROMPT = re.compile(rf"^prompt = ({_JSON_STRING})(?=  #|$)", re.MULTILINE)


@dataclass(frozen=True)
class Loader:
    """One way to load a deployment in Python.

    runtime: the package that runs the model.
    code: an expression; ``{folder}`` is the folder's path inside a string.
    needs: a file that the runtime requires in the folder.
    """

    runtime: str
    code: str
    needs: str = ""

    def expression(self, folder: Path | str) -> str:
        """Return the code for a folder."""
        return self.code.replace("{folder}", json.dumps(str(folder), ensure_ascii=False)[1:-1])

    def missing(self) -> str | None:
        """Return why it can't run on this machine; None if it can."""
        package = self.runtime.partition(".")[0]
        return None if importlib.util.find_spec(package) else f"{package} is not installed"


_OPENVINO_TOKENIZER = "openvino_tokenizer.xml"
LOADERS: dict[tuple[str, str], tuple[Loader, ...]] = {
    ("openvino", "plain"): (
        Loader("openvino", 'openvino.Core().read_model("{folder}/openvino_model.xml")'),
        Loader(
            "openvino_genai", 'openvino_genai.LLMPipeline("{folder}", "CPU")', _OPENVINO_TOKENIZER
        ),
        Loader(
            "optimum.intel",
            'optimum.intel.OVModelForCausalLM.from_pretrained("{folder}")',
            "config.json",
        ),
    ),
    ("onnx", "plain"): (
        Loader("onnxruntime", 'onnxruntime.InferenceSession("{folder}/model.onnx")'),
        Loader("onnxruntime_genai", 'onnxruntime_genai.Model("{folder}")', GENAI_CONFIG),
    ),
    ("onnx", "packed"): (
        Loader("onnxruntime", 'sqft_export.load_onnx("{folder}")'),
        Loader("onnxruntime_genai", 'sqft_export.load_onnx_genai("{folder}")', GENAI_CONFIG),
    ),
    ("gguf", "plain"): (Loader("cyllama", 'cyllama.LLM("{folder}/model.gguf")'),),
    ("gguf", "packed"): (Loader("cyllama", 'sqft_export.load_gguf("{folder}")'),),
    ("web", "plain"): (
        Loader("onnxruntime", 'onnxruntime.InferenceSession("{folder}/onnx/model_q4.onnx")'),
    ),
}
for _form in ("packed", "specialized"):
    LOADERS["openvino", _form] = (
        Loader("openvino", 'sqft_export.load_openvino("{folder}")'),
        Loader(
            "openvino_genai", 'sqft_export.load_openvino_genai("{folder}")', _OPENVINO_TOKENIZER
        ),
    )


def form_of(folder: Path) -> str:
    """Return the form of a deployment: plain, packed or specialized.

    :raises UserError: if the folder is not a deployment.
    """
    runtime = runtime_of(folder)
    if (folder / (WEIGHT_FILES[runtime] + SUFFIX)).is_file():
        return "packed"
    if runtime == "openvino" and is_specialized((folder / GRAPHS[runtime]).read_bytes()):
        return "specialized"
    return "plain"


def loaders_of(folder: Path) -> list[Loader]:
    """Return the loaders whose files the deployment has."""
    found = LOADERS[runtime_of(folder), form_of(folder)]
    return [loader for loader in found if (folder / loader.needs).exists()]


def why_no_loader(folder: Path, loader: Loader) -> str | None:
    """Return why a loader can't run a deployment on this machine; None if it can."""
    kernels = unavailable_reason() if form_of(folder) == "specialized" else None
    return loader.missing() or kernels


def usage_section(folder: Path, prompt: str) -> str:
    """Return the section of a model card with code to run inside the folder.

    :param prompt: an example prompt, or a template over the fields of an item.
    """
    form = form_of(folder)
    runtime = runtime_of(folder)
    question = json.dumps(prompt, ensure_ascii=False)
    note = "  # replace each field in braces" if re.search(r"(?<!\{)\{\w", prompt) else ""
    blocks = _BLOCKS[runtime](folder, form)
    lines = [line.replace("{prompt}", f"prompt = {question}{note}") for line in blocks]
    return "\n".join(["## How to run it", "", "In this folder:", "", *lines])


def _python(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]


def _openvino(folder: Path, form: str) -> list[str]:
    imports, made, options = ["import openvino_genai"], [], ""
    if (folder / ADAPTER_FOLDER).is_dir():
        file = f'"{ADAPTER_FOLDER}/adapter_model.safetensors"'
        made = [f"adapters = openvino_genai.AdapterConfig(openvino_genai.Adapter({file}))"]
        options = ", adapters=adapters"
    if form == "plain":
        load = f'openvino_genai.LLMPipeline(".", "CPU"{options})'
    elif form == "packed":
        # OpenVINO applies an adapter only to products on its own kernels.
        options = f', execution="stock"{options}' if options else ""
        imports = [*(imports if options else []), "import sqft_export"]
        load = f'sqft_export.load_openvino_genai("."{options})'
    else:
        imports.append("import sqft_export")
        made.append("extensions = [sqft_export.openvino_extension()]")
        load = f'openvino_genai.LLMPipeline(".", "CPU", extensions=extensions{options})'
    answer = f"print(pipe.generate(prompt, max_new_tokens={_NEW_TOKENS}))"
    return _python(*imports, "", *made, f"pipe = {load}", "{prompt}", answer)


def _onnx(folder: Path, form: str) -> list[str]:
    packed = form == "packed"
    load = 'sqft_export.load_onnx_genai(".")' if packed else 'onnxruntime_genai.Model(".")'
    longest = min(context_of(folder) or LONGEST_SEQUENCE, LONGEST_SEQUENCE)
    adapter = []
    if (folder / ADAPTER_FOLDER).is_dir():
        adapter = [
            "adapters = onnxruntime_genai.Adapters(model)",
            f'adapters.load("{ADAPTER_FOLDER}/adapter.onnx_adapter", "tuned")',
            'generator.set_active_adapter(adapters, "tuned")',
        ]
    return _python(
        *(["import json", ""] if has_template(folder) else []),
        "import onnxruntime_genai",
        *(["import sqft_export"] if packed else []),
        "",
        f"model = {load}",
        "tokenizer = onnxruntime_genai.Tokenizer(model)",
        *([] if has_template(folder) else ['tokenizer.update_options(add_special_tokens="true")']),
        "params = onnxruntime_genai.GeneratorParams(model)",
        f"params.set_search_options(max_length={longest})  # tokens of prompt and answer",
        "generator = onnxruntime_genai.Generator(model, params)",
        *adapter,
        "{prompt}",
        *_as_message(folder),
        "generator.append_tokens(tokenizer.encode(prompt))",
        "while not generator.is_done():",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
    )


def _as_message(folder: Path) -> list[str]:
    """Return the code that renders the prompt with the folder's chat template, if there is one."""
    if not has_template(folder):
        return []
    return [
        'message = json.dumps([{"role": "user", "content": prompt}])',
        "prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True)",
    ]


def _gguf(folder: Path, form: str) -> list[str]:
    if form == "packed":
        return [
            *_python(
                "import sqft_export",
                "",
                'model = sqft_export.load_gguf(".")  # cyllama\'s LlamaModel',
            ),
            "Every program that is built on llama.cpp reads the unpacked folder:",
            "",
            *("```sh", "sqft-export unpack . ../unpacked", "```", ""),
            *_python(*_llama_cpp("../unpacked/model.gguf", folder)),
        ]
    lines = _python(*_llama_cpp("model.gguf", folder))
    if (folder / ADAPTER_FOLDER).is_dir():
        file = f"{ADAPTER_FOLDER}/adapter.gguf"
        lines += [f"This is the base alone; llama.cpp applies the adapter by `--lora {file}`.", ""]
    return lines


def _llama_cpp(file: str, folder: Path) -> list[str]:
    is_chat = has_template(folder)
    question = 'llm.chat([{"role": "user", "content": prompt}])' if is_chat else "llm(prompt)"
    start = ", add_bos=False" if is_chat else ""  # the template writes the start token itself
    return [
        "import cyllama",
        "",
        f'llm = cyllama.LLM("{file}", temperature=0.0, max_tokens={_NEW_TOKENS}{start})',
        "{prompt}",
        f"print({question})",
    ]


def _web(folder: Path, form: str) -> list[str]:
    is_chat = has_template(folder)
    question = '[{ role: "user", content: prompt }]' if is_chat else "prompt"
    return [
        "```sh",
        "sqft-export serve --web .",
        *("```", "", "Any static host serves this folder. In your own page:", ""),
        "```js",
        'import { pipeline } from "@huggingface/transformers";',
        "",
        'const generate = await pipeline("text-generation", "<this model>", { dtype: "q4" });',
        f"const answer = await generate({question}, {{ max_new_tokens: {_NEW_TOKENS} }});",
        *("```", ""),
    ]


_BLOCKS = {"openvino": _openvino, "onnx": _onnx, "gguf": _gguf, "web": _web}


def rewrite_card(folder: Path) -> None:
    """Update the code in a copied model card to the form of the copy.

    The card's entry in the seal is updated too. A card without this section, or one that differs
    from its seal, is left unchanged.
    """
    card = folder / CARD
    text = card.read_bytes().decode(errors="surrogateescape") if card.is_file() else ""
    section, prompt = _SECTION.search(text), _PROMPT.search(text)
    if section is None or prompt is None:
        return
    origin = read_seal(folder)
    listed = origin["files"].get(CARD) if origin else None
    if listed and listed["sha256"] != sha256_of(card):
        return
    new = usage_section(folder, json.loads(prompt[1])) + "\n"
    text = text[: section.start()] + new + text[section.end() :]
    card.write_bytes(text.encode(errors="surrogateescape"))
    if origin and listed:
        listed |= {"bytes": card.stat().st_size, "sha256": sha256_of(card)}
        write_provenance(folder, origin)
