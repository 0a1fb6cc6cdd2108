"""Files of other programs in the table of `benchmark`."""

import shutil

import pytest

from conftest import TINY, random_model
from sqft_export.errors import UserError
from sqft_export.measure.against import as_deployments
from sqft_export.measure.deployments import benchmark_folders, questions_of
from sqft_export.measure.results import DeviceSettings
from sqft_export.recipe.schema import Export
from sqft_export.report.text import deployments_text
from sqft_export.targets import target
from sqft_export.targets.gguf.quantizer import quantize_gguf

SHORT = DeviceSettings(prompt_tokens=(8,), new_tokens=2, batches=(1,), rounds=1, threads=1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    root = tmp_path_factory.mktemp("ours")
    (root / "gguf").mkdir()
    model = random_model(root / "model", hidden_size=64, intermediate_size=256)
    target("gguf").export(model, root / "gguf", Export())
    return root / "gguf"


@pytest.fixture(scope="module")
def file(ours, tmp_path_factory):
    """A file as another program publishes it: one file with a name of its own."""
    root = tmp_path_factory.mktemp("theirs")
    quantize_gguf(ours, root / "made", "Q4_K_M", {}, 1)
    return shutil.move(root / "made" / "model.gguf", root / "llama-Q4_K_M.gguf")


def test_a_gguf_file_of_another_program_is_measured_in_the_same_table(ours, file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((TINY / "test.jsonl").read_text()[:4000])
    questions = questions_of(ours, None, None, text, 2)
    with as_deployments([file], ours) as others:
        document = benchmark_folders([ours, *others], SHORT, questions, None, others)
    assert not any(folder.exists() for folder in others)
    name = list(document.folders)[1]
    assert name.endswith("llama-Q4_K_M.gguf")
    assert [row.folder for row in document.agreement] == [name]
    assert (
        document.folders[name].file_bytes < 0.5 * next(iter(document.folders.values())).file_bytes
    )
    printed = deployments_text(document)
    assert f"{name}: 12 of 14 matrices are not K-quants" in printed


def test_a_folder_is_measured_where_it_is(ours):
    with as_deployments([ours.parent / "model"], ours) as others:
        assert list(others) == [ours.parent / "model"]


def test_what_is_no_deployment_or_has_another_vocabulary_is_refused(ours, file, tmp_path):
    other = random_model(tmp_path / "other", vocab_size=500)
    (tmp_path / "first").mkdir()
    shutil.copy(other / "config.json", tmp_path / "first")
    for path, first, words in (
        (file, tmp_path / "first", "416 rows in its embedding, .* has 500 tokens"),
        (tmp_path / "missing.gguf", ours, "--against: .*missing.gguf: .*allowed are folders and"),
        (tmp_path / "first", ours, "not a deployment"),
        (ours / "config.json", ours, "does not start with GGUF"),
    ):
        with pytest.raises(UserError, match=words), as_deployments([path], first):
            pass
