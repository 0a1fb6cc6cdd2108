"""Models and deployments as people have them: templates, dtypes, old layouts, other exporters."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.measure.decode import generate
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.affine import fit_grid, quantize
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.numerics.gptq_layout import to_gptq
from sqft_export.packed.seal import write_seal
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.exporters import drop_unsupported
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.schema import Export
from sqft_export.targets import target
from sqft_export.targets.gguf.tokenizer import read_vocabulary
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.storage import check_storage
from sqft_export.verify.subject import Asked, Subject

RUNTIMES = ("openvino", "onnx", "gguf")
WIDE = {"intermediate_size": 192}  # that blocks of 32 divide
PROMPT = [0, 20, 222, 12, 222, 21]


def deployed(runtime: str, model: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    target(runtime).export(model, folder, Export())
    return folder


def field_of(folder: Path, key: str) -> str | None:
    field = gguf.GGUFReader(folder / "model.gguf").fields.get(key)
    return field and field.contents()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_several_chat_templates_are_deployed_with_the_default_as_the_template(tmp_path, runtime):
    model = random_model(tmp_path / "model", **WIDE)
    file = model / "tokenizer_config.json"
    named = {"default": "plain {{ messages }}", "tool_use": "tools {{ messages }}"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    folder = deployed(runtime, model, tmp_path / runtime)
    write_seal(folder, {})
    if runtime == "gguf":
        assert field_of(folder, "tokenizer.chat_template") == named["default"]
        assert field_of(folder, "tokenizer.chat_template.tool_use") == named["tool_use"]
    else:
        found = AutoTokenizer.from_pretrained(folder).chat_template
        found = found["default"] if isinstance(found, dict) else found
        assert found == named["default"]


def test_float64_weights_are_float32_in_gguf_and_plan_says_so(tmp_path):
    model = random_model(tmp_path / "model", **WIDE)
    tensors = {k: v.double() for k, v in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = small_recipe("export.targets=[gguf]", "adapt=none", model_path=model)
    layout = check_recipe(recipe, model)
    assert any("float64" in warning for warning in plan_warnings(recipe, layout))
    folder = deployed("gguf", model, tmp_path / "gguf")
    written = dict(target("gguf").read_floats(folder))
    for name, matrix in written.items():
        if matrix.ndim == 2:
            np.testing.assert_array_equal(matrix, tensors[f"{name}.weight"].float().numpy())
    assert {t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors} == {"F32"}


def test_a_token_past_the_embedding_is_left_out_of_gguf(tmp_path):
    """As the image token of Gemma 3, 262144 of 262144 rows."""
    model = random_model(tmp_path / "model", **WIDE)
    file, rows = model / "tokenizer.json", 416
    document = json.loads(file.read_text())
    image = {"id": rows, "content": "<image>", "single_word": False, "lstrip": False}
    image |= {"rstrip": False, "normalized": False, "special": True}
    document["added_tokens"].append(image)
    file.write_text(json.dumps(document))
    recipe = small_recipe("export.targets=[gguf]", "adapt=none", model_path=model)
    assert drop_unsupported(recipe, check_recipe(recipe, model)).skipped == {}
    found = read_vocabulary(model, rows)
    assert len(found.tokens) == rows and "<image>" not in found.tokens
    folder = deployed("gguf", model, tmp_path / "gguf")
    session = target("gguf").open_session(folder, True, None)
    assert session.vocabulary == rows


def as_gptq(model: Path, without_order: bool, bits: int = 4) -> dict[str, torch.Tensor]:
    """Turn a float model into a GPTQ checkpoint; returns the codes of every Linear."""
    checkpoint = Checkpoint(model)
    tensors, codes = load_file(model / "model.safetensors"), {}
    for name in checkpoint.linears:
        weight = tensors.pop(f"{name}.weight").float()
        grid = fit_grid(weight, 4, 32, True)
        codes[name] = quantize(weight, grid)
        stored = to_gptq(QuantizedWeight(codes[name], grid))
        if without_order:
            del stored["g_idx"]
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "desc_act": False,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return codes


GIVEN = ("sparsify={method: existing}", "quantize.method=existing", "quantize.group_size=32")


def test_gptq_without_g_idx_is_read_in_column_order(tmp_path):
    model = random_model(tmp_path / "model", **WIDE)
    codes = as_gptq(model, without_order=True)
    check_recipe(small_recipe(*GIVEN, model_path=model), model)
    checkpoint = Checkpoint(model)
    assert set(checkpoint.linears) == set(codes)
    for name, expected in codes.items():
        assert torch.equal(read_quantized(checkpoint, name)[0], expected)


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_of_two_and_three_bits_is_refused_with_what_is_taken(tmp_path, bits):
    model = random_model(tmp_path / "model", **WIDE)
    as_gptq(model, without_order=True, bits=bits)
    recipe = small_recipe(*GIVEN, f"quantize.bits={bits}", model_path=model)
    with pytest.raises(UserError, match=rf"{bits} bits; supported are 4 and 8 bits"):
        check_recipe(recipe, model)


@pytest.mark.parametrize("settings", [{}, {"task": "text-generation-with-past"}], ids=["no", "out"])
def test_an_openvino_graph_without_state_is_refused_by_name(random_llama, tmp_path, settings):
    """No cache at all, and a cache as inputs and outputs (--disable-stateful)."""
    from optimum.exporters.openvino import main_export

    folder = tmp_path / "foreign"
    task = {"task": "text-generation"} | settings
    main_export(str(random_llama), output=folder, stateful=False, **task)
    with pytest.raises(UserError, match=r"no key-value cache.*text-generation-with-past"):
        target("openvino").open_session(folder, True, None)


def test_an_onnx_graph_with_a_float16_cache_runs(random_llama, tmp_path):
    """As ONNX Runtime GenAI's builder writes it for other precisions."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    arguments = ("", str(random_llama), str(tmp_path / "out"), "fp16", "cpu", str(tmp_path / "c"))
    create_model(*arguments, **parse_extra_options(*arguments, []))
    session = target("onnx").open_session(tmp_path / "out", False, None)
    assert session.cache_dtype is np.float16
    reference = target("torch").open_session(random_llama, True, None)
    ids = np.random.RandomState(0).randint(5, 400, (2, 12))
    for part in (ids[:, :8], ids[:, 8:9], ids[:, 9:10]):
        ours, theirs = reference.forward(part), session.forward(part)
        assert theirs.dtype == np.float32
        assert np.abs(ours - theirs).max() / ours.std() < 0.1
    assert len(generate(session, [PROMPT], 4, stop=[])[0]) == 4


