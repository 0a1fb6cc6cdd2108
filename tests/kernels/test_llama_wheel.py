"""Our kernels in the llama.cpp of an installed wheel: dense models, and models with experts."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from conftest import ROOT, TINY, random_model
from sqft_export.kernels.llama_plugin import why_not_in_llama_cpp
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.recipe.schema import Export
from sqft_export.targets.gguf import export

sys.path.insert(0, str(ROOT / "benchmarks"))
from llama_plugin import quantize_rows, write_quantized

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    why_not_in_llama_cpp() is not None, reason=str(why_not_in_llama_cpp())
)


def write_with_experts(floats: Path, out: Path, bits: int) -> None:
    """Write a copy of a float file whose matrices, and those of all experts, are quantized."""
    reader = read_gguf(floats)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inside = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inside)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2 or "_inp" in tensor.name:
            writer.add_tensor(tensor.name, values)
            continue
        blocks = quantize_rows(values.reshape(-1, values.shape[-1]), bits, 0.5)
        shaped = blocks.reshape(*values.shape[:-1], -1)
        writer.add_tensor(tensor.name, shaped, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """GGUF folders: the embedded model in INT8 with half of its weights zero, and experts."""
    scratch = tmp_path_factory.mktemp("wheel")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    sources = {"dense": TINY, "experts": random_model(scratch / "m", 1, "mixtral", **experts)}
    found = {}
    for name, source in sources.items():
        (scratch / f"{name}-floats").mkdir()
        found[name] = scratch / name
        found[name].mkdir()
        export(source, scratch / f"{name}-floats", Export())
        floats = scratch / f"{name}-floats" / "model.gguf"
        if name == "dense":
            write_quantized(read_gguf(floats), found[name] / "model.gguf", 8, 0.5)
        else:
            write_with_experts(floats, found[name] / "model.gguf", 4)
    return found


def run(folder: Path, execution: str, exact: bool, out: Path, **variables: str):
    """Return logits of all tokens, and the lines of the plug-in."""
    command = [sys.executable, HERE / "wheel_run.py", folder, execution, str(int(exact)), out]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out), [line for line in done.stderr.splitlines() if line.startswith("sqft:")]


@pytest.mark.parametrize(("name", "tensors"), [("dense", "q8_0"), ("experts", "15 q4_0")])
def test_logits_are_those_of_the_weights_of_the_file(models, tmp_path, name, tensors):
    """Without rounding they are those of a float32 copy of the file; else llama.cpp's own."""
    out = tmp_path / "logits.npy"
    exact, none = run(models[name], "stock", True, out)
    ours, (line,) = run(models[name], "auto", True, out)
    rounded, _ = run(models[name], "auto", False, out)
    stock, _ = run(models[name], "stock", False, out)
    assert none == [] and f"{tensors}" in line
    spread = exact.std()
    assert np.abs(ours - exact).max() < 1e-3 * spread
    by_us, by_stock = (np.abs(one - exact).max() / spread for one in (rounded, stock))
    assert 1e-3 < by_us < 2 * by_stock


def test_experts_in_sparse_and_dense_form_give_the_same_bits(models, tmp_path):
    out = tmp_path / "logits.npy"
    forms = [run(models["experts"], form, False, out) for form in ("sparse", "dense")]
    assert np.array_equal(forms[0][0], forms[1][0])
    assert "; 0 sparse" in forms[1][1][0] and "; 0 sparse" not in forms[0][1][0]
