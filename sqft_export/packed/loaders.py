"""Load a deployment, packed or plain.

In OpenVINO, products run on this package's kernels where these are faster (packed/execution.py).
With ``execution="stock"``, and in the other runtimes, weights are inflated first. The runtime then
gets the graph and the weight bytes of the dense folder, and gives the same results.
"""

import ctypes
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.artifacts.store import sha256_of
from sqft_export.errors import DamagedError, HostError, UserError, one_line
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.extension import openvino_extension, require_kernels
from sqft_export.kernels.ir import Graph, is_specialized
from sqft_export.kernels.library import HUGE_PAGE, use_huge_pages
from sqft_export.kernels.rewrite import mark_resident
from sqft_export.machine.host import LESS_MEMORY, installed, out_of_memory, require_space
from sqft_export.packed.container import PackedFile
from sqft_export.packed.execution import available_execution, resolve_execution, rewrite_deployment
from sqft_export.packed.folders import map_weights, packed_file
from sqft_export.packed.seal import check_seal
from sqft_export.targets.folder import GRAPHS, graph_and_weights
from sqft_export.targets.genai_config import check_genai_config
from sqft_export.untrusted import MAX_IR_BYTES, MAX_ONNX_BYTES, files_inside, read_bounded

if TYPE_CHECKING:
    import onnxruntime as ort
    import onnxruntime_genai
    import openvino as ov
    import openvino_genai
    from cyllama.llama.llama_cpp import LlamaModel
    from llama_cpp import Llama


