"""The house: arrows point down, between rooms and inside them; a word means one thing."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sqft_export"
# From the bottom up. A module imports only what stands in an earlier line; one that is named as a
# whole room (its files are plugs) may import within itself.
ORDER = [
    {"errors"},
    {"untrusted"},
    {"textfiles", "compiled"},
    {"numerics.codes", "numerics.groups", "numerics.nibbles", "numerics.hessian", "numerics.masks"},
    {"numerics.affine"},
    {"numerics.fused"},
    {"numerics.gptq_layout"},
    {"recipe.templates"},
    {"recipe.schema"},
    {"recipe.overrides"},
    {"recipe.load", "recipe.passes", "recipe.fields", "recipe.view"},
    {"run.limits"},
    {"run.host", "run.device", "run.progress"},
    {"run.hashes", "run.precision"},
    {
        "run.artifact",
        "run.launcher",
        "run.threads",
        "targets.folder",
        "model.memory",
        "model.companions",
    },
    {"model.chat", "model.endings"},
    {"model.tensorfiles", "run.processors", "targets.genai_config"},
    {"model.families", "model.existing"},
    {"model.architecture"},
    {"model.contexts", "model.miniature"},
    {"model.checkpoint", "model.hub"},
    {"model.skeleton", "model.storage", "model.coverage"},
    {"model.floats", "model.blocks"},
    {"model.reconstruction"},
    {"data.files", "data.revisions", "data.marks", "data.answers"},
    {"data.datasets", "data.tables", "data.turns", "data.chat_template"},
    {"data.chat"},
    {"data.columns", "data.loss_text"},
    {"data.conversations"},
    {"data.items"},
    {"data.calibration", "data.stops"},
    {"data.scoring"},
    {"packed.inflate", "packed.blocks", "packed.gguf_file"},
    {"packed.container"},
    {"packed.streaming"},
    {"measure.machine", "kernels.library"},
    {"kernels.ir", "kernels.extension"},
    {"kernels.build", "packed.regions"},
    {"kernels.rewrite"},
    {"kernels.choice"},
    {"packed.seal"},
    {"packed.usage"},
    {"packed.folders"},
    {"packed.execution"},
    {"packed.loaders"},
    {"adapters.files", "adapters.linear", "adapters.checkpoints"},
    {"adapters.elastic"},
    {"adapters.loading"},
    {"adapters.merging", "adapters.training", "adapters.evidence"},
    {"targets", "targets.devices"},
    {"targets.gguf.blocks", "targets.gguf.architectures", "targets.gguf.tokenizer"},
    {"targets.gguf.bindings"},
    {"targets.gguf.session"},
    {"targets.tokenizers", "targets.text_api"},
    {"targets.openvino", "targets.torch", "targets.onnx.session", "targets.onnx.weights"},
    {"targets.onnx.adapter", "targets.onnx.fused", "targets.onnx.standard"},
    {"targets.gguf", "targets.onnx"},
    {"targets.inspect"},
    {"sparsifiers", "quantizers", "search"},
    {"measure.statistics"},
    {"measure.batches", "measure.rows", "measure.chance", "measure.stops"},
    {"measure.decode"},
    {"measure.likelihood"},
    {"measure.agreement"},
    {"measure.quality"},
    {"measure.harness"},
    {"measure.worker", "verify.certificate", "verify.subject"},
    {"verify.text_answers"},
    {"verify.fidelity", "verify.storage", "verify.compute"},
    {"verify.lengths"},
    {"verify.certify"},
    {"measure.deployments"},
    {"plan.layout", "plan.workload", "plan.catalog"},
    {"plan.tokenizer", "plan.speeds", "plan.gates", "plan.unusual", "plan.answers", "plan.prompts"},
    {"plan.chat"},
    {"plan.context"},
    {"plan.disk"},
    {"plan.memory", "plan.work", "plan.budget"},
    {"plan.seconds"},
    {"plan.readers"},
    {"plan.exporters"},
    {"plan.warnings"},
    {"plan.checks"},
    {"report.text"},
    {"report.verdict", "report.terminal"},
    {"report.html", "report.pictures", "report.document", "report.provenance", "report.prompts"},
    {"report.runs"},
    {"stages"},
    {"run.digests", "run.gates"},
    {"run.pipeline"},
    {"run.preview"},
    {"cli"},
]
PLUGS = ("sparsifiers", "quantizers", "search", "model.families")
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] not in "_.")
# What every plug of a kind offers: the same name in each, held by a Protocol.
CONTRACTS = {"NEEDS", "compress", "search"}
LONGEST = 40
DEEPEST = 3


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> its code."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.startswith("builtin"):
            found[name] = ast.parse(file.read_text())
    return found


MODULES = modules()


def entry_of(module: str) -> str | None:
    """The longest entry of ``ORDER`` that a module is, or is within."""
    known = [entry for line in ORDER for entry in line]
    within = [e for e in known if module == e or module.startswith(f"{e}.")]
    return max(within, key=len, default=None)


def rank_of(entry: str) -> int:
    return next(rank for rank, line in enumerate(ORDER) if entry in line)


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_at_run_time(node)


def imports_of(tree: ast.Module) -> set[str]:
    """Modules below ``sqft_export`` that one imports, inside functions too."""
    names = set()
    for node in nodes_at_run_time(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqft_export"):
            base = (node.module or "").removeprefix("sqft_export").removeprefix(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".removeprefix(".")
                names.add(whole if whole in MODULES else base)
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.startswith("sqft_export.")}
    return {name.removeprefix("sqft_export.") for name in names}


def test_imports_point_down():
    wrong = []
    for module, tree in MODULES.items():
        own = entry_of(module)
        if own is None:
            assert module in ROOMS, f"{module} has no place in ORDER"
            assert not imports_of(tree), f"{module} is a room's front and imports nothing"
            continue
        for other in imports_of(tree):
            theirs = entry_of(other)
            assert theirs, f"{module} imports {other}, which has no place in ORDER"
            same = theirs == own and own in PLUGS
            to_front = theirs == own and other == own  # a stage and the protocol of stages
            if rank_of(theirs) >= rank_of(own) and not same and not to_front:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_stages_import_no_sibling():
    for module, tree in MODULES.items():
        if module.startswith("stages."):
            assert not [other for other in imports_of(tree) if other.startswith("stages.")], module


def test_plugs_and_stages_are_held_to_their_protocols():
    """Every file of such a room stands in the tuple that mypy checks."""
    rooms = ("stages", "sparsifiers", "quantizers")
    for room in rooms:
        checking = [
            alias.name
            for node in ast.walk(MODULES[room])
            if isinstance(node, ast.ImportFrom) and node.module == f"sqft_export.{room}"
            for alias in node.names
        ]
        files = {m.split(".")[1] for m in MODULES if m.startswith(f"{room}.")} - {"allocation"}
        assert files == set(checking), room


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_name_is_public_in_two_rooms():
    rooms = defaultdict(set)
    for module, tree in MODULES.items():
        if "." in module or module in ROOMS:
            for name in public_names(tree):
                rooms[name].add(module.partition(".")[0])
    twice = {n: sorted(r) for n, r in rooms.items() if len(r) > 1 and n not in CONTRACTS}
    assert not twice


def depth_of(node: ast.AST) -> int:
    """Levels of blocks inside a function, its own not counted."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    inner = [
        depth_of(child) + (isinstance(child, blocks) and not is_elif(node, child))
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda)
    ]
    return max(inner, default=0)


