"""An untrusted ``genai_config.json`` may have settings, but name no libraries or other files."""

import copy
import json

import pytest

from sqft_export.errors import UserError
from sqft_export.targets.genai_config import check_genai_config

PLAIN = {
    "model": {
        "type": "llama",
        "decoder": {
            "filename": "model.onnx",
            "session_options": {
                "log_id": "onnxruntime-genai",
                "intra_op_num_threads": 2,
                "provider_options": [{"cuda": {"enable_cuda_graph": "0"}}],
            },
        },
    },
    "search": {"max_length": 256},
}


def check(tmp_path, text: str) -> None:
    (tmp_path / "genai_config.json").write_text(text)
    check_genai_config(tmp_path)


def options(change: dict) -> str:
    document = copy.deepcopy(PLAIN)
    document["model"]["decoder"]["session_options"] |= change
    return json.dumps(document)


def test_settings_are_taken(tmp_path):
    check(tmp_path, json.dumps(PLAIN))


def test_a_second_object_of_the_same_name_hides_nothing(tmp_path):
    """ONNX Runtime GenAI visits both; Python's json keeps the last."""
    hidden = json.dumps(PLAIN).replace(
        '"session_options": {',
        '"session_options": {"custom_ops_library": "e.so"}, "session_options": {',
    )
    with pytest.raises(UserError, match="the key 'session_options' appears twice"):
        check(tmp_path, hidden)
    twice = json.dumps(PLAIN).replace('"decoder": {', '"decoder": {}, "decoder": {')
    with pytest.raises(UserError, match="the key 'decoder' appears twice"):
        check(tmp_path, twice)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"custom_ops_library": "evil.so"}, "custom_ops_library: 'evil.so' is a library"),
        ({"ep.context_file_path": "/tmp/x"}, "found ep.context_file_path; allowed are"),
        ({"enable_profiling": "prefix"}, "found enable_profiling; allowed are"),
        ({"config_entries": {"a": "b"}}, "found config_entries; allowed are"),
        ({"provider_options": [{"qnn": {}}]}, "found qnn; allowed are"),
        ({"provider_options": [{"cuda": {"library_path": "e.so"}}]}, "found library_path"),
        ({"provider_options": [{"openvino": {"cache_dir": ".."}}]}, "found cache_dir"),
        ({"provider_options": {"cuda": {}}}, "a list of providers is expected"),
        ({"provider_options": [["cuda"]]}, "an object is expected"),
    ],
)
def test_session_options_are_an_allow_list(tmp_path, change, fault):
    with pytest.raises(UserError, match=fault) as refused:
        check(tmp_path, options(change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "..", "a\\b.onnx", 5, None])
def test_files_are_those_of_the_folder(tmp_path, name):
    document = copy.deepcopy(PLAIN)
    document["model"]["encoder"] = {"config_filename": name}
    with pytest.raises(UserError, match="a file of the folder is expected"):
        check(tmp_path, json.dumps(document))
