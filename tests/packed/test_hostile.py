"""Deployments made to harm: one message with its exit code, in bounded time and memory."""

import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
import xxhash

import sqft_export
from sqft_export.artifacts.store import Store, check_artifact, key_of
from sqft_export.errors import DamagedError, UserError
from sqft_export.kernels.ir import Graph
from sqft_export.packed.container import MAGIC, PackedFile, Writer
from sqft_export.packed.execution import specialize
from sqft_export.packed.folders import pack
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.regions import find_regions
from sqft_export.packed.seal import check_seal, write_seal
from sqft_export.packed.streaming import check_dense_digest
from sqft_export.targets.folder import is_deployment
from sqft_export.targets.inspect import inspect_folder

FORMS = ["openvino", "onnx", "gguf"]
IR, ONNX = "openvino_model.xml", "model.onnx"


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of a deployment by runtime."""

    def made(runtime: str, form: str = "model") -> Path:
        source = tiny_run[f"export-{runtime}"].path / form
        return Path(shutil.copytree(source, tmp_path / f"{runtime}-{form}"))

    return made


def unsealed(folder: Path) -> Path:
    (folder / "provenance.json").unlink()
    return folder


def add_pipe(folder):
    os.mkfifo(folder / "added")


def add_folder(folder):
    (folder / "added").mkdir()


def add_dangling_link(folder):
    (folder / "added").symlink_to("nowhere")


def add_link_to_folder(folder):
    (folder / "added").symlink_to(".")


def add_manifest(folder):
    (folder / "manifest.json").write_text("{}")


ADDED = [add_pipe, add_folder, add_dangling_link, add_link_to_folder, add_manifest]


@pytest.mark.parametrize("add", ADDED)
def test_whatever_is_added_to_a_sealed_deployment_is_named(copy, add):
    folder = copy("onnx")
    assert check_seal(folder, whole=True)
    add(folder)
    with pytest.raises(DamagedError, match=r"was added after it was sealed: (added|manifest)"):
        check_seal(folder, whole=True)


@pytest.mark.parametrize("add", ADDED)
def test_whatever_is_added_to_an_artifact_is_named(tmp_path, add):
    facts, store = {"stage": "merge"}, Store(tmp_path)
    partial = store.open_partial("merge", key_of(facts), resumes=False)
    (partial / "model").mkdir()
    (partial / "model" / "config.json").write_text("{}")
    (partial / "left" / "over").mkdir(parents=True)
    sealed = store.seal(partial, "merge", facts, {}, 1.0).path
    check_artifact(sealed)  # the empty folders of a pass are not part of it
    add(sealed / "model")
    with pytest.raises(DamagedError, match=r"missing or added files: model/(added|manifest)"):
        check_artifact(sealed)


def test_every_flipped_bit_of_a_provenance_is_found(copy):
    folder = copy("onnx")
    file = folder / "provenance.json"
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 150)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(bytes(changed))
        try:
            same = json.loads(changed) == json.loads(content)  # a blank between two values
        except ValueError:
            same = False
        if not same:
            with pytest.raises(DamagedError):
                check_seal(folder, whole=True)


def test_a_provenance_without_a_seal_loads_and_is_not_called_sealed(copy):
    folder = copy("onnx")
    document = json.loads((folder / "provenance.json").read_text())
    del document["seal"]
    (folder / "provenance.json").write_text(json.dumps(document))
    assert check_seal(folder, whole=False)
    with pytest.raises(
        DamagedError, match="has no field 'seal', as in older versions; copy or export it again"
    ):
        check_seal(folder, whole=True)


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "a/../../secret", "x" * 5000, ""])
def test_a_provenance_lists_files_of_its_folder_alone(copy, name):
    folder = copy("onnx")
    document = json.loads((folder / "provenance.json").read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    del document["seal"]
    document["seal"] = key_of(document)
    (folder / "provenance.json").write_text(json.dumps(document))
    with pytest.raises(DamagedError, match="a file of the folder is expected") as refused:
        check_seal(folder, whole=True)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("runtime", FORMS)
def test_a_link_in_a_packed_folder_is_not_followed_out(copy, tmp_path, runtime):
    (tmp_path / "secret").write_text("secret")
    folder = unsealed(copy(runtime, "packed"))
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    load = {"openvino": sqft_export.load_openvino, "onnx": sqft_export.load_onnx}
    with pytest.raises(UserError, match=r"notes.txt: is a link to .*, outside the folder"):
        load.get(runtime, sqft_export.load_gguf)(folder)


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_tokenizer.bin", "config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_by_every_reader(copy, name):
    folder = unsealed(copy("openvino"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    readers = [inspect_folder, sqft_export.load_openvino, sqft_export.load_openvino_genai]
    for read in [*readers, lambda f: sqft_export.load_openvino(f, execution="stock")]:
        with pytest.raises(UserError, match=r"is no regular file \(a pipe\)"):
            read(folder)


@pytest.mark.parametrize("runtime", FORMS)
def test_a_packed_deployment_is_one_for_verify(tiny_run, runtime):
    folder = tiny_run[f"export-{runtime}"].path / "packed"
    assert is_deployment(folder) and check_seal(folder, whole=True)
    assert not is_deployment(tiny_run["merge"].path / "model")


def test_a_link_that_leads_in_a_circle_is_named_by_pack(copy, tmp_path):
    folder = copy("gguf")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: is a circular link"):
        pack(folder, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r'shape="', 'shape="x'),
        (r'size="', 'size="x'),
        (r'offset="\d+"', 'offset=","'),
        (r'offset="', 'offset="-'),
        (r'size="', 'size="9999999999999999999'),
        (r' id="1" name', ' id="nf4" name'),
        (r' id="1" name', ' id="0" name'),
        (r'<edge from-layer="\d+"', '<edge from-layer="999999"'),
        (r'from-layer="\d+" ', ""),
        (r'to-port="\d+"', ""),
        (r"<\?xml[^>]*>", '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "b">]>'),
        (r"</net>", "<a>" * 100 + "</a>" * 100 + "</net>"),
        (r'shape="256', 'shape="' + "9, " * 50 + "256"),
    ],
)
def test_pack_and_specialize_name_what_is_wrong_in_an_ir(copy, tmp_path, old, new):
    folder = unsealed(copy("openvino"))
    text = (folder / IR).read_text()
    changed = re.sub(old, new, text)
    assert changed != text
    (folder / IR).write_text(changed)
    for work in (pack, specialize):
        with pytest.raises(UserError, match=r"openvino_model.xml: ") as refused:
            work(folder, tmp_path / "out")
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
        assert not list(tmp_path.glob("out*"))


def test_a_circle_of_layers_is_refused(copy, tmp_path):
    folder = unsealed(copy("openvino"))
    text = (folder / IR).read_text()
    layer = re.search(r'<layer id="(\d+)" name="[^"]*" type="Convert"', text)[1]
    edge = rf'<edge from-layer="\d+" from-port="\d+" to-layer="{layer}"'
    (folder / IR).write_text(
        re.sub(edge, f'<edge from-layer="{layer}" from-port="1" to-layer="{layer}"', text)
    )
    for work in (
        lambda: specialize(folder, tmp_path / "out"),
        lambda: pack(folder, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=rf"layer {layer} is in or behind a cycle of layers"):
            work()


def test_a_long_chain_of_converts_does_not_keep_the_walk_busy():
    """Twenty thousand products behind one chain of as many layers: each walk is short."""
    count = 20_000
    layers = ['<layer id="0" type="Parameter"><output/></layer>']
    layers += [f'<layer id="{n}" type="Convert"/>' for n in range(1, count)]
    data = '<data transpose_b="true"/>'
    layers += [f'<layer id="{n}" type="MatMul">{data}</layer>' for n in range(count, 2 * count)]
    ends = [(n - 1, n, 0) for n in range(1, count)]
    ends += [(count - 1, n, 1) for n in range(count, 2 * count)]
    edges = "".join(
        f'<edge from-layer="{a}" from-port="0" to-layer="{b}" to-port="{port}"/>'
        for a, b, port in ends
    )
    text = f"<net><layers>{''.join(layers)}</layers><edges>{edges}</edges></net>".encode()
    assert Graph(text, "x").products() == []


def external(model, **values):
    stored = next(t for t in model.graph.initializer if t.name.endswith(".B"))
    for entry in stored.external_data:
        entry.value = values.get(entry.key, entry.value)


def no_block_size(model):
    for node in model.graph.node:
        kept = [a for a in node.attribute if a.name != "block_size"]
        del node.attribute[:]
        node.attribute.extend(kept)


def no_inputs(model):
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            del node.input[:]


def odd_attributes(model):
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("N", "bits"):
                attribute.i = 2**62 if attribute.name == "N" else 3


@pytest.mark.parametrize(
    "change",
    [
        lambda model: external(model, length="x"),
        lambda model: external(model, length=""),
        lambda model: external(model, offset="x"),
        lambda model: external(model, offset="9" * 30),
        no_block_size,
        no_inputs,
        odd_attributes,
    ],
)
def test_pack_takes_or_names_what_is_odd_in_an_onnx_graph(copy, tmp_path, change):
    folder = unsealed(copy("onnx"))
    model = onnx.load(folder / ONNX, load_external_data=False)
    change(model)
    onnx.save(model, folder / ONNX)
    try:
        pack(folder, tmp_path / "out")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        assert not list(tmp_path.glob("out*"))
    else:
        assert check_packed(tmp_path / "out" / "model.onnx.data.sqft") is None


def check_packed(file: Path) -> None:
    with PackedFile(file) as opened:
        check_dense_digest(opened)


@pytest.mark.parametrize(
    ("runtime", "name"), [("openvino", "openvino_model.bin"), ("gguf", "model.gguf")]
)
def test_an_empty_weight_file_is_named(copy, tmp_path, runtime, name):
    folder = unsealed(copy(runtime))
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: is empty"):
        pack(folder, tmp_path / "out")


def test_a_length_in_a_gguf_header_is_not_believed(copy, tmp_path):
    """An array of scores that claims 2^40 values: the gguf package walks them past the end."""
    file = unsealed(copy("gguf")) / "model.gguf"
    content = bytearray(file.read_bytes())
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 8  # its kind, and that of its values
    for length in (2**40, 2**21):
        content[at : at + 8] = length.to_bytes(8, "little")
        file.write_bytes(bytes(content))
        with pytest.raises(UserError, match="not a GGUF file"):
            read_gguf(file)
        with pytest.raises(UserError, match="not a GGUF file"):
            pack(file.parent, tmp_path / "out")


def test_a_gguf_tensor_without_elements_stays_as_it_is(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("none", np.zeros((4, 0), np.float32))
    writer.add_tensor("some", np.ones((4, 4096), np.float32))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    found = find_regions(tmp_path / "model.gguf", tmp_path / "model.gguf")
    assert [region.name for region in found] == ["some"]


def container(file: Path, regions: list[dict], size: int, payload: bytes) -> Path:
    header = {"version": 1, "file": "model.onnx.data", "size": size, "sha256": "0" * 64}
    text = json.dumps(header | {"regions": regions}).encode()
    whole = MAGIC + len(text).to_bytes(8, "little") + text + xxhash.xxh3_128_digest(text)
    file.write_bytes(whole + bytes(-len(whole) % 64) + payload)
    return file


def raw(at: int, stored: bytes, size: int, place: int = 0) -> dict:
    piece = {"at": place, "size": len(stored), "bytes": size, "frames": [len(stored)]}
    piece["xxh3_128"] = xxhash.xxh3_128_hexdigest(stored)
    return {"kind": "raw", "at": at, "size": size, "data": piece}


def test_a_small_container_does_not_stand_for_a_large_file(tmp_path):
    """Regions of one piece, in a file with a hole that stores nothing."""
    import zstandard

    frame = zstandard.ZstdCompressor().compress(bytes(2**20))
    regions = [raw(n * 2**20, frame, 2**20) for n in range(1024)]
    file = container(tmp_path / "x.sqft", regions, 2**30, frame)
    with file.open("r+b") as stream:
        stream.truncate(2**22)
    with pytest.raises(DamagedError, match=r"times its stored bytes|two pieces share"):
        PackedFile(file)
    junk = os.urandom(2**22)
    stored = {"at": 64 * (len(frame) // 64 + 1), "size": len(junk), "bytes": len(junk)}
    stored["xxh3_128"] = xxhash.xxh3_128_hexdigest(junk)
    regions = [raw(0, frame, 2**20), raw(2**20, frame, 2**20)]
    regions.append({"kind": "raw", "at": 2**21, "size": len(junk), "data": stored})
    payload = frame + bytes(stored["at"] - len(frame)) + junk
    with pytest.raises(DamagedError, match="two pieces share byte 0 of the payload"):
        PackedFile(container(tmp_path / "y.sqft", regions, 2**21 + len(junk), payload))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("group", [0, 64, 96])
def test_a_container_is_checked_in_little_memory(tmp_path, entropy, group):
    random = np.random.default_rng(0)
    dense = np.full(2**25, 8, np.uint8)
    dense[random.integers(0, len(dense), 10**5)] = 3
    writer = Writer(tmp_path / "x.sqft", entropy)
    noise = random.integers(0, 255, 2**20, np.uint8)
    writer.raw(0, noise)
    groups = -(-len(dense) // group) if group else 1
    from sqft_export.packed.container import ZeroPoints

    fill = 8 if not group else ZeroPoints(at=0, bits=8, rows=1, per_row=groups, row_bytes=groups)
    fills = np.array([8], np.uint32) if not group else noise[:groups].astype(np.uint32)
    if group:
        dense = np.where(dense == 8, np.repeat(fills, group)[: len(dense)], 3).astype(np.uint8)
    writer.sparse("w", len(noise), dense, 8, len(dense), fill, fills, group)
    whole = np.concatenate([noise, dense])
    import hashlib

    writer.finish("w", len(whole), hashlib.sha256(whole.data).hexdigest())
    del whole
    with PackedFile(tmp_path / "x.sqft") as opened:
        assert opened.header.regions[-1].kind == "sparse"
        tracemalloc.start()
        check_dense_digest(opened)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**24  # of 33 MiB


@pytest.mark.parametrize("count", [10, 40_000])
def test_a_header_of_wrong_regions_is_one_short_message(tmp_path, count):
    file = container(tmp_path / "x.sqft", [{"kind": "raw", "at": "x"}] * count, 5, b"")
    with pytest.raises(DamagedError, match="its header is not valid") as refused:
        PackedFile(file)
    assert len(str(refused.value)) < 1000


def test_a_seal_is_written_once_more_for_a_changed_copy(copy, tmp_path):
    folder = copy("openvino")
    specialize(folder, tmp_path / "sparse")
    assert check_seal(tmp_path / "sparse", whole=True)
    write_seal(folder, json.loads((folder / "provenance.json").read_text()))
    assert check_seal(folder, whole=True)


def test_an_operator_of_ours_multiplies_floats_alone():
    """Bytes taken for floats would be read past their end."""
    import openvino as ov

    core = ov.Core()
    core.add_extension(sqft_export.openvino_extension())
    for kind in ("u8", "f16", "i64"):
        with pytest.raises(RuntimeError, match="f32 is expected"):
            core.read_model(
                OPERATOR.replace("KIND", kind).encode(), ov.Tensor(np.zeros(64, np.uint8))
            )
    scalar = (
        OPERATOR.replace("KIND", "f32").replace("1,64", "").replace("<dim>1</dim><dim>64</dim>", "")
    )
    with pytest.raises(RuntimeError, match="a scalar can't be multiplied"):
        core.read_model(scalar.encode(), ov.Tensor(np.zeros(64, np.uint8)))


OPERATOR = """<?xml version="1.0"?><net name="x" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1,64" element_type="KIND"/>
<output><port id="0" precision="FP32"><dim>1</dim><dim>64</dim></port></output></layer>
<layer id="1" name="w" type="Const" version="opset1">
<data element_type="u8" shape="64" offset="0" size="64"/>
<output><port id="0" precision="U8"><dim>64</dim></port></output></layer>
<layer id="2" name="y" type="SqftMatMul" version="sqft_export"><data rows="8" activations="int8"/>
<input><port id="0"><dim>1</dim><dim>64</dim></port><port id="1"><dim>64</dim></port></input>
<output><port id="2" precision="FP32"><dim>1</dim><dim>8</dim></port></output></layer>
<layer id="3" name="r" type="Result" version="opset1">
<input><port id="0"><dim>1</dim><dim>8</dim></port></input></layer></layers><edges>
<edge from-layer="0" from-port="0" to-layer="2" to-port="0"/>
<edge from-layer="1" from-port="0" to-layer="2" to-port="1"/>
<edge from-layer="2" from-port="2" to-layer="3" to-port="0"/></edges></net>"""
