"""Add an unmerged adapter to the graph as optional inputs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from sqft_export.adapters.files import read_low_rank
from sqft_export.numerics.codes import LowRank
from sqft_export.targets.folder import ADAPTER_FOLDER, GRAPHS
from sqft_export.targets.onnx.session import ADAPTER_FILE, decoder_of
from sqft_export.targets.onnx.weights import Rows, head_rows, product_parts, set_nodes


def add_adapter(folder: Path, adapter: Path) -> None:
    """Add inputs for low-rank updates to the graph, and write the adapter with their values.

    The inputs are ``<linear>.lora_A`` float32 ``[in, rank]`` and ``.lora_B`` ``[rank, out]``. Their
    default is empty, so the graph runs without an adapter too. ONNX Runtime's ``LoraAdapter`` and
    GenAI's ``Adapters`` load ``adapter.onnx_adapter``.
    """
    model = onnx.load(folder / GRAPHS["onnx"], load_external_data=False)
    updates = _Updates(model.graph, read_low_rank(adapter), head_rows(decoder_of(folder)))
    set_nodes(model.graph, [new for node in model.graph.node for new in updates.add_products(node)])
    onnx.save(model, folder / GRAPHS["onnx"])
    (folder / ADAPTER_FOLDER).mkdir()
    stored = ort.AdapterFormat()
    stored.set_adapter_version(1)
    stored.set_model_version(1)
    arrays = updates.parameters.items()
    stored.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(array) for k, array in arrays})
    stored.export_adapter(str(folder / ADAPTER_FOLDER / ADAPTER_FILE))


class _Updates:
    """Low-rank updates of the products of a graph.

    low_rank: Linear -> ``A [rank, in]`` and ``B [out, rank]``.
    parameters: input of the graph -> its value in the adapter.
    """

    def __init__(self, graph: onnx.GraphProto, low_rank: LowRank, qkv_rows: list[int]):
        self.graph, self.low_rank = graph, low_rank
        self.qkv_rows = dict(zip("qkv", qkv_rows, strict=True))
        self.parameters: dict[str, np.ndarray] = {}

    def add_products(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield the node, then the nodes that add the updates of its Linears to its output."""
        yield node
        parts = product_parts(node)
        adapted = [part for part in parts if part.linear in self.low_rank]
        if not adapted:
            return
        output = node.output[0]
        node.output[0] = f"{output}/base"
        inputs = self.low_rank[adapted[0].linear][0].shape[1]
        added = []
        for part in parts:
            keys = self._add_inputs(part, inputs)
            low, update = f"{output}/{part}/low", f"{output}/{part}/update"
            yield helper.make_node("MatMul", [node.input[0], keys[0]], [low])
            yield helper.make_node("MatMul", [low, keys[1]], [update])
            added.append(update)
        if len(added) > 1:
            yield helper.make_node("Concat", added, [f"{output}/update"], axis=-1)
            added = [f"{output}/update"]
        yield helper.make_node("Add", [f"{output}/base", *added], [output])

    def _add_inputs(self, part: Rows, inputs: int) -> tuple[str, str]:
        """Add inputs for the transposed ``A`` and ``B``, and return their names."""
        keys = f"{part}.lora_A", f"{part}.lora_B"
        for key, array in zip(keys, self._pair(part, inputs), strict=True):
            self.parameters[key] = np.ascontiguousarray(array)
        outputs = self.parameters[keys[1]].shape[1]
        # One dimension name must mean one size, because the runtime reuses memory by name.
        rank = f"{part}.rank"
        self._add_optional_input(keys[0], [inputs, rank], [inputs, 0])
        self._add_optional_input(keys[1], [rank, outputs], [0, outputs])
        return keys

    def _pair(self, part: Rows, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``A.T [in, rank]`` and ``B.T [rank, out]`` of some rows."""
        if part.linear in self.low_rank:
            lora_a, lora_b = self.low_rank[part.linear]
            return lora_a.T, lora_b[part.rows].T
        # A Linear without an adapter, in one product with adapted ones, gets an update of rank 0.
        rows = self.qkv_rows[part.linear.rsplit(".", 1)[1][0]]
        return np.zeros((inputs, 0), np.float32), np.zeros((0, rows), np.float32)

    def _add_optional_input(self, name: str, shape: list[int | str], default: list[int]) -> None:
        value = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        self.graph.input.append(value)
        self.graph.initializer.append(numpy_helper.from_array(np.zeros(default, np.float32), name))
