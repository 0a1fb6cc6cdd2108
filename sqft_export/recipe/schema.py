"""The recipe: YAML 1.2 to typed, frozen sections, checked as a whole before anything runs.

Every field is described here once; a wrong one is reported with the file, the YAML path, the
value found and what is allowed. Paths are relative to the recipe file; ``builtin:tiny`` is the
folder of the embedded model.
"""

import math
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sqft_export.numerics.codes import FLOAT16_BITS
from sqft_export.recipe.templates import leading_text, template_fault
from sqft_export.untrusted import real_path

BUILTIN = "builtin:"
HUB = "hub:"
OFFSET_BITS = 7  # of a scale whose product with any 4-bit zero point is a float16
MAX_NAME_BYTES = 255  # of one name in a path, as file systems have it


def _fits_a_file_system(path: str) -> str:
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in path.split("/")):
        raise ValueError(f"a name in it has more than {MAX_NAME_BYTES} bytes")
    return path


FileName = Annotated[str, Field(max_length=4000), AfterValidator(_fits_a_file_system)]


class UndeclaredFieldError(Exception):
    """A pass reads a recipe field that it does not declare; see ``recipe/view.py``."""


_Value = TypeVar("_Value")


class Combined(Generic[_Value]):
    """A property that combines fields of several sections. A view of the recipe may hold its value
    in ``__dict__``, where Python looks first since this sets nothing."""

    def __init__(self, compute: Callable[[Any], _Value]):
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, section: Any, owner: type) -> _Value:
        return self if section is None else self.compute(section)  # type: ignore[return-value]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, ignored_types=(Combined,)
    )

    if not TYPE_CHECKING:  # else every attribute would exist for mypy

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                place = f"{type(self).__name__}.{name}"
                raise UndeclaredFieldError(f"{place} is read by a pass that does not declare it")
            return super().__getattr__(name)


class Model(Section):
    """The base model: a local Hugging Face folder, or a model on the hub."""

    path: FileName | None = Field(None, description="local folder, or builtin:tiny")
    hub: str | None = Field(None, description="hub name, downloaded when the recipe runs")
    revision: str | None = Field(None, description="commit or tag on the hub")
    config: dict[str, Any] | None = Field(
        None, description="expected config.json fields; lets plan work where the model is not"
    )

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


# Texts that begin another item, by the template of a dataset's prompts.
DATASET_STOPS = {
    "question": ("Question:",),
    "alpaca": ("### Instruction:",),
    "phi3": ("<|end|>", "<|user|>"),
}
SHORTEST_LABEL = 5  # characters; "A:" may end a word of an answer
StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...] | None,
    Field(
        description="texts at which a generated answer ends, in every row; []: none; null: the "
        "words that the prompt begins with, such as Question:"
    ),
]


class Problems(Section):
    """Prompt and answer pairs in jsonl, scored by exact match of the generated answer."""

    kind: Literal["problems"]
    train: FileName = Field(description="jsonl of training items")
    test: FileName = Field(
        description="jsonl of held-out items, read by benchmark and verify alone"
    )
    prompt: str = Field("{prompt}", description="template over the fields of an item")
    answer: str = Field("{answer}", description="template over the fields of an item")
    final: str | None = Field(
        None, description="mark before the final answer, as #### in GSM8K; None compares it all"
    )
    stop: StopTexts = None
    max_new_tokens: int = Field(32, ge=1)
    sequence_length: int = Field(256, ge=8, description="longest training example in tokens")

    @field_validator("prompt", "answer")
    @classmethod
    def _is_template(cls, template: str) -> str:
        if fault := template_fault(template):
            raise ValueError(fault)
        return template

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """``stop``, or the first line of every prompt: a model that goes on after its answer writes
        it again. A label such as ``Question:`` stops everywhere; other lines may be part of an
        answer, and stop at the beginning of a line only."""
        if self.stop is not None:
            return self.stop
        line = leading_text(self.prompt).strip().split("\n")[0].rstrip()
        if not line:
            return ()
        is_label = line.endswith(":") and len(line) >= SHORTEST_LABEL
        return (line if is_label else f"\n{line}",)


