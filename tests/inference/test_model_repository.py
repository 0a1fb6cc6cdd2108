"""A model repository has what OpenVINO Model Server reads: config.json, graph.pbtxt, the files."""

import json
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from conftest import SQFT
from sqft_export.errors import UserError
from sqft_export.inference.model_repository import add_to_repository, graph_text
from sqft_export.inference.servers import served_path

FIELD = descriptor_pb2.FieldDescriptorProto
TYPES = {"text": FIELD.TYPE_STRING, "number": FIELD.TYPE_UINT64, "flag": FIELD.TYPE_BOOL}
# Fields of MediaPipe's graphs and of the server's llm_calculator.proto; * marks lists.
MESSAGES = {
    "CalculatorGraphConfig": {
        "node": "Node*",
        "input_stream": "text*",
        "output_stream": "text*",
    },
    "Node": {
        "name": "text",
        "calculator": "text",
        "input_stream": "text*",
        "output_stream": "text*",
        "input_side_packet": "text*",
        "input_stream_info": "InputStreamInfo*",
        "node_options": ".google.protobuf.Any*",
        "input_stream_handler": "InputStreamHandlerConfig",
    },
    "InputStreamInfo": {"tag_index": "text", "back_edge": "flag"},
    "InputStreamHandlerConfig": {"input_stream_handler": "text", "options": "MediaPipeOptions"},
    "MediaPipeOptions": {},
    "SyncSetInputStreamHandlerOptions": {"sync_set": "SyncSet*"},
    "SyncSet": {"tag_index": "text*"},
    "LLMCalculatorOptions": {
        "models_path": "text",
        "max_num_batched_tokens": "number",
        "cache_size": "number",
        "max_num_seqs": "number",
        "dynamic_split_fuse": "flag",
        "device": "text",
        "plugin_config": "text",
        "enable_prefix_caching": "flag",
    },
}


def add_field(message: descriptor_pb2.DescriptorProto, name: str, kind: str) -> None:
    label = FIELD.LABEL_REPEATED if kind.endswith("*") else FIELD.LABEL_OPTIONAL
    field = message.field.add(name=name, number=len(message.field) + 1, label=label)
    kind = kind.removesuffix("*")
    if kind in TYPES:
        field.type = TYPES[kind]
    else:
        field.type = FIELD.TYPE_MESSAGE
        field.type_name = kind if kind.startswith(".") else f".mediapipe.{kind}"


def parse_graph(text: str):
    """Return graph and options of its calculator, parsed as the server parses them."""
    from google.protobuf import any_pb2

    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe")
    file.dependency.append("google/protobuf/any.proto")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, kind in fields.items():
            add_field(message, field, kind)
        if name == "MediaPipeOptions":
            message.extension_range.add(start=20000, end=30000)
        if name == "SyncSetInputStreamHandlerOptions":
            message.extension.add(
                name="ext",
                number=20001,
                label=FIELD.LABEL_OPTIONAL,
                type=FIELD.TYPE_MESSAGE,
                type_name=".mediapipe.SyncSetInputStreamHandlerOptions",
                extendee=".mediapipe.MediaPipeOptions",
            )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    kinds = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mediapipe.{name}"))
        for name in MESSAGES
    }
    graph = text_format.Parse(
        text, kinds["CalculatorGraphConfig"](), descriptor_pool=pool, allow_unknown_extension=False
    )
    options = kinds["LLMCalculatorOptions"]()
    options.ParseFromString(graph.node[0].node_options[0].value)
    return graph, options


def test_the_graph_is_one_llm_calculator():
    graph, options = parse_graph(graph_text("GPU"))
    (node,) = graph.node
    assert node.calculator == "HttpLLMCalculator"
    assert list(node.input_side_packet) == ["LLM_NODE_RESOURCES:llm"]
    (loop,) = set(node.input_stream) & set(node.output_stream)
    assert loop.startswith("LOOPBACK:")
    assert set(node.input_stream) == {loop, *graph.input_stream}
    assert set(node.output_stream) == {loop, *graph.output_stream}
    assert [one.partition(":")[0] for one in (*graph.input_stream, *graph.output_stream)] == [
        "HTTP_REQUEST_PAYLOAD",
        "HTTP_RESPONSE_PAYLOAD",
    ]
    assert [(one.tag_index, one.back_edge) for one in node.input_stream_info] == [
        ("LOOPBACK:0", True)
    ]
    assert (options.models_path, options.device) == ("./", "GPU")
    assert options.enable_prefix_caching and options.max_num_seqs == 256
    with pytest.raises(text_format.ParseError):
        parse_graph(graph_text("CPU").replace("max_num_seqs", "max_sequences"))


def test_a_repository_holds_models_that_openvino_genai_loads(tiny_run, tmp_path):
    import openvino_genai

    run = tiny_run["export-openvino"].path.parent
    repository = tmp_path / "models"
    for name, device in (("tiny", "CPU"), ("other", "GPU")):
        command = [SQFT, "model-repository", run, repository, "--name", name, "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"--config_path {repository / 'config.json'}" in done.stdout
    config = json.loads((repository / "config.json").read_text())
    listed = {one["name"]: one["base_path"] for one in config["mediapipe_config_list"]}
    assert listed == {"tiny": "tiny", "other": "other"} and config["model_config_list"] == []
    model = repository / listed["tiny"]
    _, options = parse_graph((model / "graph.pbtxt").read_text())
    pipeline = openvino_genai.LLMPipeline(str(model / options.models_path), options.device)
    source = openvino_genai.LLMPipeline(str(tiny_run["export-openvino"].path / "model"), "CPU")
    question = "Question: What is 2 plus 3?\nAnswer:"
    assert pipeline.generate(question, max_new_tokens=4) == source.generate(
        question, max_new_tokens=4
    )


def test_packed_models_are_unpacked_and_others_refused(tiny_run, tmp_path):
    folder = tiny_run["export-openvino"].path
    made = add_to_repository(folder / "packed", tmp_path, "packed")
    weights = "openvino_model.bin"
    assert (made / weights).read_bytes() == (folder / "model" / weights).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        add_to_repository(folder / "model", tmp_path, "packed")
    with pytest.raises(UserError, match=r"--name: found '\.\./x'"):
        add_to_repository(folder / "model", tmp_path, "../x")
    with pytest.raises(UserError, match="is for onnx"):
        add_to_repository(tiny_run["export-onnx"].path / "model", tmp_path, "x")
    specialized = folder / "sparse"
    with pytest.raises(UserError, match="kernels of this package"):
        add_to_repository(specialized, tmp_path, "x")
    with pytest.raises(UserError, match="kernels of this package"), served_path(specialized):
        pass
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["config.json", "packed"]
