"""Write a model repository of OpenVINO Model Server.

    <repository>/config.json          the models that the server loads
    <repository>/<name>/graph.pbtxt   graph of one node, the LLM calculator of the server
    <repository>/<name>/...           files of the deployment

The layout is that of `ovms --pull` and of the server's `export_model.py`. The fields of the graph
are in the server's `llm_calculator.proto`.
"""

import json
import re
from pathlib import Path
from typing import Literal

from sqft_export.errors import UserError, one_line
from sqft_export.machine.host import write_file
from sqft_export.packed.folders import copy_deployment, unpack
from sqft_export.packed.usage import form_of
from sqft_export.targets.folder import ADAPTER_FOLDER, check_files, runtime_of
from sqft_export.textfiles import read_json

GRAPH = "graph.pbtxt"
REPOSITORY_CONFIG = "config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODELS = "mediapipe_config_list"  # key of models that are served as graphs
ServerDevice = Literal["CPU", "GPU", "NPU"]
# A graph of one node that calls itself until an answer is complete. Prefixes of prompts are cached,
# and the cache grows with the requests.
_GRAPH_TEXT = """\
input_stream: "HTTP_REQUEST_PAYLOAD:request"
output_stream: "HTTP_RESPONSE_PAYLOAD:response"
node {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  node_options {
    [type.googleapis.com/mediapipe.LLMCalculatorOptions] {
      models_path: "./"
      device: "<device>"
      enable_prefix_caching: true
      cache_size: 0
      max_num_seqs: 256
    }
  }
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  input_stream: "HTTP_REQUEST_PAYLOAD:request"
  input_stream: "LOOPBACK:unfinished"
  output_stream: "HTTP_RESPONSE_PAYLOAD:response"
  output_stream: "LOOPBACK:unfinished"
  input_stream_info { tag_index: "LOOPBACK:0" back_edge: true }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler"
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] { sync_set { tag_index: "LOOPBACK:0" } }
    }
  }
}
"""


def graph_text(device: ServerDevice) -> str:
    """Return ``graph.pbtxt`` of a text generation model."""
    return _GRAPH_TEXT.replace("<device>", device)


def add_to_repository(
    deployment: Path, repository: Path, name: str, device: ServerDevice = "CPU"
) -> Path:
    """Copy an OpenVINO deployment into a model repository and return the model's folder.

    A packed deployment is unpacked. The repository is created if it is missing; its other models
    stay.

    :param name: name of the model for clients.
    :raises UserError: if the server can't load the deployment, or the repository has the name.
    """
    _check_servable(deployment)
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name: found {one_line(repr(name))}; allowed are letters, digits, dot, underscore "
            "and hyphen"
        )
    config = _read_config(repository / REPOSITORY_CONFIG)
    model = repository / name
    repository.mkdir(parents=True, exist_ok=True)
    if form_of(deployment) == "packed":
        unpack(deployment, model)
    else:
        with copy_deployment(deployment, model, []):
            pass
    write_file(model / GRAPH, graph_text(device))
    models = [one for one in config[_MODELS] if one.get("name") != name]
    config[_MODELS] = [*models, {"name": name, "base_path": name}]
    write_file(repository / REPOSITORY_CONFIG, json.dumps(config, indent=2) + "\n")
    return model


def _check_servable(deployment: Path) -> None:
    """Refuse a deployment that OpenVINO Model Server does not load."""
    check_files(deployment)
    if (runtime := runtime_of(deployment)) != "openvino":
        raise UserError(f"{deployment}: is for {runtime}; OpenVINO Model Server loads openvino")
    if form_of(deployment) == "specialized":
        raise UserError(
            f"{deployment}: runs on the kernels of this package, which OpenVINO Model Server does "
            "not have; use the deployment's model folder"
        )
    if (deployment / ADAPTER_FOLDER).is_dir():
        raise UserError(
            f"{deployment}: has an unmerged adapter, which OpenVINO Model Server does not load; "
            "use a merging adapt.pipeline: sparsepeft or qa-sparsepeft"
        )


def _read_config(file: Path) -> dict[str, list[dict[str, object]]]:
    """Return the configuration of a repository, new if the file is missing."""
    found = read_json(file) if file.exists() else {"model_config_list": []}
    models = found.setdefault(_MODELS, [])
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise UserError(f"{file}: {_MODELS}: expected a list of objects")
    return found