def is_elif(parent: ast.AST, child: ast.AST) -> bool:
    return isinstance(parent, ast.If) and isinstance(child, ast.If) and parent.orelse == [child]


def test_functions_are_short_and_flat():
    long, deep = [], []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                if (node.end_lineno or 0) - node.lineno + 1 > LONGEST:
                    long.append(f"{module}.{node.name}")
                if depth_of(node) > DEEPEST:
                    deep.append(f"{module}.{node.name}: {depth_of(node)}")
    assert not long and not deep, (long, deep)


def test_no_code_of_a_model_folder_is_loaded():
    """transformers asks on the terminal where a call does not say."""
    silent = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if not named or not isinstance(node.func.value, ast.Name):
                continue
            loads = node.func.attr in ("from_pretrained", "from_config")
            if loads and node.func.value.id.startswith("Auto"):
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                silent += [module] if given.get("trust_remote_code") is not False else []
    assert not silent


def test_artifact_needs_the_standard_library_alone():
    hashing = {"errors", "run.hashes", "run.host", "untrusted"}
    assert imports_of(MODULES["run.artifact"]) == hashing
    assert imports_of(MODULES["untrusted"]) == {"errors"}
    assert imports_of(MODULES["run.hashes"]) == {"run.host"}
    assert imports_of(MODULES["run.host"]) == {"errors", "run.limits"}
    assert not imports_of(MODULES["run.limits"])
    names = {n.module for n in ast.walk(MODULES["run.artifact"]) if isinstance(n, ast.ImportFrom)}
    assert not names & {"numpy", "torch", "safetensors"}
