"""Packed weight files: the same bytes back, the same results in the runtimes, damage refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sqft_export
from conftest import SQFT, random_model, small_recipe
from sqft_export.artifacts.store import digest_of, sha256_of
from sqft_export.errors import UserError
from sqft_export.packed.container import MAGIC, PackedFile
from sqft_export.packed.folders import pack, unpack
from sqft_export.packed.inflate import CHUNK, Memory, deflate, inflate, native_library
from sqft_export.recipe.schema import Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

KINDS = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}


def literal_inflate(bits, elements, mask, kept, fill, group):
    """Element by element, as the format is written down."""
    out, at, chunk_end = [], 0, 0
    for e in range(elements):
        if e % CHUNK == 0:
            at = -(-at * bits // 8) * 8 // bits if bits < 8 else at
            chunk_end = e + CHUNK
        assert e < chunk_end
        if mask[e // 8] >> (e % 8) & 1:
            if bits == 4:
                out.append(kept[at // 2] >> (at % 2 * 4) & 15)
            else:
                size = bits // 8
                out.append(int.from_bytes(kept[at * size : (at + 1) * size].tobytes(), "little"))
            at += 1
        else:
            out.append(fill[e // group] if group else fill[0])
    return np.array(out, KINDS[bits])


def dense_bytes(values, bits):
    if bits == 4:
        values = np.concatenate([values, np.zeros(len(values) % 2, np.uint8)])
        return values[0::2] | (values[1::2] << 4)
    return values.view(np.uint8)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_way_to_inflate_is_the_literal_one(data):
    bits = data.draw(st.sampled_from([4, 8, 16, 32]))
    elements = data.draw(st.integers(1, 700))
    group = data.draw(st.sampled_from([0, 1, 16, 24, 32, 128]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sparsity = data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    top = min(2**bits, 2**31)
    values = random.integers(0, top, elements, dtype=np.int64).astype(KINDS[bits])
    fill = random.integers(0, top, max(1, -(-elements // group) if group else 1)).astype(np.uint32)
    fills = fill[np.arange(elements) // group] if group else fill[0]
    values = np.where(random.random(elements) < sparsity, fills, values).astype(KINDS[bits])
    dense = dense_bytes(values, bits)
    mask, kept = deflate(bits, elements, dense, fill, group)
    assert np.unpackbits(mask, bitorder="little").sum() == (values != fills).sum()
    np.testing.assert_array_equal(literal_inflate(bits, elements, mask, kept, fill, group), values)
    with ThreadPoolExecutor(2) as pool:
        for library in WAYS:
            out = np.empty_like(dense)
            tasks = inflate(bits, elements, mask, kept, fill, group, Memory(out), 0, pool, library)
            for task in tasks:
                task.result()
            np.testing.assert_array_equal(out, dense)


def test_tensors_of_several_chunks_are_inflated_whole():
    elements = 2 * CHUNK + 77
    random = np.random.default_rng(0)
    for bits in (4, 8):
        values = random.integers(0, 16, elements).astype(np.uint8)
        values[random.random(elements) < 0.6] = 8
        fill, dense = np.array([8], np.uint32), dense_bytes(values, bits)
        mask, kept = deflate(bits, elements, dense, fill, 0)
        for library in WAYS:
            out = np.empty_like(dense)
            with ThreadPoolExecutor(2) as pool:
                tasks = inflate(bits, elements, mask, kept, fill, 0, Memory(out), 0, pool, library)
                for task in tasks:
                    task.result()
            np.testing.assert_array_equal(out, dense)


class Level:
    """The compiled library, restricted to one of its code paths."""

    def __init__(self, level: int):
        self.sqft_inflate, self.level = native_library().sqft_inflate, level

    def sqft_level(self) -> int:
        return min(self.level, native_library().sqft_level())


# numpy, and every way of the compiled library that this processor has
WAYS = [lambda: None, *(lambda level=level: Level(level) for level in range(3))]


def test_the_compiled_library_is_there_and_used():
    """CI has a compiler; without one, numpy gives the same result (tested above)."""
    assert native_library() is not None


DEPLOYMENTS = ["export-openvino", "export-onnx", "export-gguf"]


@pytest.mark.parametrize("entropy", [False, True], ids=["packed", "entropy"])
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_packing_and_unpacking_gives_the_same_folder(tiny_run, tmp_path, name, entropy):
    folder = tiny_run[name].path / "model"
    told = pack(folder, tmp_path / "packed", entropy)
    assert told["sparse_tensors"] >= 20
    assert told["packed_bytes"] < 0.9 * told["dense_bytes"]
    unpack(tmp_path / "packed", tmp_path / "again")
    assert digest_of(tmp_path / "again") == digest_of(folder)


@pytest.mark.parametrize("entropy", [False, True], ids=["packed", "entropy"])
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_packed_folder_says_exactly_what_the_dense_one_says(tiny_run, tmp_path, name, entropy):
    """As deployed, not in exact mode: the graph and its kernels are the same."""
    folder, packed = tiny_run[name].path / "model", tmp_path / "packed"
    pack(folder, packed, entropy)
    runtime = target(name.removeprefix("export-"))
    ids = np.random.RandomState(0).randint(5, 400, (2, 20))
    dense, sparse = (runtime.open_session(f, False, 1) for f in (folder, packed))
    np.testing.assert_array_equal(dense.forward(ids), sparse.forward(ids))
    np.testing.assert_array_equal(dense.forward(ids[:, :1]), sparse.forward(ids[:, :1]))


def test_openvino_genai_speaks_from_a_packed_folder(tiny_run, tmp_path):
    folder = tiny_run["export-openvino"].path / "model"
    pack(folder, tmp_path / "packed")
    said = [
        sqft_export.load_openvino_genai(f, "CPU").generate(
            "Question: Tom has 3 apples.\nAnswer:", max_new_tokens=8, do_sample=False
        )
        for f in (folder, tmp_path / "packed")
    ]
    assert said[0] == said[1]


def test_onnxruntime_genai_speaks_from_a_packed_folder(tiny_run, tmp_path):
    import onnxruntime_genai as og

    folder = tiny_run["export-onnx"].path / "model"
    pack(folder, tmp_path / "packed")

    def said(model):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=24, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.arange(5, 15, dtype=np.int32))
        for _ in range(8):
            generator.generate_next_token()
        return generator.get_sequence(0).tolist()

    dense, packed = (sqft_export.load_onnx_genai(f) for f in (folder, tmp_path / "packed"))
    assert said(dense) == said(packed)


@pytest.mark.parametrize(
    "kind", ["asymmetric", "float16", pytest.param("standard", marks=pytest.mark.slow)]
)
def test_other_weights_come_back_too(tmp_path, kind):
    """Zero points by group, sparse floats, and a graph of another maker."""
    import torch
    from transformers import AutoModelForCausalLM

    model = random_model(tmp_path / "model", intermediate_size=160)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "_proj" in name:
                parameter[torch.rand(parameter.shape) < 0.6] = 0
    loaded.half().save_pretrained(model)
    out = tmp_path / "out"
    out.mkdir()
    if kind == "asymmetric":
        import nncf
        import openvino as ov

        target("openvino").export(model, out, Export())
        graph = ov.Core().read_model(out / "openvino_model.xml")
        mode = nncf.CompressWeightsMode.INT4_ASYM
        graph = nncf.compress_weights(graph, mode=mode, group_size=32, ratio=1.0, all_layers=True)
        (tmp_path / "nncf").mkdir()
        ov.save_model(graph, tmp_path / "nncf" / "openvino_model.xml")
        out = tmp_path / "nncf"
    elif kind == "float16":
        target("openvino").export(model, out, Export())
    else:
        target("onnx").export(model, out, Export(onnx_graph="standard"))
    told = pack(out, tmp_path / "packed")
    assert told["sparse_tensors"] >= 14
    unpack(tmp_path / "packed", tmp_path / "again")
    assert digest_of(tmp_path / "again") == digest_of(out)


@pytest.fixture(scope="module")
def small_packed(tmp_path_factory) -> Path:
    """A packed file of a few kilobytes, with every kind of region."""
    root = tmp_path_factory.mktemp("small")
    from sqft_export.packed.container import Writer, ZeroPoints, read_fills

    random = np.random.default_rng(0)
    zeros = random.integers(0, 16, 64).astype(np.uint8)
    values = random.integers(0, 16, (64, 32)).astype(np.uint8)
    values = np.where(random.random(values.shape) < 0.5, zeros[:, None], values).reshape(-1)
    floats = random.normal(size=512).astype(np.float16)
    floats[random.random(512) < 0.7] = 0
    parts = [dense_bytes(zeros, 4), dense_bytes(values, 4), floats.view(np.uint8)]
    dense = np.concatenate([*parts, np.arange(100, dtype=np.uint8)])
    fill = ZeroPoints(at=0, bits=4, rows=1, per_row=64, row_bytes=32)
    writer = Writer(root / "w.sqft", entropy=False)
    writer.raw(0, parts[0])
    writer.sparse("codes", 32, parts[1], 4, 2048, fill, read_fills(fill, Memory(dense).read), 32)
    writer.sparse("floats", 32 + 1024, parts[2], 16, 512, 0, read_fills(0, Memory(dense).read), 0)
    writer.raw(32 + 1024 + 1024, dense[2080:])
    writer.finish("w", len(dense), hashlib.sha256(dense).hexdigest())
    with PackedFile(root / "w.sqft") as packed:
        assert {r.kind for r in packed.header.regions} == {"raw", "sparse"}
        np.testing.assert_array_equal(packed.inflate(), dense)
    dense.tofile(root / "w")
    return root / "w.sqft"


def read_or_refuse(content: bytes, folder: Path) -> np.ndarray | None:
    file = folder / "damaged.sqft"
    file.write_bytes(content)
    try:
        with PackedFile(file) as packed:
            found = packed.inflate(threads=1)
    except UserError as error:
        assert str(file) in str(error)
        return None
    with PackedFile(file) as packed:
        packed.inflate_file(folder / "dense", threads=2)
    np.testing.assert_array_equal(found, np.fromfile(folder / "dense", np.uint8))
    return found


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bits_are_refused(small_packed, tmp_path, data):
    """Anywhere but in the blanks between pieces, where nothing is read."""
    content = bytearray(small_packed.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    found = read_or_refuse(bytes(content), tmp_path)
    if found is not None:
        np.testing.assert_array_equal(found, np.fromfile(small_packed.with_suffix(""), np.uint8))
        assert _is_blank(small_packed, bit // 8)


def _is_blank(file: Path, offset: int) -> bool:
    with PackedFile(file) as packed:
        start = len(packed.content) - len(packed.payload)
        pieces = [
            piece
            for r in packed.header.regions
            for piece in ([r.data] if r.kind == "raw" else [r.mask, r.kept])
        ]
        inside = any(start + p.at <= offset < start + p.at + p.size for p in pieces)
        length = int.from_bytes(packed.content[8:16].tobytes(), "little")
        return not inside and offset >= 32 + length


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000))
def test_a_file_that_is_cut_is_refused(small_packed, tmp_path, size):
    content = small_packed.read_bytes()
    if size < len(content):
        assert read_or_refuse(content[:size], tmp_path) is None


def with_header(content: bytes, change) -> bytes:
    """The file with another header, its digest made to fit: a liar, not an accident."""
    import xxhash

    length = int.from_bytes(content[8:16], "little")
    header = json.loads(content[16 : 16 + length])
    change(header)
    text = json.dumps(header).encode()
    start = -(-(32 + length) // 64) * 64
    head = MAGIC + len(text).to_bytes(8, "little") + text + xxhash.xxh3_128_digest(text)
    return head + bytes(-len(head) % 64) + content[start:]


NUMBERS = st.one_of(
    st.integers(-3, 5000), st.sampled_from([2**31, 2**32, 2**47, 2**63, 2**64, 2**200, 1.5, "8"])
)


def numbers_in(node, path=()):
    """Paths of all numbers of a header."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers_in(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from numbers_in(value, (*path, index))
    elif isinstance(node, int):
        yield path


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_headers_that_lie_are_refused(small_packed, tmp_path, data):
    """Any number of the header changed to any other: refused, or it made no difference."""
    content = small_packed.read_bytes()
    length = int.from_bytes(content[8:16], "little")
    header = json.loads(content[16 : 16 + length])
    path = data.draw(st.sampled_from(list(numbers_in(header))))
    number = data.draw(NUMBERS)

    def change(node):
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = number

    found = read_or_refuse(with_header(content, change), tmp_path)
    if found is not None:  # the fill of groups, say, can be another without anyone noticing
        assert len(found) == small_packed.with_suffix("").stat().st_size


