import numpy as np
import pytest
import torch

from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.numerics.gptq_layout import from_gptq, to_gptq
from sqft_export.numerics.nibbles import pack_nibbles, unpack_nibbles


def random_layer(bits: int, outputs: int, inputs: int, group: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(bits + outputs)
    top = 2**bits
    codes = torch.randint(0, top, (outputs, inputs), dtype=torch.uint8, generator=generator)
    shape = (outputs, inputs // group)
    zero = torch.randint(0, top, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).half()
    return QuantizedWeight(codes, Grid(scale, zero, bits, group))


def literal_dequantize(tensors: dict[str, torch.Tensor], bits: int, column: int, row: int) -> float:
    """One weight read from the AutoGPTQ v1 layout as its loaders do: stored zero plus one."""
    per_word = 32 // bits
    word = int(tensors["qweight"][column // per_word, row]) & 0xFFFFFFFF
    code = (word >> (bits * (column % per_word))) & (2**bits - 1)
    group = int(tensors["g_idx"][column])
    zeros = int(tensors["qzeros"][group, row // per_word]) & 0xFFFFFFFF
    zero = ((zeros >> (bits * (row % per_word))) + 1) & (2**bits - 1)
    return float(tensors["scales"][group, row]) * (code - zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(16, 64, 32), (12, 172, 172)])
def test_gptq_layout_is_what_independent_loaders_read(bits, outputs, inputs, group):
    weight = random_layer(bits, outputs, inputs, group)
    codes, grid = weight
    tensors = to_gptq(weight)
    assert {k: v.dtype for k, v in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    expected = dequantize(codes, grid)
    for column in range(0, inputs, 7):
        for row in range(outputs):
            found = literal_dequantize(tensors, bits, column, row)
            assert np.float32(found) == expected[row, column]
    # As a file hands them out: strides of an axis of length 1 are not those of a view.
    stored = {key: tensor.clone() for key, tensor in tensors.items()}
    back, back_grid = from_gptq(stored, bits, group)
    assert torch.equal(back, codes)
    assert torch.equal(back_grid.scale, grid.scale)
    assert torch.equal(back_grid.zero_point, grid.zero_point)


def test_act_order_is_refused():
    tensors = to_gptq(random_layer(4, 8, 64, 32))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match="desc_act"):
        from_gptq(tensors, 4, 32)


@pytest.mark.parametrize("count", [1, 2, 31, 32])
def test_nibbles_are_low_first_and_come_back(count):
    codes = np.arange(3 * count, dtype=np.uint8).reshape(3, count) % 16
    packed = pack_nibbles(codes)
    assert packed.shape == (3, (count + 1) // 2)
    assert packed[0, 0] & 15 == codes[0, 0]
    assert np.array_equal(unpack_nibbles(packed, count), codes)
