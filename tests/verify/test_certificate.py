"""Every check of the certificate can fail: each file is damaged once, and named."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import random_model, small_recipe
from sqft_export.adapters.linear import _Adapted
from sqft_export.errors import CertificateError
from sqft_export.kernels.library import read_header
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import openvino as targets_openvino
from sqft_export.targets import target
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.certify import certify
from sqft_export.verify.subject import Asked, Subject

SETTINGS = ("adapt.steps=2", "adapt.ranks=[8, 4]", "verify.prompts=2", "verify.new_tokens=4")
LAYER = "model.layers.1.mlp.up_proj"
CODES = "weights of the trained forward, merged"
OTHERS = "embeddings, norms, biases, merged"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict:
    """A model with biases, through all passes up to its certificate."""
    root = tmp_path_factory.mktemp("certified")
    model = random_model(root / "model", attention_bias=True, vocab_size=416)
    return run_recipe(small_recipe(*SETTINGS, model_path=model), root / "runs", ("verify",))


@pytest.fixture
def subject(artifacts, tmp_path) -> Subject:
    """A private copy of everything, to break."""
    source = artifacts["merge"].path.parent
    root = Path(shutil.copytree(source, tmp_path / "runs", copy_function=shutil.copyfile))
    of = {name: root / artifact.path.name for name, artifact in artifacts.items()}
    (tmp_path / "scratch").mkdir()
    return Subject(
        Asked.read(of["verify"]),
        {name: of[name] / "model" for name in ("sparsify", "quantize")},
        of["sparsify"],
        of["search"],
        of["merge"],
        {name: of[f"export-{name}"] for name in ("openvino", "onnx")},
        scratch=tmp_path / "scratch",
    )


def failed(subject: Subject) -> set[str]:
    certificate = certify(subject, lambda: None)
    return {check.name for check in certificate.checks if not check.passed}


def edit(file: Path, key: str, change) -> None:
    """Change one tensor of a safetensors file."""
    tensors = load_file(file)
    tensors[key] = change(tensors[key].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def first_plus(amount):
    def change(tensor):
        tensor.view(-1)[0] += amount
        return tensor

    return change


def test_nothing_is_named_where_nothing_is_broken(subject):
    certificate = certify(subject, lambda: None)
    assert [str(check) for check in certificate.checks if not check.passed] == []
    assert {check.part for check in certificate.checks} == {"fidelity", "storage", "compute"}
    certificate.require()


def merged_file(subject: Subject) -> Path:
    return subject.merge / "model" / "model.safetensors"


@pytest.mark.parametrize(
    ("key", "amount", "line"),
    [
        (f"{LAYER}.qweight", 1, CODES),
        (f"{LAYER}.scales", 0.01, CODES),
        (f"{LAYER}.qzeros", 1, CODES),
        ("model.embed_tokens.weight", 0.01, OTHERS),
        ("model.layers.0.input_layernorm.weight", 0.01, OTHERS),
        ("model.layers.0.self_attn.q_proj.bias", 0.01, OTHERS),
        ("lm_head.weight", 0.01, OTHERS),
    ],
)
def test_a_number_of_the_merged_model_is_named(subject, key, amount, line):
    edit(merged_file(subject), key, first_plus(amount))
    found = failed(subject)
    assert line in found
    # The deployments hold what was merged before: every file differs from it too.
    both = "codes, scales, zero points" if line == CODES else "float weights"
    assert {f"{both}: merged and openvino", f"{both}: merged and onnx"} <= found


def test_a_bit_of_the_mask_is_named(subject):
    def keep_less(bits):
        kept = int(bits.view(-1).nonzero()[0])
        bits.view(-1)[kept] = 0  # eight positions that were kept are now to be zero
        return bits

    edit(subject.masks / "masks.safetensors", LAYER, keep_less)
    found = failed(subject)
    for where in ("sparsify", "quantize", "the merged model", "openvino", "onnx"):
        assert f"pruned positions zero in {where}" in found


@pytest.mark.parametrize("name", ["sparsify", "quantize"])
def test_a_zero_that_comes_back_is_named(subject, name):
    def revive(weight):
        weight.view(-1)[int((weight.view(-1) == 0).nonzero()[0])] = 1e-7
        return weight

    edit(subject.passes[name] / "model.safetensors", f"{LAYER}.weight", revive)
    assert failed(subject) == {f"pruned positions zero in {name}"}


def dense_update(ctx, x, lora_a, lora_b, shift, layer, scaling):
    """A training forward with no mask, no grid and three times the update."""
    ctx.save_for_backward(x, lora_a, lora_b, shift)
    ctx.layer, ctx.scaling = layer, scaling
    return nn.functional.linear(x, layer.weight.float() + 3 * scaling * (lora_b @ lora_a))


def test_another_training_forward_is_named(tmp_path, monkeypatch):
    """The certificate must not take the unchanged merge for the trained side."""
    monkeypatch.setattr(_Adapted, "forward", staticmethod(dense_update))
    model = random_model(tmp_path / "model")
    recipe = small_recipe(*SETTINGS, "adapt.learning_rate=1e-2", model_path=model)
    with pytest.raises(CertificateError) as caught:
        run_recipe(recipe, tmp_path / "runs", ("verify",))
    for line in (CODES, "logits of the trained model and merged", "zero in the trained forward"):
        assert line in str(caught.value)
    assert "merged and openvino" not in str(caught.value)


def drop_merges(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def test_a_merge_of_the_tokenizer_is_named(subject):
    drop_merges(subject.merge / "model")
    assert failed(subject) == {"token ids: base and merged"}


def test_a_tokenizer_of_a_deployment_is_named(subject, tmp_path):
    drop_merges(subject.exports["onnx"] / "model")
    folder = subject.exports["openvino"] / "model"
    words = ov.Core().read_model(folder / "openvino_tokenizer.xml")
    pieces = (folder / "openvino_tokenizer.bin").read_bytes()
    assert pieces.count(b"Question")
    del words
    (folder / "openvino_tokenizer.bin").write_bytes(pieces.replace(b"Question", b"Questiom"))
    assert failed(subject) == {
        "token ids: base and ONNX Runtime GenAI",
        "token ids: base and OpenVINO GenAI",
        "answer to a text as OpenVINO GenAI takes it, and to its token ids in openvino",
    }


def flip_in_ir(subject: Subject, wanted) -> None:
    """Flip a bit of the first constant that ``wanted`` says yes to, in the written file."""
    folder = subject.exports["openvino"] / "model"
    graph = ov.Core().read_model(folder / "openvino_model.xml")
    constants = [n for n in graph.get_ops() if n.get_type_name() == "Constant" and wanted(n)]
    stored = bytearray((folder / "openvino_model.bin").read_bytes())
    data = bytes(constants[0].get_tensor_view().data)
    at = bytes(stored).find(data)
    assert at >= 0
    stored[at + 1] ^= 0x10
    del graph, constants
    (folder / "openvino_model.bin").write_bytes(bytes(stored))


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (f"{LAYER}.weight", "codes, scales, zero points: merged and openvino"),
        (f"{LAYER}.weight/scale", "codes, scales, zero points: merged and openvino"),
        ("model.embed_tokens.weight", "float weights: merged and openvino"),
    ],
)
def test_a_bit_of_the_ir_is_named(subject, ending, line):
    flip_in_ir(subject, lambda node: node.get_friendly_name().endswith(ending))
    found = failed(subject)
    assert line in found and not any("onnx" in name for name in found)


def change_sparse(subject: Subject, change) -> None:
    """Write the folder of sparse execution again, with something else in one matrix."""
    folder = subject.exports["openvino"] / "sparse"
    (folder / "provenance.json").unlink()
    text = (folder / "openvino_model.xml").read_bytes()
    file = folder / "openvino_model.bin"
    weights = np.fromfile(file, np.uint8)
    (place,) = (
        layer
        for layer in ElementTree.fromstring(text).iter("layer")
        if layer.get("name", "").removeprefix("self.") == f"{LAYER}.weight"
    )
    data = place.find("data")
    start, size = int(data.get("offset")), int(data.get("size"))
    blob = weights[start : start + size].copy()
    header = read_header(blob, LAYER)
    change(blob, header)
    weights[start : start + size] = blob
    weights.tofile(file)


def other_code(blob, header):
    blob[header.kept] ^= 1


def other_scale(blob, header):
    blob[header.fixed] ^= 1


def other_position(blob, header):
    """One code moved to where a zero was: as many are kept."""
    mask = blob[header.fixed + 4 * header.lanes :]
    byte = next(i for i, bits in enumerate(mask) if 0 < bits < 255)
    bits = int(mask[byte])
    mask[byte] = bits ^ (bits & -bits) | (~bits & -~bits & 255)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (other_code, ("codes, scales, zero points: merged and",)),
        (other_scale, ("codes, scales, zero points: merged and",)),
        (
            other_position,
            ("codes, scales, zero points: merged and", "pruned positions zero in"),
        ),
    ],
)
def test_a_bit_of_sparse_execution_is_named(subject, change, lines):
    change_sparse(subject, change)
    found = failed(subject)
    for line in (*lines, "logits: merged in torch and"):
        assert f"{line} openvino, sparse execution" in found
    assert not {name for name in found if "sparse execution" not in name}


def test_a_kernel_that_computes_something_else_is_named(subject, monkeypatch):
    """The weights as they were, and products that are a little off."""
    opened = targets_openvino.open_session

    def a_little_off(folder, *rest):
        session = opened(folder, *rest)
        if folder.name == "sparse":
            forward = session.forward
            session.forward = lambda *asked: forward(*asked) * 1.01
        return session

    monkeypatch.setattr(targets_openvino, "open_session", a_little_off)
    assert failed(subject) == {"logits: merged in torch and openvino, sparse execution"}


def test_a_norm_in_the_ir_is_named(subject):
    norm = load_file(merged_file(subject))["model.layers.0.input_layernorm.weight"].float()
    same = lambda node: np.array_equal(node.data.reshape(-1), norm.numpy())  # noqa: E731
    flip_in_ir(subject, lambda node: node.get_element_type() == ov.Type.f32 and same(node))
    assert "float weights: merged and openvino" in failed(subject)


def change_onnx(subject: Subject, name: str, byte: int = 2) -> None:
    folder = subject.exports["onnx"] / "model"
    (folder / "provenance.json").unlink()  # else the seal stops it first
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if name in t.name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where:
        stored = bytearray((folder / "model.onnx.data").read_bytes())
        stored[int(where["offset"]) + byte] ^= 0x40
        (folder / "model.onnx.data").write_bytes(bytes(stored))
        return
    raw = bytearray(tensor.raw_data)
    raw[byte] ^= 0x40
    tensor.raw_data = bytes(raw)
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (f"{LAYER}.B", "codes, scales, zero points: merged and onnx"),
        (f"{LAYER}.scales", "codes, scales, zero points: merged and onnx"),
        ("embed_tokens.weight", "float weights: merged and onnx"),
        ("input_layernorm.weight", "float weights: merged and onnx"),
        # Not a weight of the model: only the runtime's results reveal it.
        ("cos_cache", "logits: merged in torch and onnx"),
    ],
)
def test_a_bit_of_the_onnx_files_is_named(subject, name, line):
    change_onnx(subject, name)
    found = failed(subject)
    assert line in found and not any("openvino" in named for named in found)


def test_zeros_of_a_float_model_that_come_back_are_named(tmp_path):
    model = random_model(tmp_path / "model")
    recipe = small_recipe(
        *SETTINGS, "quantize.method=none", "adapt.pipeline=sparsepeft", model_path=model
    )
    made = run_recipe(recipe, tmp_path / "runs", ("verify",))
    folder = made["export-openvino"].path / "model"
    graph = ov.Core().read_model(folder / "openvino_model.xml")
    (node,) = [n for n in graph.get_ops() if n.get_friendly_name() == f"{LAYER}.weight"]
    data, stored = bytes(node.get_tensor_view().data), (folder / "openvino_model.bin").read_bytes()
    weight = np.frombuffer(data, node.data.dtype).copy()
    weight[np.flatnonzero(weight == 0)[:200]] = 1e-7
    del graph, node
    (folder / "openvino_model.bin").write_bytes(stored.replace(data, weight.tobytes()))
    subject = Subject(
        Asked.read(made["verify"].path),
        {"sparsify": made["sparsify"].path / "model"},
        made["sparsify"].path,
        made["search"].path,
        made["merge"].path,
        {"openvino": made["export-openvino"].path},
        scratch=tmp_path,
    )
    assert {"float weights: merged and openvino", "pruned floats zero in openvino"} <= failed(
        subject
    )


def test_a_packed_copy_of_other_bytes_is_named(subject):
    folder = subject.exports["openvino"] / "model"
    content = bytearray((folder / "openvino_model.bin").read_bytes())
    content[-1] ^= 1
    (folder / "openvino_model.bin").write_bytes(bytes(content))
    assert "bytes inflated from the packed openvino" in failed(subject)


def test_kernels_that_fell_back_to_floats_are_named(subject, monkeypatch):
    monkeypatch.setattr(target("onnx"), "compressed_kernels", lambda *_: set())
    assert failed(subject) == {"layers on compressed kernels in onnx"}


def test_a_default_mode_that_is_too_far_away_is_named(subject):
    strict = replace(subject, asked=replace(subject.asked, divergence=1e-12))
    assert {name for name in failed(strict)} == {
        "divergence of openvino in its default mode",
        "divergence of openvino, sparse execution in its default mode",
        "divergence of onnx in its default mode",
    }


def test_a_line_that_compared_nothing_does_not_pass():
    certificate = Certificate()
    certificate.start("storage", "nothing", "numbers")
    with pytest.raises(CertificateError, match="storage: nothing: nothing was compared"):
        certificate.require()


def test_numbers_that_are_none_do_not_pass():
    certificate = Certificate()
    check = certificate.start("compute", "logits", "standard deviations", 1.0)
    check.record_largest(float("nan"), 1, "x")
    with pytest.raises(CertificateError, match="inf standard deviations"):
        certificate.require()


def test_an_adapter_that_was_not_merged_is_held_against_what_trained(tmp_path):
    model = random_model(tmp_path / "model")
    recipe = small_recipe(*SETTINGS, "adapt.pipeline=sqft", model_path=model)
    made = run_recipe(recipe, tmp_path / "runs", ("verify",))
    subject = Subject(
        Asked.read(made["verify"].path),
        {},
        made["sparsify"].path,
        made["search"].path,
        made["merge"].path,
        {},
    )
    assert not failed(subject)
    edit(
        subject.merge / "adapter" / "adapter_model.safetensors",
        f"base_model.model.{LAYER}.lora_A.weight",
        first_plus(torch.tensor(0.1)),
    )
    assert CODES in failed(subject)
