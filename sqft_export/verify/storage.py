"""Compare every file of a deployment, read back from disk, with the merged model."""

import tempfile
from pathlib import Path

import numpy as np

from sqft_export.artifacts.store import sha256_of
from sqft_export.model.recurrent import DECAY_PARAMETER
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.packed.container import PackedFile
from sqft_export.packed.folders import PACKED, packed_file
from sqft_export.targets import target
from sqft_export.targets.tokenizers import ids_or_none, read_ids
from sqft_export.verify.certificate import Certificate, Check, count_in_parallel
from sqft_export.verify.heads import round_if, rounded_parameter
from sqft_export.verify.subject import Subject

TOKEN_IDS = "token ids: base and"


def check_storage(certificate: Certificate, subject: Subject, name: str) -> None:
    """Check codes, floats, tokenizers and packed copies of every deployment of a target."""
    for label, folder in subject.deployments(name):
        _check_codes(certificate, subject, name, label, folder)
        _check_floats(certificate, subject, name, label, folder)
    _check_tokenizers(certificate, subject, name, subject.exports[name] / "model")
    if (subject.exports[name] / PACKED).is_dir():
        _check_packed(certificate, subject, name)


def _check_codes(
    certificate: Certificate, subject: Subject, name: str, label: str, folder: Path
) -> None:
    """Compare codes, scales and zero points, and check that pruned positions are zero."""
    if not subject.quantized:
        return
    title = f"codes, scales, zero points: merged and {label}"
    same = certificate.start("storage", title, "numbers")
    zeros = None
    if subject.pruned:
        zeros = certificate.start("storage", f"pruned positions zero in {label}", "positions")
    missing = set(subject.quantized)

    def count(
        found: tuple[str, QuantizedWeight[np.ndarray]], same: Check, zeros: Check | None
    ) -> None:
        layer, written = found
        missing.discard(layer)
        stored = subject.merged.stored_name(layer)
        same.compare(read_quantized(subject.merged, stored).numpy(), written, layer)
        if zeros is not None:
            dropped = subject.dropped(layer, written.codes.shape)
            zeros.count_zeros(dropped, written.steps != 0, layer)

    count_in_parallel(count, target(name).read_back(folder), same, zeros)
    for layer in missing:  # every code of a missing layer counts
        shape = read_quantized(subject.merged, layer).codes.shape
        same.count(np.ones(shape, bool), f"{layer} is missing")


def _check_floats(
    certificate: Certificate, subject: Subject, name: str, label: str, folder: Path
) -> None:
    """Compare float matrices and vectors (norms, biases, filters) by name.

    A Q8_0 head is a float matrix. The filters of a convolution count as one vector. A graph may
    have no name for a vector, for example after several vectors are concatenated. Such a vector is
    looked up by its bytes.
    """
    merged, quantized = subject.merged, set(subject.quantized)
    rounded = rounded_parameter(subject, name)
    check = certificate.start("storage", f"float weights: merged and {label}", "numbers")
    zeros = None
    if subject.pruned - quantized and not subject.dense_update:
        zeros = certificate.start("storage", f"pruned floats zero in {label}", "positions")
    shapes = merged.shapes
    missing = {key for key in shapes if key.removesuffix(".weight") not in quantized}
    vectors: list[tuple[str | None, bytes]] = []

    def count(found: tuple[str, np.ndarray], check: Check, zeros: Check | None) -> None:
        module, array = found
        key = f"{merged.stored_name(module)}.weight"
        if not module or key not in shapes or len(shapes[key]) != 2:
            held = np.ascontiguousarray(array, np.float32).tobytes()
            vectors.append((_vector_key(module, shapes), held))
            return
        expected = round_if(key == rounded, merged.tensor(key).float()).numpy()
        same = expected.shape == array.shape
        check.count(expected != array if same else np.ones(expected.shape, bool), key)
        missing.discard(key)
        if zeros is not None:
            zeros.count_zeros(subject.dropped(module, array.shape), array != 0, module)

    count_in_parallel(count, target(name).read_floats(folder), check, zeros)
    _check_vectors(check, subject, sorted(missing), vectors)


def _check_vectors(
    check: Check, subject: Subject, missing: list[str], vectors: list[tuple[str | None, bytes]]
) -> None:
    """Count the parameters that no matrix of a deployment has: they are among its vectors."""
    merged, everything = subject.merged, b"".join(held for _, held in vectors)
    for key in missing:
        expected = merged.tensor(key).float().numpy()
        named = [held for name, held in vectors if name == key]
        forms = _forms(subject, expected) if expected.ndim != 2 else []
        is_stored = any(f.tobytes() in (named or everything) for f in forms)
        is_stored = is_stored or (key.endswith(DECAY_PARAMETER) and _has_rates(expected, vectors))
        check.count(np.full(expected.shape, not (is_stored or _is_neutral(expected))), key)


def _vector_key(name: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Return the vector or filters of the model whose name ends a graph's name, or None."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if len(shapes.get(end, ())) in (1, 3)), None)


def _forms(subject: Subject, vector: np.ndarray) -> list[np.ndarray]:
    """Return the values that a graph may store for a vector.

    These are the vector itself, and the vector after constant operations of its class: norm offset
    and query scale.
    """
    family, config = subject.merged.family, subject.merged.config
    forms = [vector]
    if family.norm_offset:
        forms.append(vector + np.float32(family.norm_offset))
    if family.query_scaled:
        size = config["hidden_size"] // config["num_attention_heads"]
        forms.append(vector * np.float32(size**-0.5))
    return forms


def _has_rates(logarithms: np.ndarray, vectors: list[tuple[str | None, bytes]]) -> bool:
    """Return whether a graph stores the decay rates of a delta rule, up to rounding.

    Checkpoints store their logarithms. An exporter computes ``exp`` of them with its own function,
    and may store the negative.
    """
    rates = np.exp(logarithms)
    same = (held for _, held in vectors if len(held) == rates.nbytes)
    found = (np.abs(np.frombuffer(held, np.float32)) for held in same)
    return any(np.allclose(one, rates, rtol=1e-6, atol=0) for one in found)


def _is_neutral(values: np.ndarray) -> bool:
    """Return whether a vector is all ones or all zeros. Graphs omit such factors and summands."""
    return values.ndim == 1 and bool((values == values[0]).all()) and values[0] in (0, 1)


def _check_tokenizers(certificate: Certificate, subject: Subject, name: str, folder: Path) -> None:
    """Compare the ids of the deployed tokenizers with those that the model was trained with."""
    for reader, ids_of in read_ids(name, folder):
        check = certificate.start("storage", f"{TOKEN_IDS} {reader}", "texts")
        for text, ids in subject.asked.texts:
            check.count(np.array([ids_or_none(ids_of, text) != ids]), repr(text[:40]))
        asked = subject.asked
        if not asked.tokenizers_required or reader in asked.readers_reported:
            check.allowed = check.compared


def _check_packed(certificate: Certificate, subject: Subject, name: str) -> None:
    """Check that the packed copy inflates to the bytes of the dense weight file."""
    artifact = subject.exports[name]
    file = packed_file(artifact / PACKED)
    assert file is not None
    title = f"bytes inflated from the packed {name}"
    check = certificate.start("storage", title, "bytes")
    with tempfile.TemporaryDirectory(dir=subject.scratch) as scratch, PackedFile(file) as opened:
        stored, inflated = artifact / "model" / opened.header.file, Path(scratch) / "inflated"
        opened.inflate_file(inflated)
        check.compared = stored.stat().st_size
        if sha256_of(inflated) != sha256_of(stored):
            check.blame(file.name, check.compared)