class Dataset(Section):
    """A dataset by name: its prompts, and its scoring as the SQFT authors and lm-eval have them."""

    kind: Literal["dataset"]
    name: Literal[
        "gsm8k",
        "math_10k",
        "commonsense",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "piqa",
        "boolq",
        "winogrande",
        "hellaswag",
    ]
    folder: FileName | None = Field(
        None, description="local folder with <set>/train.json and test.json; null: from the hub"
    )
    train_sets: tuple[str, ...] | None = Field(None, description="null: those of the name")
    test_sets: tuple[str, ...] | None = Field(None, description="null: those of the name")
    template: Literal["question", "alpaca", "phi3"] = Field(
        "question", description="prompt of word problems and instructions"
    )
    stop: StopTexts = None
    max_new_tokens: int = Field(256, ge=1, description="of answers that are generated")
    sequence_length: int = Field(512, ge=8, description="longest training example in tokens")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """``stop``, or what the prompts of the template begin with."""
        return DATASET_STOPS[self.template] if self.stop is None else self.stop


class Text(Section):
    """A plain text file; scored by perplexity and the share of tokens predicted right."""

    kind: Literal["text"]
    text: FileName = Field(description="text file; its last part is held out")
    test_share: float = Field(0.1, gt=0, lt=1, description="share of the text that is held out")
    sequence_length: int = Field(256, ge=8, description="tokens per training and test window")


Task = Annotated[Problems | Dataset | Text, Field(discriminator="kind")]
TASK_KINDS: dict[str, type[Section]] = {"problems": Problems, "dataset": Dataset, "text": Text}


class Calibration(Section):
    """The samples that sparsify and quantize see. Lengths may differ; nothing is padded."""

    source: FileName = Field(
        "task",
        description="task: the training split; a .txt or .jsonl file; a local folder that the "
        "datasets library reads; or hub:<dataset> on the Hugging Face hub",
    )
    subset: str | None = Field(None, description="configuration of a dataset, such as wikitext's")
    split: str = Field("train", description="split of a dataset")
    revision: str | None = Field(None, description="commit or tag of a dataset on the hub")
    field: str = Field("text", description="field of a jsonl object or dataset row that is read")
    samples: int = Field(128, ge=1)
    sequence_length: int = Field(512, ge=8, description="tokens kept of each sample")


class Amount(Section):
    """How much is pruned."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="share dropped of each row")
    pattern: str | None = Field(
        None, pattern=r"^\d+:\d+$", description='N:M, N of every M columns kept, such as "2:4"'
    )

    at_most: tuple[int, int] | None = Field(
        None,
        description="with sparsity: no more than the first of every so many columns are kept, such "
        "as [32, 64]; nearly free, and a kernel then knows how much it has to read",
    )

    def n_of_m(self) -> tuple[int, int] | None:
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    def check_pattern(self) -> None:
        found = self.n_of_m()
        if found and not 0 < found[0] < found[1]:
            raise ValueError(f"pattern {self.pattern} must keep at least 1 of M and drop 1")
        if self.at_most is None:
            return
        if self.sparsity is None:
            raise ValueError("at_most goes with sparsity; pattern is an amount of its own")
        most, of = self.at_most
        if not 0 < most < of:
            raise ValueError(f"at_most: found {[most, of]}; at least 1 is kept and 1 dropped")
        if most < (1 - self.sparsity) * of - 1e-6:
            kept = 1 - self.sparsity
            raise ValueError(
                f"at_most: found {[most, of]}, which keeps {most / of:.0%} at most; sparsity "
                f"{self.sparsity} keeps {kept:.0%}"
            )


class Override(Amount):
    """Another amount for some Linears."""

    modules: tuple[str, ...] = Field(
        min_length=1,
        description="last names (down_proj) or whole ones with wildcards (model.layers.0.*)",
    )
    skip: bool = Field(False, description="leave these Linears dense")

    @model_validator(mode="after")
    def _one_amount(self):
        if sum([self.skip, self.sparsity is not None, self.pattern is not None]) != 1:
            raise ValueError("give one of skip, sparsity and pattern")
        self.check_pattern()
        return self


class Reconstruct(Section):
    """Kept weights trained, block by block, to give the dense block's output."""

    steps: int = Field(60, ge=1, description="of every block")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="at first; it falls to nothing (cosine). null: a hundredth of the root mean "
        "square of each row's weights",
    )
    batch: int = Field(4, ge=1, description="calibration samples of a step")