def test_too_little_room_to_inflate_is_told(tiny_run, tmp_path, monkeypatch):
    pack(tiny_run["export-onnx"].path / "model", tmp_path / "packed")
    nothing = shutil.disk_usage(tmp_path)._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    with pytest.raises(UserError, match=r"MiB needed, 5 bytes free; TMPDIR"):
        sqft_export.load_onnx(tmp_path / "packed")


def test_a_later_version_is_told_as_such(small_packed, tmp_path):
    content = with_header(small_packed.read_bytes(), lambda h: h.update(version=2))
    (tmp_path / "w.sqft").write_bytes(content)
    with pytest.raises(UserError, match="version 2, this program reads 1"):
        PackedFile(tmp_path / "w.sqft")


def test_a_damaged_folder_never_reaches_the_runtime(tiny_run, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    pack(tiny_run["export-onnx"].path / "model", packed)
    file = packed / "model.onnx.data.sqft"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(UserError, match="is damaged; copy or pack it again"):
        sqft_export.load_onnx(packed)
    with pytest.raises(UserError, match="is damaged"):
        unpack(packed, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_packed_over(tiny_run, tmp_path):
    folder = tiny_run["export-onnx"].path / "model"
    pack(folder, tmp_path / "packed")
    with pytest.raises(UserError, match="packed: exists already"):
        pack(folder, tmp_path / "packed")
    with pytest.raises(UserError, match=r"model.onnx.data: is missing"):
        pack(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(UserError, match="has no packed weights"):
        unpack(folder, tmp_path / "out")


def test_loading_needs_no_torch(tiny_run, tmp_path):
    pack(tiny_run["export-onnx"].path / "model", tmp_path / "packed")
    code = (
        "import sys, sqft_export\n"
        f"sqft_export.load_onnx({str(tmp_path / 'packed')!r})\n"
        "heavy = {'torch', 'transformers', 'onnx', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packed_files_are_the_same_every_time(tiny_run, tmp_path):
    folder = tiny_run["export-openvino"].path / "model"
    for name in ("one", "two"):
        pack(folder, tmp_path / name, entropy=True)
    files = [tmp_path / name / "openvino_model.bin.sqft" for name in ("one", "two")]
    assert sha256_of(files[0]) == sha256_of(files[1])
    shutil.rmtree(tmp_path / "one")
    assert CHUNK % 64 == 0


def test_a_recipe_that_asks_for_packed_files_has_them_checked_and_measured(tmp_path):
    recipe = small_recipe(
        "export.sparse_files=true",
        "export.entropy=true",
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        "benchmark.baselines=[]",
        "benchmark.items=2",
        model_path=random_model(tmp_path / "model", intermediate_size=320, hidden_size=128),
    )
    artifacts = run_recipe(recipe, tmp_path / "runs")
    checks = {c["name"]: c for c in artifacts["verify"].metrics["checks"]}
    for name in ("openvino", "onnx"):
        assert checks[f"bytes inflated from the packed {name}"]["compared"] > 1e4
        assert checks[f"logits: {name} dense and packed, default mode"]["differing"] == 0
    rows = json.loads((artifacts["report"].path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "OpenVINO",
        "OpenVINO, packed",
        "OpenVINO, sparse execution",
        "ONNX Runtime",
        "ONNX Runtime, packed",
    ]
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"]
    assert rows[1]["perplexity"] == rows[0]["perplexity"]


def test_the_commands_pack_and_unpack(tiny_run, tmp_path):
    folder = tiny_run["export-onnx"].path / "model"
    for command in (
        ["pack", str(folder), str(tmp_path / "packed"), "--entropy"],
        ["unpack", str(tmp_path / "packed"), str(tmp_path / "again")],
    ):
        done = subprocess.run([SQFT, *command], capture_output=True, text=True, check=True)
        assert "bytes dense" in done.stdout
    assert digest_of(tmp_path / "again") == digest_of(folder)