def test_an_onnx_graph_without_a_cache_is_refused(random_llama, tmp_path):
    import onnx

    folder = deployed("onnx", random_llama, tmp_path / "out")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    kept = [i for i in model.graph.input if not i.name.startswith("past_")]
    renamed = [i for i in model.graph.input if i.name.startswith("past_")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for value in renamed:
        zeros = onnx.helper.make_tensor(value.name, 1, [1, 2, 0, 16], [])
        model.graph.initializer.append(zeros)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(UserError, match="no past_key_values inputs"):
        target("onnx").open_session(folder, False, None)


NORM = "model.layers.{}.input_layernorm.weight"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_two_norms_that_changed_places_are_named(tmp_path, runtime):
    """Their bytes are all there, in the wrong place."""
    model = random_model(tmp_path / "merge" / "model", **WIDE)
    folder = deployed(runtime, model, tmp_path / runtime / "model")
    texts = Asked([PROMPT], [("3 + 4", AutoTokenizer.from_pretrained(model)("3 + 4")["input_ids"])],
                  4, 1e-4, 0.1, False)  # fmt: skip
    subject = Subject(texts, {}, None, tmp_path, model.parent, {runtime: folder.parent})
    assert all(check.passed for check in checked(subject, runtime))
    tensors = load_file(model / "model.safetensors")
    one, other = (NORM.format(layer) for layer in (0, 1))
    tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    subject = Subject(texts, {}, None, tmp_path, model.parent, {runtime: folder.parent})
    [line] = [check for check in checked(subject, runtime) if not check.passed]
    assert line.name == f"float weights: merged and {runtime}"
    assert {one, other} <= set(line.where)


def checked(subject: Subject, runtime: str) -> list:
    certificate = Certificate()
    check_storage(certificate, subject, runtime)
    return certificate.checks


def test_a_gguf_config_has_the_context_of_its_file(tmp_path):
    """llama.cpp has no window in this architecture: the context ends with it."""
    model = random_model(tmp_path / "model", model_type="mistral", sliding_window=16, head_dim=16)
    folder = deployed("gguf", model, tmp_path / "gguf")
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 16
    assert field_of(folder, "llama.context_length") == 16
