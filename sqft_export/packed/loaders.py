"""Load a deployment, packed or not.

In OpenVINO its products run on the kernels of this package where they are faster
(packed/execution.py). With ``execution="stock"``, and in ONNX Runtime, weights are inflated and
handed to the runtime, which sees the graph of the dense folder and the bytes of its weights: the
same kernels, the same results.
"""

import ctypes
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sqft_export.errors import DamagedError, UserError, one_line
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import kernels_used, openvino_extension
from sqft_export.kernels.ir import Graph, is_specialized
from sqft_export.kernels.library import HUGE_PAGE, in_huge_pages
from sqft_export.kernels.rewrite import mark_resident
from sqft_export.packed.container import PackedFile
from sqft_export.packed.execution import checked_execution, execution_here, rewritten
from sqft_export.packed.folders import map_weights, packed_file
from sqft_export.packed.seal import check_seal
from sqft_export.run.artifact import sha256_of
from sqft_export.run.host import installed, require_space
from sqft_export.targets.folder import GRAPHS, graph_and_weights
from sqft_export.targets.genai_config import check_genai_config
from sqft_export.untrusted import MAX_IR_BYTES, MAX_ONNX_BYTES, files_inside, read_bounded


@contextmanager
def _read_by(runtime: str, folder: Path) -> Iterator[None]:
    """Names the folder where a runtime refuses it; its own message may name an inflated copy."""
    try:
        yield
    except (UserError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # runtimes raise classes of their own
        raise UserError(f"{folder}: {runtime} can't load it: {one_line(error)}") from error


def _openvino_weights(file: Path) -> Any:
    """Dense weights in an ``openvino.Tensor`` of its own memory, which a model then shares."""
    import openvino as ov

    with PackedFile(file) as packed:
        tensor = ov.Tensor(ov.Type.u8, ov.Shape([packed.header.size]))
        packed.inflate_checked(tensor.data)
    return tensor


class _RuntimeMemory:
    """Memory that an ``openvino.Tensor`` owns, so that it lives as long as a model on it."""

    def allocate(self, size: int) -> np.ndarray:
        import openvino as ov

        self.tensor = ov.Tensor(ov.Type.u8, ov.Shape([size + HUGE_PAGE]))
        self.start = -self.tensor.data.ctypes.data % HUGE_PAGE
        array = self.tensor.data[self.start : self.start + size]
        in_huge_pages(array)
        return array

    def first(self, size: int) -> Any:
        """A tensor of the first bytes."""
        import openvino as ov

        return ov.Tensor(self.tensor, [self.start], [self.start + size])


def _openvino_parts(folder: Path, execution: str) -> tuple[bytes, Any, list[str]]:
    """Graph, weights (None: the file beside it) and extensions that it needs.

    :raises UserError: if the weights are damaged, or the folder is specialized and the kernels are
        missing.
    """
    check_seal(folder, whole=False)
    file, weights = graph_and_weights(folder)
    text, memory = read_bounded(file, MAX_IR_BYTES), _RuntimeMemory()
    if is_specialized(text):
        checked_execution(execution)
        extension = openvino_extension()
        content, graph = map_weights(weights), Graph(text, str(file))
        graph.check_places(len(content))
        array = memory.allocate(len(content))
        array[:] = content
        mark_resident(graph, array, kernels_used())
        return text, memory.first(len(array)), [extension]
    execution = execution_here(execution)
    if execution != STOCK and (made := rewritten(folder, execution, memory.allocate)):
        return made.text, memory.first(len(made.weights)), [openvino_extension()]
    packed = packed_file(folder)
    return text, _openvino_weights(packed) if packed else None, []


def load_openvino(folder: str | Path, core: Any = None, execution: str = "auto") -> Any:
    """An ``openvino.Model``, ready to be compiled for the CPU; for other devices ``stock``.

    :param core: an ``openvino.Core``; None for a new one.
    :param execution: auto, sparse, dense or stock, see ``packed/execution.py``.
    :raises UserError: if the weights are damaged, or the runtime can't load the graph.
    """
    import openvino as ov

    folder, core = Path(folder), core or ov.Core()
    with _read_by("OpenVINO", folder):
        text, weights, extensions = _openvino_parts(folder, execution)
        for extension in extensions:
            core.add_extension(extension)
        if weights is None:
            return core.read_model(folder / GRAPHS["openvino"])
        return core.read_model(text, weights)


def load_openvino_genai(
    folder: str | Path, device: str = "CPU", execution: str = "auto", **properties: Any
) -> Any:
    """An ``openvino_genai.LLMPipeline``.

    :param execution: auto, sparse, dense or stock, see ``packed/execution.py``; other devices than
        the CPU have their own kernels.
    :param properties: of the device, as ``LLMPipeline`` takes them.
    :raises UserError: if the weights are damaged, or the runtime can't load the graph.
    """
    import openvino_genai

    folder = Path(folder)
    with _read_by("OpenVINO GenAI", folder):
        text, weights, extensions = _openvino_parts(folder, execution if device == "CPU" else STOCK)
        if extensions:
            properties["extensions"] = [*properties.get("extensions", []), *extensions]
        if weights is None:
            return openvino_genai.LLMPipeline(str(folder), device, **properties)
        generation = folder / "generation_config.json"
        config = openvino_genai.GenerationConfig()
        if generation.is_file():
            config = openvino_genai.GenerationConfig(str(generation))
        tokenizer = openvino_genai.Tokenizer(str(folder))
        return openvino_genai.LLMPipeline(
            text.decode(), weights, tokenizer, device, config, **properties
        )


@contextmanager
def _dense(folder: Path) -> Iterator[Path]:
    """A folder with plain weights: the one given, or a copy for the time it takes to load it.

    ONNX Runtime maps a weight file and lets go of each tensor as it repacks it for its kernels;
    what it is handed in memory it keeps beside the repacked copy. So weights are inflated into a
    file in the directory for temporary files, which is unlinked before most of it is ever written.
    """
    packed = packed_file(folder)
    if packed is None:
        yield folder
        return
    with TemporaryDirectory(prefix="sqft-") as scratch:
        _inflate_copy(folder, packed, Path(scratch))
        yield Path(scratch)


def _inflate_copy(folder: Path, packed: Path, copy: Path) -> None:
    with PackedFile(packed) as opened:
        require_space(copy, opened.header.size, "; TMPDIR names another directory")
        for file in files_inside(folder):
            if file.parent == folder and file != packed:
                shutil.copy(file, copy)
        dense = copy / graph_and_weights(folder)[1].name
        opened.inflate_file(dense)
        if sha256_of(dense) != opened.header.sha256:
            raise DamagedError(f"{packed}: what it holds is not the file that was packed")


def load_onnx(
    folder: str | Path,
    options: Any = None,
    providers: Any = None,
    edit: Callable[[bytes], bytes] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    :param options: ``SessionOptions``; None for the defaults.
    :param edit: of the graph, whose weights are outside of it; the file stays as it is.
    :raises UserError: if the weights are damaged, the runtime can't load the graph, or there is no
        room to inflate them.
    """
    import onnxruntime as ort

    check_seal(Path(folder), whole=False)
    graph, _ = graph_and_weights(Path(folder))
    options, providers = options or ort.SessionOptions(), providers or ["CPUExecutionProvider"]
    with _read_by("ONNX Runtime", Path(folder)), _dense(Path(folder)) as dense:
        if edit is None:
            return ort.InferenceSession(str(dense / graph.name), options, providers=providers)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(dense)
        )
        return ort.InferenceSession(
            edit(read_bounded(graph, MAX_ONNX_BYTES)), options, providers=providers
        )


def load_onnx_genai(folder: str | Path, trust_custom_ops: bool = False) -> Any:
    """An ``onnxruntime_genai.Model``.

    :param trust_custom_ops: let the folder's config name a library of operators, which is then run.
    :raises UserError: if the config names one all the same, the weights are damaged, or there is no
        room to inflate them.
    """
    import onnxruntime_genai

    check_seal(Path(folder), whole=False)
    if not trust_custom_ops:
        check_genai_config(Path(folder))
    with _read_by("ONNX Runtime GenAI", Path(folder)), ExitStack() as copies:
        dense = copies.enter_context(_dense(Path(folder)))
        model = onnxruntime_genai.Model(str(dense))
        if dense != Path(folder):
            # Tokenizer(model) reads its files from here later, so they live as long as the model.
            graph_and_weights(dense)[1].unlink()
            weakref.finalize(model, copies.pop_all().close)
        return model


@contextmanager
def dense_gguf(folder: Path) -> Iterator[Path]:
    """The plain ``model.gguf`` of a folder: its own, or inflated for the time it takes to load it.

    :raises UserError: if the weights are damaged, or there is no room to inflate them.
    """
    check_seal(folder, whole=False)
    with _dense(folder) as dense:
        yield dense / GRAPHS["gguf"]


def gguf_model(file: Path) -> Any:
    """A ``cyllama`` model with its number of tokens, which its context looks for.

    :raises UserError: if llama.cpp refuses the file.
    """
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        n_vocab = 0

    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    try:
        model = Model(path_model=str(file), params=params)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file}: llama.cpp can't load it: {error}") from error
    model.n_vocab = model.get_vocab().n_vocab
    return model


def silent_llama_cpp() -> None:
    """Keep llama-cpp-python's library from telling of every tensor."""
    import llama_cpp

    llama_cpp.llama_log_set(_NOTHING_SAID, None)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _NOTHING_SAID(level: int, text: bytes, data: Any) -> None:
    pass


def load_gguf(folder: str | Path) -> Any:
    """A ``cyllama`` ``LlamaModel``, or a ``llama_cpp.Llama`` where llama-cpp-python alone is
    installed: llama.cpp maps the file, which is inflated where it is packed.

    :raises UserError: if the weights are damaged, there is no room to inflate them, or llama.cpp
        refuses the file.
    """
    with dense_gguf(Path(folder)) as file:
        if installed("cyllama"):
            return gguf_model(file)
        import llama_cpp

        with _read_by("llama.cpp", Path(folder)):
            return llama_cpp.Llama(str(file), verbose=False)