@contextmanager
def _name_folder_in_errors(runtime: str, folder: Path) -> Iterator[None]:
    """Turn a runtime's exceptions into a UserError that names the folder.

    The runtime's own message may name a temporary, inflated copy.
    """
    try:
        yield
    except (UserError, ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # each runtime has its own exception classes
        if out_of_memory(error):
            raise HostError(f"{folder}: {runtime}: {one_line(error)}; {LESS_MEMORY}") from error
        raise UserError(f"{folder}: {runtime} can't load it: {one_line(error)}") from error


def _openvino_weights(file: Path) -> "ov.Tensor":
    """Inflate weights into a new tensor, whose memory the model then shares."""
    import openvino as ov

    with PackedFile(file) as packed:
        tensor = ov.Tensor(ov.Type.u8, ov.Shape([packed.header.size]))
        packed.inflate_checked(tensor.data)
    return tensor


class _RuntimeMemory:
    """Memory owned by an ``openvino.Tensor``, so that it lives as long as a model that uses it."""

    def allocate(self, size: int) -> np.ndarray:
        """Return a uint8 array in huge pages."""
        import openvino as ov

        self.tensor = ov.Tensor(ov.Type.u8, ov.Shape([size + HUGE_PAGE]))
        self.start = -self.tensor.data.ctypes.data % HUGE_PAGE
        array = self.tensor.data[self.start : self.start + size]
        use_huge_pages(array)
        return array

    def leading_tensor(self, size: int) -> "ov.Tensor":
        """Return a tensor over the first ``size`` bytes."""
        import openvino as ov

        return ov.Tensor(self.tensor, [self.start], [self.start + size])


def _openvino_parts(folder: Path, execution: str) -> tuple[bytes, "ov.Tensor | None", list[str]]:
    """Return graph, weights and needed extensions of an OpenVINO deployment.

    The weights are None if the runtime reads them from the file next to the graph.

    :raises UserError: if the weights are damaged, or if the folder is specialized and the kernels
        are missing.
    """
    check_seal(folder, whole=False)
    file, weights = graph_and_weights(folder)
    text, memory = read_bounded(file, MAX_IR_BYTES), _RuntimeMemory()
    if is_specialized(text):
        resolve_execution(execution)
        extension = openvino_extension()
        content, graph = map_weights(weights), Graph(text, str(file))
        graph.check_offsets(len(content))
        array = memory.allocate(len(content))
        array[:] = content
        mark_resident(graph, array, require_kernels())
        return text, memory.leading_tensor(len(array)), [extension]
    execution = available_execution(execution)
    if execution != STOCK and (made := rewrite_deployment(folder, execution, memory.allocate)):
        return made.text, memory.leading_tensor(len(made.weights)), [openvino_extension()]
    packed = packed_file(folder)
    return text, _openvino_weights(packed) if packed else None, []


def load_openvino(
    folder: str | Path, core: "ov.Core | None" = None, execution: str = "auto"
) -> "ov.Model":
    """Return a model to be compiled for the CPU.

    For other devices pass ``execution="stock"``.

    :param core: None for a new one.
    :param execution: auto, sparse, dense or stock, see ``packed/execution.py``.
    :raises UserError: if the weights are damaged, or the runtime can't load the graph.
    """
    import openvino as ov

    folder, core = Path(folder), core or ov.Core()
    with _name_folder_in_errors("OpenVINO", folder):
        text, weights, extensions = _openvino_parts(folder, execution)
        for extension in extensions:
            core.add_extension(extension)
        if weights is None:
            return core.read_model(folder / GRAPHS["openvino"])
        return core.read_model(text, weights)


def load_openvino_genai(
    folder: str | Path,
    device: str = "CPU",
    execution: str = "auto",
    extensions: Sequence[str | Path] = (),
    **properties: object,
) -> "openvino_genai.LLMPipeline":
    """Return a pipeline.

    :param execution: auto, sparse, dense or stock, see ``packed/execution.py``. Devices other than
        the CPU always use their own kernels.
    :param extensions: libraries of other operators, passed on to ``LLMPipeline``.
    :param properties: device properties, passed on to ``LLMPipeline``.
    :raises UserError: if the weights are damaged, or the runtime can't load the graph.
    """
    import openvino_genai

    folder = Path(folder)
    with _name_folder_in_errors("OpenVINO GenAI", folder):
        text, weights, needed = _openvino_parts(folder, execution if device == "CPU" else STOCK)
        if extensions or needed:
            properties["extensions"] = [*extensions, *needed]
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
def _open_dense(folder: Path) -> Iterator[Path]:
    """Yield a folder with plain weights: the folder itself, or a temporary inflated copy.

    ONNX Runtime maps a weight file and frees each tensor once it has repacked it for its kernels.
    Weights passed in memory would stay in memory in addition to the repacked copy. So
    packed weights are inflated into a temporary file, which is deleted once the model is loaded.
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
            raise DamagedError(f"{packed}: its content differs from the file that was packed")


def load_onnx(
    folder: str | Path,
    options: "ort.SessionOptions | None" = None,
    providers: Sequence[str] | None = None,
    edit: Callable[[bytes], bytes] | None = None,
) -> "ort.InferenceSession":
    """Return a session.

    :param options: None for the defaults.
    :param edit: changes the serialized graph in memory; the graph holds no weights.
    :raises UserError: if the weights are damaged, the runtime can't load the graph, or there is no
        space to inflate them.
    """
    import onnxruntime as ort

    check_seal(Path(folder), whole=False)
    graph, _ = graph_and_weights(Path(folder))
    options = options or ort.SessionOptions()
    # A plug-in is added to the options, which excludes names of providers.
    providers = None if options.has_providers() else providers or ["CPUExecutionProvider"]
    with _name_folder_in_errors("ONNX Runtime", Path(folder)), _open_dense(Path(folder)) as dense:
        place = dense / graph.relative_to(folder)
        if edit is None:
            return ort.InferenceSession(str(place), options, providers=providers)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(place.parent)
        )
        return ort.InferenceSession(
            edit(read_bounded(graph, MAX_ONNX_BYTES)), options, providers=providers
        )


def load_onnx_genai(
    folder: str | Path, trust_custom_ops: bool = False
) -> "onnxruntime_genai.Model":
    """Return a model.

    :param trust_custom_ops: allow the folder's config to name a library of operators, whose code
        then runs.
    :raises UserError: if the config names one without this permission, the weights are damaged, or
        there is no space to inflate them.
    """
    import onnxruntime_genai

    check_seal(Path(folder), whole=False)
    if not trust_custom_ops:
        check_genai_config(Path(folder))
    with _name_folder_in_errors("ONNX Runtime GenAI", Path(folder)), ExitStack() as copies:
        dense = copies.enter_context(_open_dense(Path(folder)))
        model = onnxruntime_genai.Model(str(dense))
        if dense != Path(folder):
            # Tokenizer(model) reads files from the copy later, so it is kept as long as the model.
            graph_and_weights(dense)[1].unlink()
            weakref.finalize(model, copies.pop_all().close)
        return model


@contextmanager
def dense_gguf(folder: Path) -> Iterator[Path]:
    """Yield the plain ``model.gguf`` of a folder, inflated into a temporary file if it is packed.

    :raises UserError: if the weights are damaged, or there is no space to inflate them.
    """
    check_seal(folder, whole=False)
    with _open_dense(folder) as dense:
        yield dense / GRAPHS["gguf"]


_ALL_LAYERS = 2**16


def gguf_model(file: Path, gpu: int | None = None) -> "LlamaModel":
    """Return a ``cyllama`` model with the attribute ``n_vocab``, which its context class reads.

    :param gpu: number of the GPU that gets all layers; None: they stay on the CPU.
    :raises UserError: if llama.cpp refuses the file.
    """
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        n_vocab = 0

    llama_cpp.disable_logging()
    if not llama_cpp.ggml_backend_dev_count():  # a wheel with separate backends
        llama_cpp.ggml_backend_load_all()
    params = llama_cpp.LlamaModelParams()
    params.n_gpu_layers = 0
    if gpu is not None:
        params.n_gpu_layers, params.split_mode, params.main_gpu = _ALL_LAYERS, 0, gpu
    try:
        model = Model(path_model=str(file), params=params)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file}: llama.cpp can't load it: {error}") from error
    model.n_vocab = model.get_vocab().n_vocab
    return model


def silence_llama_cpp(functions: ModuleType | SimpleNamespace) -> None:
    """Silence the log messages of llama.cpp, which lists every tensor.

    :param functions: the module ``llama_cpp``, or an object with the same functions.
    """
    functions.llama_log_set(_ignore_log, None)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _ignore_log(level: int, text: bytes, data: object) -> None:
    pass


def load_gguf(folder: str | Path) -> "LlamaModel | Llama":
    """Return ``cyllama``'s model, or that of ``llama_cpp`` if cyllama is not installed.

    llama.cpp maps the file. A packed file is inflated first.

    :raises UserError: if the weights are damaged, there is no space to inflate them, or llama.cpp
        refuses the file.
    """
    with dense_gguf(Path(folder)) as file:
        if installed("cyllama"):
            return gguf_model(file)
        import llama_cpp

        with _name_folder_in_errors("llama.cpp", Path(folder)):
            return llama_cpp.Llama(str(file), verbose=False)