class Sparsify(Amount):
    method: Literal["wanda", "sparsegpt", "magnitude", "given", "none"] = Field(
        "wanda", description="given: the model is sparse already, its zeros are the mask"
    )
    reconstruct: Reconstruct | None = Field(
        None,
        description="train the kept weights, block by block, before anything is rounded; {} takes "
        "the defaults",
    )
    overrides: tuple[Override, ...] = Field((), description="the first that matches counts")
    allocation: Literal["uniform", "output-error"] = Field(
        "uniform",
        description="output-error: Linears without an override differ, up to 0.15 from sparsity, "
        "so that their summed relative output error is least at the same sparsity over all",
    )

    @model_validator(mode="after")
    def _one_measure(self):
        if self.method in ("none", "given"):
            amounts = self.sparsity is not None or self.pattern or self.at_most
            if amounts or self.overrides or self.allocated:
                raise ValueError(
                    f"method {self.method} takes no amounts; leave out sparsity, pattern, at_most, "
                    "overrides and allocation"
                )
            if self.reconstruct:
                raise ValueError(
                    f"reconstruct: method {self.method} prunes nothing that a dense block is known "
                    "for; it goes with wanda, sparsegpt and magnitude"
                )
        elif (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        elif self.allocated and self.pattern:
            raise ValueError("allocation output-error goes with sparsity, not with pattern")
        self.check_pattern()
        return self

    @property
    def allocated(self) -> bool:
        return self.allocation == "output-error"

    @property
    def calibrates(self) -> bool:
        """Whether pruning looks at calibration data."""
        return self.method in ("wanda", "sparsegpt") or self.allocated


class Nncf(Section):
    """What NNCF does to find codes and grid (its weight compression, a block at a time)."""

    awq: bool = True
    scale_estimation: bool = True
    gptq: bool = False
    int4_ratio: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each block's weights in INT4; the most sensitive rest is INT8 per "
        "channel",
    )
    sensitivity: Literal[
        "weight_quantization_error",
        "hessian_input_activation",
        "mean_activation_variance",
        "max_activation_variance",
        "mean_activation_magnitude",
    ] = Field("hessian_input_activation", description="what ranks the layers")


class Quantize(Section):
    method: Literal["gptq", "rtn", "nncf", "given", "none"] = Field(
        "gptq", description="given: the model is a GPTQ checkpoint, its codes and grid are taken"
    )
    bits: Literal[2, 3, 4, 8] = Field(
        4,
        description="2 and 3: four and eight levels, stored in the 4-bit codes that runtimes read; "
        "export.entropy brings a packed file near their true size",
    )
    group_size: Literal[16, 32, 64, 128] | None = Field(
        64, description="inputs that share a scale; null is per channel"
    )
    symmetric: bool = True
    group_size_fallback: Literal["allow", "error"] = Field(
        "allow",
        description="where group_size does not divide a layer's inputs: the largest smaller power "
        "of two from 16 up that does, else per channel; or refuse",
    )
    damping: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal added by GPTQ")
    embedding_bits: Literal[8] | None = Field(
        None, description="8: embedding and head in INT8, one scale a row; null: as stored"
    )
    nncf: Nncf = Nncf()
    reconstruct: Reconstruct | None = Field(
        None,
        description="train kept weights and scales through the grid, block by block; {} takes the "
        "defaults",
    )

    @model_validator(mode="after")
    def _nncf_fits(self):
        if self.method != "nncf" and self.nncf != Nncf():
            raise ValueError(f"nncf: settings for method nncf, but method is {self.method}")
        if self.method == "nncf" and self.bits < 4:
            raise ValueError(f"bits: found {self.bits}; NNCF has 4 and 8")
        if self.method == "nncf" and self.bits == 8 and self.group_size is not None:
            raise ValueError("NNCF's INT8 is per channel: set group_size: null")
        if self.method in ("none", "given") and self.embedding_bits:
            raise ValueError(f"embedding_bits: method {self.method} quantizes nothing")
        if self.method in ("none", "given") and self.reconstruct:
            raise ValueError(
                f"reconstruct: method {self.method} rounds nothing; it goes with gptq, rtn and nncf"
            )
        return self

    @property
    def calibrates(self) -> bool:
        """Whether rounding looks at calibration data."""
        return self.method in ("gptq", "nncf") or self.reconstruct is not None


