"""Try every causal language model of transformers at a small random size, and print what happens.

    python benchmarks/all_families.py [--out FILE] [--only TYPE ...] [--again] [--export]

Each model type runs in its own process; all of them take ten minutes. A model of four random
blocks is written
as a Hugging Face folder. Then the passes run: prune, quantize, train two steps, merge, and verify,
which compares the merged model with what was trained. ``--export`` adds every runtime that knows
the model; a minute or two per model type. The outcome is one of

    works, works with notice, refused with reason

An error that is none of them is printed as ``error``, with its last line; a model type that takes
longer than the limit as ``time limit``. Outcomes are appended to the file; a later call continues
with the model types that the file lacks.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from document import finish
from transformers import PretrainedConfig

from sqft_export.telemetry import disable_telemetry

ROOT = Path(__file__).parent.parent
TINY = ROOT / "sqft_export" / "builtin" / "tiny"
PROBLEMS = ROOT / "tests" / "problems"  # a part of the embedded ones: every run reads all
OUTCOME = "outcome.json"
LIMIT_SECONDS = 300
LAYERS = 4
MAX_PARAMETERS = 20_000_000  # a config whose sizes have other names stays large
REASON_CHARACTERS = 600
RUNTIMES = ("openvino", "onnx", "gguf")
WORKS, NOTICE, REFUSED = "works", "works with notice", "refused with reason"
ERROR, TOO_LONG = "error", "time limit"
# A field of a config class -> its value in the small model.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dff"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"), 256),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 416),
    **{
        "head_dim": 16,
        "rotary_dim": 8,
        "hidden_size_per_layer_input": 16,
        "word_embed_proj_dim": 64,
    },
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    "num_experts_per_tok": 2,
    **{"moe_intermediate_size": 32, "sliding_window": 64},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    **{"initializer_range": 0.2, "init_std": 0.2},
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
# Model type -> settings of its small model that no other one needs.
EXTRA: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma3n_text": WINDOWED
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        **{"num_local_experts": 0, "shared_intermediate_size": 128},
        **{"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "youtu": {
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
        "num_key_value_heads": 4,
    },
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS | {"num_dense_layers": 1},
}
WRAPPERS = ("qwen3_5",)  # the class of text models does not take their config
DERIVED = ("head_dim", "num_key_value_heads")  # None in configs that must set them
PASSES = (
    *("adapt.steps=2", "adapt.batch=4", "adapt.ranks=[8, 4]", "adapt.save_steps=2"),
    *("adapt.target_modules=null", "adapt.elastic_groups=null", "adapt.warmup_steps=1"),
    *("calibration.samples=4", "quantize.group_size=32", "verify.prompts=4"),
    *("benchmark.baselines=[merged]", "export.sparse_files=false"),
    "export.sparse_execution=false",
    *(f"task.{split}={PROBLEMS / split}.jsonl" for split in ("train", "test")),
)


def small_settings(config: Any) -> dict[str, Any]:
    """Return settings that make a config small: its own fields, with the values of ``SIZES``."""
    known = config.to_dict()
    small: dict[str, Any] = {
        name: [size] * LAYERS if isinstance(known[name], list) else size
        for name, size in SIZES.items()
        if known.get(name) is not None or (name in DERIVED and name in known)
    }
    for name in known:
        if isinstance(section := getattr(config, name, None), PretrainedConfig):
            small[name] = small_settings(section) | {"model_type": section.model_type}
    return small | EXTRA.get(config.model_type, {})


def write_model(model_type: str, folder: Path) -> str:
    """Write a random model and the embedded tokenizer.

    :return: why only a config was written; empty for a model.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    try:
        default = AutoConfig.for_model(model_type)
    except Exception as error:  # it requires the configs of its parts
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        return f"{type(error).__name__}: {error}"
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(model_type, **small_settings(default))
        kind = AutoModelForCausalLM if model_type not in WRAPPERS else AutoModelForImageTextToText
        with torch.device("meta"):
            model = kind.from_config(config)
        if (count := model.num_parameters()) > MAX_PARAMETERS:
            raise ValueError(f"{count:,} parameters")
        kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    except Exception as error:  # sizes that do not fit, or modules that are not installed
        default.save_pretrained(folder)
        return f"{type(error).__name__}: {error}"
    return ""


