"""Packing uses several threads; the bytes are those of one."""

import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft_export.machine import threads
from sqft_export.packed import container, inflate
from sqft_export.packed.container import FRAME_BYTES, ZSTD_LEVEL, PackedFile, Writer
from sqft_export.packed.inflate import CHUNK, deflate

KINDS = {4: np.uint8, 8: np.uint8, 16: np.uint16, 32: np.uint32}


def literal_deflate(bits, elements, dense, fill, group):
    """One thread, a chunk after the other, the fill of each element gathered by its number."""
    kind, masks, kept = KINDS[bits], [], []
    for first in range(0, elements, CHUNK):
        count = min(CHUNK, elements - first)
        part = dense[first * bits // 8 : -(-(first + count) * bits // 8)]
        if bits == 4:
            codes = np.stack([part & 15, part >> 4], axis=1).reshape(-1)[:count]
        else:
            codes = part.view(kind)
        fills = fill[np.arange(first, first + count) // group] if group else fill[0]
        chosen = codes != fills
        masks.append(np.packbits(chosen, bitorder="little"))
        codes = codes[chosen]
        if bits == 4:
            codes = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)])
            codes = codes[0::2] | (codes[1::2] << 4)
        kept.append(codes.view(np.uint8))
    return np.concatenate(masks), np.concatenate(kept)


def tensor(bits: int, elements: int, group: int, seed: int):
    """Dense bytes of which about half are their fill, and the fills."""
    rng = np.random.default_rng(seed)
    fill = rng.integers(0, 2**bits, -(-elements // group) if group else 1).astype(np.uint32)
    values = rng.integers(0, 2**bits, elements).astype(KINDS[bits])
    fills = np.repeat(fill, group)[:elements] if group else np.full(elements, fill[0])
    values = np.where(rng.random(elements) < 0.5, fills, values).astype(KINDS[bits])
    if bits == 4:
        values = np.concatenate([values, np.zeros(elements % 2, np.uint8)])
        values = values[0::2] | (values[1::2] << 4)
    return values.view(np.uint8), fill


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([4, 8, 16, 32]),
    st.integers(1, 700),
    st.sampled_from([0, 1, 3, 32, 100]),
    st.integers(0, 9),
)
def test_bytes_are_those_of_one_thread(bits, elements, group, seed):
    dense, fill = tensor(bits, elements, group, seed)
    found = deflate(bits, elements, dense, fill, group)
    for ours, expected in zip(
        found, literal_deflate(bits, elements, dense, fill, group), strict=True
    ):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("group", [0, 96])  # 96: groups lie over the ends of chunks
@pytest.mark.parametrize("count", [1, 4])
def test_several_chunks_are_joined_in_order(monkeypatch, group, count):
    monkeypatch.setattr(threads, "allowed_processors", lambda: count)
    elements = 3 * CHUNK + 12345
    dense, fill = tensor(4, elements, group, 0)
    found = deflate(4, elements, dense, fill, group)
    for ours, expected in zip(found, literal_deflate(4, elements, dense, fill, group), strict=True):
        assert np.array_equal(ours, expected)


def several_at_once(monkeypatch, module, name: str) -> None:
    """Let calls of a function go on only where two of them are running."""
    monkeypatch.setattr(threads, "allowed_processors", lambda: 2)
    both, work = threading.Barrier(2, timeout=20), getattr(module, name)

    def waiting(*args):
        both.wait()
        return work(*args)

    monkeypatch.setattr(module, name, waiting)


def test_chunks_are_deflated_at_the_same_time(monkeypatch):
    several_at_once(monkeypatch, inflate, "_deflate_chunk")
    dense, fill = tensor(4, 4 * CHUNK, 0, 0)
    deflate(4, 4 * CHUNK, dense, fill, 0)


def test_frames_are_compressed_at_the_same_time_and_to_the_same_bytes(monkeypatch, tmp_path):
    several_at_once(monkeypatch, container, "_compress")
    data = np.random.default_rng(0).integers(0, 9, 4 * FRAME_BYTES).astype(np.uint8)
    writer = Writer(tmp_path / "w.sqft", entropy=True)
    piece = writer.piece(data)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    frames = [
        compressor.compress(data[i : i + FRAME_BYTES].data)
        for i in range(0, len(data), FRAME_BYTES)
    ]
    assert piece.frames == tuple(map(len, frames))
    writer.stream.close()
    assert Path(writer.scratch).read_bytes() == b"".join(frames)


def test_a_tensor_without_elements_is_packed(tmp_path):
    writer = Writer(tmp_path / "w.sqft", entropy=False)
    writer.sparse("empty", 0, np.empty(0, np.uint8), 8, 0, 0, np.zeros(1, np.uint32), 0)
    writer.raw(0, np.arange(9, dtype=np.uint8))
    writer.finish("w", 9, "0" * 64)
    with PackedFile(tmp_path / "w.sqft") as opened:
        assert np.array_equal(opened.inflate(), np.arange(9))