class Distill(Section):
    """Part of the loss: the divergence from a teacher's next-token distribution."""

    teacher: Literal["dense", "dense-lora"] = Field(
        "dense", description="the base model, or the base model with LoRA trained on the task"
    )
    weight: float = Field(0.5, gt=0, le=1, description="of the divergence; the rest is the loss")
    temperature: float = Field(1.0, gt=0)
    layers: float = Field(
        0.0,
        ge=0,
        description="of the mean over blocks of the squared error of their outputs, as a share of "
        "the teacher's squares, which is added",
    )


class Adapt(Section):
    """Elastic sparse LoRA. Defaults are the paper's (arXiv 2410.03750)."""

    pipeline: Literal["shears", "sparsepeft", "sqft", "qa-sparsepeft"] = Field(
        "qa-sparsepeft",
        description="sparsepeft: masked adapter, merges into sparse floats; qa-sparsepeft: trained "
        "through the grid too, merges into sparse codes; shears, sqft: plain adapter, unmerged, "
        "from a sparse float or quantized base",
    )
    merge_dense: bool = Field(
        False, description="shears: merge all the same; the result is no longer sparse"
    )
    elastic: bool = Field(True, description="false: every adapter has the highest rank throughout")
    trainable_scales: bool = Field(False, description="qa-sparsepeft: the grid's scales move too")
    scale_learning_rate: float = Field(
        0.1, gt=0, description="of trainable scales, as a share of learning_rate, per relative step"
    )
    distill: Distill | None = Field(None, description="learn from a teacher as well")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Linears with an adapter, by their last name; null: the family's"
    )
    ranks: tuple[int, ...] = Field(
        (32, 28, 24, 20, 16), min_length=1, description="ranks of the elastic groups"
    )
    elastic_groups: tuple[tuple[str, ...], ...] | None = Field(
        None,
        description="modules that share one drawn rank in a block; other targets keep the highest; "
        "null: the family's",
    )
    alpha: float = Field(64, gt=0, description="the update is scaled by alpha / highest rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the adapter alone")
    learning_rate: float = Field(3e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(100, ge=0)
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    batch: int = Field(16, ge=1)
    accumulation: int = Field(1, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    loss_on: Literal["answer", "all"] = Field("all", description="tokens that enter the loss")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="of activations; auto: bfloat16 where products in it are faster"
    )
    gradient_checkpointing: bool = False
    save_steps: int = Field(100, ge=1, description="an interrupted training continues from here")

    @model_validator(mode="after")
    def _consistent(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks must be positive and different, found {list(self.ranks)}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; leave it out for those of the family")
        elastic = [name for group in self.elastic_groups or () for name in group]
        if strangers := sorted(set(elastic) - set(self.target_modules or elastic)):
            raise ValueError(f"elastic_groups name {strangers}, which are not in target_modules")
        if len(set(elastic)) < len(elastic):
            raise ValueError("a module stands in two elastic_groups")
        if self.merge_dense and self.pipeline != "shears":
            raise ValueError(f"merge_dense is for shears, found {self.pipeline}")
        if self.trainable_scales and self.pipeline != "qa-sparsepeft":
            raise ValueError(f"trainable_scales is for qa-sparsepeft, found {self.pipeline}")
        return self

    @property
    def on_grid(self) -> bool:
        """The base is quantized."""
        return self.pipeline in ("sqft", "qa-sparsepeft")

    @property
    def masked(self) -> bool:
        """The update is kept inside the pruning mask."""
        return self.pipeline in ("sparsepeft", "qa-sparsepeft")

    @property
    def unmerged(self) -> bool:
        """The adapter is not merged."""
        return self.pipeline == "sqft" or (self.pipeline == "shears" and not self.merge_dense)

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    def total_steps(self, examples: int, processes: int = 1) -> int:
        """Optimizer steps, as the Trainer counts them; every process takes batches of its own."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batches = math.ceil(examples / (self.batch * processes))
        return math.ceil(math.ceil(batches / self.accumulation) * self.epochs)


class Search(Section):
    """The rank of every elastic group, chosen on items set aside from the training data."""

    strategy: Literal[
        "median",
        "maximal",
        "minimal",
        "given",
        "frequent",
        "lowest-loss",
        "hill-climb",
        "evolutionary",
    ] = "median"
    budget: int = Field(20, ge=1, description="evaluations at most, of strategies that evaluate")
    items: int = Field(64, ge=1, description="training items set aside for them to be scored on")
    configuration: FileName | None = Field(None, description="given: a search's configuration.json")

    @model_validator(mode="after")
    def _given_fits(self):
        if (self.configuration is not None) != (self.strategy == "given"):
            raise ValueError("configuration and strategy given go together")
        return self

    @property
    def evaluates(self) -> bool:
        return self.strategy in ("lowest-loss", "hill-climb", "evolutionary")


class Export(Section):
    targets: tuple[Literal["openvino", "onnx", "gguf"], ...] = ("openvino", "onnx")
    onnx_graph: Literal["auto", "fused", "standard"] = Field(
        "auto",
        description="fused: the operators of ONNX Runtime GenAI; standard: ONNX's own and "
        "MatMulNBits, which onnx.checker and OpenVINO read too; auto: fused where GenAI's builder "
        "knows the model",
    )
    on_unsupported: Literal["skip", "error"] = Field(
        "skip",
        description="a target that the model cannot have: skip it where another target works, with "
        "a notice and a line in the report; or refuse the recipe",
    )
    sparse_files: bool = Field(
        False, description="a packed copy of every deployment too, which zeros make smaller"
    )
    entropy: bool = Field(
        False, description="packed copies compressed as well: smaller, and slower to load"
    )

    sparse_execution: bool = Field(
        False,
        description="an OpenVINO folder too whose products run on our kernels, straight from mask "
        "and kept codes; it loads with sqft_export.openvino_extension()",
    )

    @model_validator(mode="after")
    def _entropy_fits(self):
        if self.entropy and not self.sparse_files:
            raise ValueError("entropy is for packed copies; set sparse_files: true")
        return self


class Verify(Section):
    prompts: int = Field(32, ge=1, description="test prompts whose greedy tokens must be equal")
    new_tokens: int = Field(16, ge=1)
    tolerance: float = Field(
        1e-4, gt=0, description="largest logit difference, in standard deviations of the logits"
    )
    divergence: float = Field(
        0.1,
        gt=0,
        description="largest mean KL divergence of a runtime's default mode, in nats a token",
    )
    tokenizers: Literal["auto", "required", "reported"] = Field(
        "auto",
        description="required: a runtime's own tokenizer must give the ids that were trained with; "
        "reported: it is compared, and may differ; auto: reported for a runtime whose tokenizer is "
        "known to differ before training, which plan says, else required",
    )


class Benchmark(Section):
    items: int = Field(400, ge=1, description="of every set, scored by every row")
    minutes: float | None = Field(
        None,
        gt=0,
        description="instead of items: as many of every set as all rows score in this time, no "
        "fewer than 8; the same for every row",
    )
    baselines: tuple[
        Literal["dense", "dense-lora", "sparse", "sparse-quantized", "adapted", "merged"], ...
    ] = ("dense", "dense-lora", "sparse", "sparse-quantized", "adapted", "merged")
    targets: tuple[Literal["auto", "cpu", "gpu", "npu"], ...] = Field(
        ("cpu",),
        min_length=1,
        description="devices that deployments are measured on; auto: all that are here",
    )
    prompt_tokens: int = Field(32, ge=1, description="prompt length of the latency measurement")
    new_tokens: int = Field(32, ge=2)
    repeats: int = Field(5, ge=2, description="of the latency measurement, in every process")
    rounds: int = Field(3, ge=1, description="processes a row, in turns with the other rows")
    threads: int | None = Field(None, ge=1, description="null: one per processor")
    lm_eval: tuple[str, ...] = Field(
        (), description="tasks of lm-eval that every row is scored on too (extra lm-eval)"
    )
    lm_eval_folder: FileName | None = Field(None, description="of task files of your own")

    @model_validator(mode="after")
    def _one_measure(self):
        if self.minutes is not None and "items" in self.model_fields_set:
            raise ValueError("give either items or minutes")
        return self


class Gates(Section):
    """What a run may cost on held-out data before it stops; docs/reliability.md has the defaults
    that warn."""

    kl: float | None = Field(
        None,
        gt=0,
        description="largest KL divergence of a pass from the one before, in nats per token; null: "
        "a warning above 1. A pass that trains is stopped where its perplexity rose as well",
    )
    accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="most points of accuracy that the merged model or a deployment may lose to the "
        "dense base; null: a warning above 5 that a paired test tells from chance",
    )


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(42, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = Field(
        "auto", description="where torch computes; auto: its accelerator where there is one"
    )
    model: Model
    task: Task
    calibration: Calibration = Calibration()
    sparsify: Sparsify
    quantize: Quantize
    adapt: Adapt | None = Field(
        None, description="none: nothing is trained; what was pruned and quantized is exported"
    )
    search: Search = Search()
    export: Export = Export()
    verify: Verify = Verify()
    benchmark: Benchmark = Benchmark()
    gates: Gates = Gates()
    _file: Path = pydantic.PrivateAttr(default=Path())
    _overrides: tuple[str, ...] = pydantic.PrivateAttr(default=())
    _revisions: dict[str, str | None] | None = pydantic.PrivateAttr(default=None)
    _skipped: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    @field_validator("adapt", mode="before")
    @classmethod
    def _untrained(cls, found: Any) -> Any:
        if found is None:  # more likely forgotten than meant
            raise ValueError("is empty; none, or no such section, trains nothing")
        return None if found == "none" else found

    @model_validator(mode="after")
    def _pipeline_fits(self):
        if self.adapt is None:
            return self
        quantized = self.quantize.method != "none"
        if quantized != self.adapt.on_grid:
            raise ValueError(
                f"adapt.pipeline {self.adapt.pipeline} does not go with quantize.method "
                f"{self.quantize.method}: qa-sparsepeft and sqft train on a grid, sparsepeft and "
                "shears on floats"
            )
        return self

    def resolve(self, path: str) -> Path:
        """A path of the recipe as one of this machine."""
        if path.startswith(BUILTIN):
            return Path(__file__).parent.parent / "builtin" / path.removeprefix(BUILTIN)
        return real_path(self._file.parent / path)

    # A view of the recipe holds values of these without the fields that they combine.

    @Combined
    def base_name(self) -> str:
        """Name of the base model in model cards."""
        return self.model.hub or Path(str(self.model.path)).name

    @property
    def lm_eval_folder(self) -> Path | None:
        """Where task files of the recipe's own are."""
        folder = self.benchmark.lm_eval_folder
        return self.resolve(folder) if folder else None

    @property
    def training(self) -> Adapt:
        """The settings of training, for passes that only a recipe with it has."""
        assert self.adapt is not None
        return self.adapt

    @Combined
    def scale_bits(self) -> int:
        """Significant bits of the scales: fewer where GGUF is to have a scale times its zero point
        as float16 too."""
        offsets = not self.quantize.symmetric and "gguf" in self.export.targets
        return OFFSET_BITS if offsets else FLOAT16_BITS

    @Combined
    def unmerged(self) -> bool:
        """There is an adapter, and it stays beside the base."""
        return self.adapt is not None and self.adapt.unmerged

    @Combined
    def dense_update(self) -> bool:
        """Pruned positions are given up to the adapter's update."""
        return self.adapt is not None and self.adapt.merge_dense

    @property
    def calibrates(self) -> bool:
        """Whether any pass looks at calibration data."""
        sparsify = self.sparsify
        return bool(sparsify.calibrates or sparsify.reconstruct or self.quantize.calibrates)

    @Combined
    def set_aside(self) -> int:
        """Training items that are kept for search alone; nothing else sees them."""
        return self.search.items if self.search.evaluates else 0

    @property
    def file(self) -> Path:
        return self._file

    @property
    def revisions(self) -> dict[str, str | None] | None:
        """Dataset on the hub -> commit that this run reads; None before ``pin_revisions``."""
        return self._revisions

    def at_revisions(self, revisions: dict[str, str | None]) -> "Recipe":
        """This recipe, its datasets on the hub read at these commits."""
        pinned = self.model_copy()
        pinned._revisions = revisions
        return pinned

    @property
    def skipped(self) -> dict[str, str]:
        """Targets that were left out because the model cannot have them, and why."""
        return self._skipped

    def without_targets(self, reasons: dict[str, str]) -> "Recipe":
        """The same recipe without some targets.

        :param reasons: target -> why it is left out.
        """
        kept = tuple(name for name in self.export.targets if name not in reasons)
        export = self.export.model_copy(update={"targets": kept})
        recipe = self.model_copy(update={"export": export})
        recipe._skipped = dict(reasons)
        return recipe

    @property
    def overrides(self) -> tuple[str, ...]:
        """Settings that were applied on top of the file."""
        return self._overrides


def matches(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a Linear is meant: by its last name, or by its whole one with wildcards."""
    last = name.rsplit(".", 1)[1]
    return any(fnmatchcase(name, module) or last == module for module in modules)