class _Notices(logging.Handler):
    """Collects the warnings of this package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def try_family(model_type: str, root: Path, runtimes: tuple[str, ...]) -> dict[str, str]:
    """Run the passes on a small model, and return the outcome and the reason or notice."""
    from sqft_export.errors import UserError
    from sqft_export.metrics import VerifyMetrics, read_metrics
    from sqft_export.plan.checks import check_recipe
    from sqft_export.plan.exporters import drop_unsupported
    from sqft_export.recipe.load import load_recipe
    from sqft_export.run.pipeline import run_recipe

    notices = _Notices()
    logging.getLogger("sqft_export").addHandler(notices)
    folder = root / "model"
    unmade = write_model(model_type, folder)
    try:
        settings = (*PASSES, f"export.targets=[{', '.join(runtimes)}]")
        recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", settings, folder)
        layout = check_recipe(recipe, folder)
    except UserError as error:
        text = f"transformers makes no small model: {unmade}; " if unmade else ""
        return {"outcome": REFUSED, "text": text + str(error)}
    kept = drop_unsupported(recipe, layout)
    skipped = [f"no {name}: {reason}" for name, reason in kept.skipped.items()]
    artifacts = run_recipe(recipe, root / "runs", ("verify",))
    checks = read_metrics(artifacts["verify"], VerifyMetrics).checks
    failed = [check.name for check in checks if not check.passed]
    if failed:
        return {"outcome": ERROR, "text": f"verify: {'; '.join(failed)}"}
    text = "; ".join([*dict.fromkeys(notices.texts), *skipped])
    return {"outcome": NOTICE if text else WORKS, "text": text}


def in_process(model_type: str, seconds: float, runtimes: tuple[str, ...]) -> dict[str, str]:
    """Try a family in its own process, so that a crash or an endless loop ends only this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sqft_export.run.pipeline", "sqft_export.stages.verify"])
    with tempfile.TemporaryDirectory(prefix="all-families-") as scratch:
        process = context.Process(target=try_one, args=(model_type, Path(scratch), runtimes))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return {"outcome": TOO_LONG, "text": f"more than {seconds:g} seconds"}
        outcome = Path(scratch) / OUTCOME
        if not outcome.is_file():
            return {"outcome": ERROR, "text": f"exit code {process.exitcode}"}
        found: dict[str, str] = json.loads(outcome.read_text())
        return found


def try_one(model_type: str, root: Path, runtimes: tuple[str, ...]) -> None:
    """Write the outcome of one family to a file; runs in its own process."""
    disable_telemetry()
    sys.stdout = sys.stderr = (root / "log").open("w")
    try:
        found = try_family(model_type, root, runtimes)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        found = {"outcome": ERROR, "text": f"{type(error).__name__}: {error} ({where})"}
    found["text"] = " ".join(found["text"].replace(str(root), "").split())[:REASON_CHARACTERS]
    (root / OUTCOME).write_text(json.dumps(found))


def read_outcomes(file: Path) -> dict[str, dict[str, str]]:
    """Return model type -> outcome from a file of an earlier call."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {entry["model_type"]: entry for entry in map(json.loads, lines)}


def shorten(text: str) -> str:
    """Return a message without its lists of families, which are those of this package."""
    from sqft_export.model.families import FAMILIES

    experts = sorted(name for name, family in FAMILIES.items() if family.experts)
    for names in (sorted(FAMILIES), experts):
        text = text.replace(", ".join(names), "...")
    return text.replace("/model/config.json: ", "")


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("all_families.jsonl"))
    parser.add_argument("--only", nargs="+", help="model types; all if not given")
    parser.add_argument("--again", action="store_true", help="retry errors and time limits")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="limit per model type")
    parser.add_argument("--export", action="store_true", help="export to every runtime too")
    arguments = parser.parse_args()
    found = read_outcomes(arguments.out)
    wanted = arguments.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unfinished = {ERROR, TOO_LONG} if arguments.again else set()
    for model_type in wanted:
        if model_type in found and found[model_type]["outcome"] not in unfinished:
            continue
        outcome = in_process(model_type, arguments.seconds, RUNTIMES if arguments.export else ())
        entry = {"model_type": model_type, **outcome}
        found[model_type] = entry
        with arguments.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    rows = [found[name] for name in wanted]
    for row in rows:
        print(f"{row['model_type']:24} {row['outcome']:19} {shorten(row['text'])}".rstrip())
    counts = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    finish("all_families", {}, {"outcomes": {row["model_type"]: row["outcome"] for row in rows}})


if __name__ == "__main__":
    main()
