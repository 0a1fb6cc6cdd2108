"""The schema of a recipe: typed, frozen sections, checked as a whole before any pass runs.

Each field is described here once. An error message names the file, the YAML path, the value found
and the allowed values. Paths are relative to the recipe file. ``builtin:tiny`` is the folder of the
embedded model.
"""

import math
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from sqft_export.numerics.codes import FLOAT16_BITS
from sqft_export.recipe.peers import PeerName, grid_targets, peers_of
from sqft_export.recipe.templates import leading_text, template_fault
from sqft_export.untrusted import real_path

BUILTIN = "builtin:"
HUB = "hub:"
GGUF_SCALE_BITS = 7  # significant bits; scale x any 4-bit zero point is then exact in float16
MAX_NAME_BYTES = 255  # limit of common file systems for one name in a path


def _check_name_lengths(path: str) -> str:
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in path.split("/")):
        raise ValueError(f"a name in this path has more than {MAX_NAME_BYTES} bytes")
    return path


FileName = Annotated[str, Field(max_length=4000), AfterValidator(_check_name_lengths)]


class UndeclaredFieldError(Exception):
    """A pass reads a recipe field that it does not declare; see ``recipe/view.py``."""


_Value = TypeVar("_Value")


class Combined(Generic[_Value]):
    """A property that combines fields of several sections.

    A view of the recipe stores its value in ``__dict__``. Python finds it there first, because this
    descriptor has no ``__set__``.
    """

    def __init__(self, compute: "Callable[[Recipe], _Value]"):
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, section: "Recipe | None", owner: type) -> _Value:
        return self if section is None else self.compute(section)  # type: ignore[return-value]


class Section(BaseModel):
    """Base class of every section: frozen, no unknown fields, no infinity or NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, ignored_types=(Combined,)
    )

    if not TYPE_CHECKING:  # mypy would accept any attribute if it saw this method

        def __getattr__(self, name: str) -> object:
            if name in type(self).model_fields:
                place = f"{type(self).__name__}.{name}"
                raise UndeclaredFieldError(f"{place} is read by a pass that does not declare it")
            return super().__getattr__(name)


class Model(Section):
    """The base model: a local Hugging Face folder or a model on the Hugging Face hub."""

    path: FileName | None = Field(None, description="local model folder, or builtin:tiny")
    hub: str | None = Field(
        None, description="name of a model on the hub; the run downloads it if needed"
    )
    revision: str | None = Field(None, description="commit or tag of the model on the hub")
    config: dict[str, object] | None = Field(
        None,
        description="expected fields of config.json; with them, plan works before the download",
    )

    @model_validator(mode="after")
    def _check_source(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        return self


# Prompt template of a dataset -> texts that begin the next item.
DATASET_STOPS = {
    "question": ("Question:",),
    "alpaca": ("### Instruction:",),
    "phi3": ("<|end|>", "<|user|>"),
}
MIN_LABEL_LENGTH = 5  # characters; a shorter label such as "A:" may end a word of an answer
StopTexts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...] | None,
    Field(
        description="texts that end a generated answer, in every row of the report; []: no stop "
        "texts; null: the text that every prompt begins with, such as Question:"
    ),
]


class Problems(Section):
    """Prompts and answers in JSON Lines files, scored by exact match of the generated answer."""

    kind: Literal["problems"] = Field(description="type of the task")
    train: FileName = Field(description="JSON Lines file with the training items")
    test: FileName = Field(
        description="JSON Lines file with the held-out items; only verify and benchmark read it"
    )
    prompt: str = Field(
        "{prompt}", description="template of the prompt; {name} stands for a field of the item"
    )
    answer: str = Field(
        "{answer}", description="template of the expected answer; {name} as in prompt"
    )
    final: str | None = Field(
        None,
        description="mark before the final answer, such as #### in GSM8K; only the text after it "
        "is compared; null: the complete answer is compared",
    )
    stop: StopTexts = None
    max_new_tokens: int = Field(32, ge=1, description="largest number of tokens per answer")
    sequence_length: int = Field(
        256, ge=8, description="tokens per training example; longer examples are cut"
    )

    @field_validator("prompt", "answer")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if fault := template_fault(template):
            raise ValueError(fault)
        return template

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return ``stop``, or the first line that all prompts share.

        A model that continues after its answer writes that line again. A label such as
        ``Question:`` ends an answer anywhere. Other lines may be part of an answer, so they end it
        only at the beginning of a line.
        """
        if self.stop is not None:
            return self.stop
        line = leading_text(self.prompt).strip().split("\n")[0].rstrip()
        if not line:
            return ()
        is_label = line.endswith(":") and len(line) >= MIN_LABEL_LENGTH
        return (line if is_label else f"\n{line}",)


class Dataset(Section):
    """A known dataset, with the prompts and scoring of the SQFT authors and lm-eval."""

    kind: Literal["dataset"] = Field(description="type of the task")
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
    ] = Field(description="dataset, or mix of datasets, to train and test on")
    folder: FileName | None = Field(
        None,
        description="local folder with <set>/train.json and <set>/test.json; null: from the hub",
    )
    train_sets: tuple[str, ...] | None = Field(
        None, description="datasets to train on; null: those that name implies"
    )
    test_sets: tuple[str, ...] | None = Field(
        None, description="datasets to test on; null: those that name implies"
    )
    template: Literal["question", "alpaca", "phi3"] = Field(
        "question", description="prompt template of math problems and instructions"
    )
    stop: StopTexts = None
    max_new_tokens: int = Field(
        256, ge=1, description="largest number of tokens per generated answer"
    )
    sequence_length: int = Field(
        512, ge=8, description="tokens per training example; longer examples are cut"
    )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return ``stop``, or the texts that begin every prompt of the template."""
        return DATASET_STOPS[self.template] if self.stop is None else self.stop


DATASET_NAMES: tuple[str, ...] = get_args(Dataset.model_fields["name"].annotation)


class Text(Section):
    """A plain text file, scored by perplexity and by the share of correctly predicted tokens."""

    kind: Literal["text"] = Field(description="type of the task")
    text: FileName = Field(description="text file in UTF-8; its last part is held out")
    test_share: float = Field(
        0.1, gt=0, lt=1, description="fraction of the text, at its end, that is held out"
    )
    sequence_length: int = Field(256, ge=8, description="tokens per training and test window")


ScoreName = Literal[
    "exact", "normalized", "contains", "regex", "json", "json_f1", "rouge_l", "bleu", "file"
]
CHAT_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "output", "answer"),
    *("input", "system", "tools"),
)


class Chat(Section):
    """Conversations, rendered by the model's chat template; the loss is on assistant turns."""

    kind: Literal["chat"] = Field(description="type of the task")
    train: FileName = Field(
        description="training conversations: a jsonl, json, csv, tsv or parquet file, a "
        "save_to_disk folder, or hub:<name>"
    )
    test: FileName | None = Field(
        None, description="held-out conversations, a source like train; null: test_share of train"
    )
    test_share: float = Field(
        0.1, gt=0, lt=1, description="fraction of the rows of train that is held out, evenly spread"
    )
    split: str = Field("train", description="split of train, if the source has several")
    test_split: str = Field("test", description="split of test, if the source has several")
    subset: str | None = Field(None, description="configuration of a dataset on the hub")
    revision: str | None = Field(None, description="commit or tag of a dataset on the hub")
    columns: dict[str, str] = Field({}, description="name of a column here: its name in the data")
    template: str | None = Field(
        None,
        description="name of one of the tokenizer's chat templates, or the text of a template; "
        "null: the tokenizer's default",
    )
    template_arguments: dict[str, object] = Field(
        {}, description="variables that the template reads, such as enable_thinking"
    )
    loss_on: Literal["assistant"] = Field(
        "assistant", description="turns that enter the loss; adapt.loss_on has no effect"
    )
    packing: bool = Field(
        False,
        description="true: train on rows of several whole conversations, without attention "
        "between them; less padding",
    )
    score: ScoreName = Field("exact", description="how a generated answer is scored, from 0 to 1")
    pattern: str | None = Field(None, description="regular expression of score regex")
    score_file: FileName | None = Field(
        None, description="Python file with score(expected, generated) of score file"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="texts at which a generated answer ends, besides the end-of-turn tokens"
    )
    max_new_tokens: int = Field(256, ge=1, description="largest number of tokens per answer")
    sequence_length: int = Field(
        1024, ge=8, description="tokens per training example; longer ones lose their first turns"
    )

    @model_validator(mode="after")
    def _check_fields(self):
        if self.test is not None and "test_share" in self.model_fields_set:
            raise ValueError("give either test or test_share")
        if (self.score_file is not None) != (self.score == "file"):
            raise ValueError("score_file and score: file go together")
        if self.pattern is not None and self.score != "regex":
            raise ValueError(f"pattern is for score regex, found {self.score}")
        if unknown := sorted(set(self.columns) - set(CHAT_COLUMNS)):
            raise ValueError(
                f"columns: found {', '.join(unknown)}; allowed are {', '.join(CHAT_COLUMNS)}"
            )
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return ``stop``."""
        return self.stop

    def source(self, split: str) -> str:
        """Return the source of a split."""
        return self.train if split == "train" or self.test is None else self.test


Task = Annotated[Problems | Dataset | Text | Chat, Field(discriminator="kind")]
TASK_KINDS: dict[str, type[Section]] = {
    "problems": Problems,
    "dataset": Dataset,
    "text": Text,
    "chat": Chat,
}


class Calibration(Section):
    """The samples that pruning and quantization read; lengths may differ, no padding."""

    source: FileName = Field(
        "task",
        description="task: the training split; or a .txt or .jsonl file; or a local folder that "
        "the datasets library reads; or hub:<dataset> on the Hugging Face hub",
    )
    subset: str | None = Field(
        None, description="configuration of the dataset, such as wikitext-2-raw-v1 of wikitext"
    )
    split: str = Field("train", description="split of the dataset")
    revision: str | None = Field(None, description="commit or tag of the dataset on the hub")
    field: str = Field(
        "text", description="field of a JSON object or dataset row that contains the text"
    )
    samples: int = Field(128, ge=1, description="number of samples")
    sequence_length: int = Field(
        512, ge=8, description="largest number of tokens per sample; longer samples are cut"
    )


class Amount(Section):
    """How many weights are pruned."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="fraction of the weights that is pruned, in each row"
    )
    pattern: str | None = Field(
        None,
        pattern=r"^\d+:\d+$",
        description='N:M sparsity, such as "2:4": N weights of every M consecutive columns are '
        "kept",
    )

    at_most: tuple[int, int] | None = Field(
        None,
        description="limit in addition to sparsity: [N, M] keeps at most N weights of every M "
        "consecutive columns, such as [32, 64]; it costs almost no accuracy and bounds the bytes "
        "that a sparse kernel reads",
    )

    def n_of_m(self) -> tuple[int, int] | None:
        """Return N and M of ``pattern``; None without a pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    def check_pattern(self) -> None:
        """Check ``pattern`` and ``at_most``.

        :raises ValueError: if they prune nothing, prune everything or contradict ``sparsity``.
        """
        found = self.n_of_m()
        if found and not 0 < found[0] < found[1]:
            raise ValueError(f"pattern {self.pattern} must keep at least 1 of M and prune 1")
        if self.at_most is None:
            return
        if self.sparsity is None:
            raise ValueError("at_most needs sparsity; pattern needs no at_most")
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
    """A different amount for some Linears."""

    modules: tuple[str, ...] = Field(
        min_length=1,
        description="Linears, by last name (down_proj) or by full name with wildcards "
        "(model.layers.0.*)",
    )
    skip: bool = Field(False, description="true: do not prune these Linears")

    @model_validator(mode="after")
    def _check_amount(self):
        if sum([self.skip, self.sparsity is not None, self.pattern is not None]) != 1:
            raise ValueError("give one of skip, sparsity and pattern")
        self.check_pattern()
        return self


class Reconstruct(Section):
    """Training of the kept weights, block by block, to match the output of the dense block."""

    steps: int = Field(60, ge=1, description="optimizer steps per block")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="initial learning rate; it decays to 0 (cosine); null: 0.01 times the root "
        "mean square of each row's weights",
    )
    batch: int = Field(4, ge=1, description="calibration samples per step")


class Sparsify(Amount):
    """How the weights of the decoder's Linears are pruned."""

    method: Literal["wanda", "sparsegpt", "magnitude", "existing", "none"] = Field(
        "wanda",
        description="pruning method; existing: the model is already sparse and its zeros are the "
        "mask; none: no pruning",
    )
    reconstruct: Reconstruct | None = Field(
        None,
        description="train the kept weights, block by block, before quantization; {}: with the "
        "defaults; null: no such training",
    )
    overrides: tuple[Override, ...] = Field(
        (), description="different amounts for some Linears; the first match applies"
    )
    allocation: Literal["uniform", "output-error"] = Field(
        "uniform",
        description="uniform: the same sparsity for all Linears; output-error: the sparsity of "
        "Linears without an override varies by up to 0.15, to minimize the sum of their relative "
        "output errors at the same overall sparsity",
    )

    @model_validator(mode="after")
    def _check_amounts(self):
        if self.method in ("none", "existing"):
            amounts = self.sparsity is not None or self.pattern or self.at_most
            if amounts or self.overrides or self.allocated:
                raise ValueError(
                    f"method {self.method} takes no amounts; leave out sparsity, pattern, at_most, "
                    "overrides and allocation"
                )
            if self.reconstruct:
                raise ValueError(
                    f"reconstruct: method {self.method} prunes nothing, so there is no dense block "
                    "to match; it goes with wanda, sparsegpt and magnitude"
                )
        elif (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        elif self.allocated and self.pattern:
            raise ValueError("allocation output-error goes with sparsity, not with pattern")
        self.check_pattern()
        return self

    @property
    def allocated(self) -> bool:
        """Return whether the sparsity differs between Linears."""
        return self.allocation == "output-error"

    @property
    def calibrates(self) -> bool:
        """Return whether pruning reads calibration data."""
        return self.method in ("wanda", "sparsegpt") or self.allocated


class Nncf(Section):
    """How NNCF finds codes and grid: settings of its weight compression, applied per block."""

    awq: bool = Field(
        True, description="true: rescale weights by activation statistics first (AWQ)"
    )
    scale_estimation: bool = Field(
        True, description="true: choose the scales that minimize the output error"
    )
    gptq: bool = Field(False, description="true: correct rounding errors with NNCF's GPTQ")
    int4_ratio: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of each block's weights in INT4; the others, the most sensitive "
        "ones, are INT8 per channel",
    )
    sensitivity: Literal[
        "weight_quantization_error",
        "hessian_input_activation",
        "mean_activation_variance",
        "max_activation_variance",
        "mean_activation_magnitude",
    ] = Field(
        "hessian_input_activation",
        description="measure that ranks the layers, if int4_ratio is below 1",
    )


class Quantize(Section):
    """How the weights of the decoder's Linears become integer codes."""

    method: Literal["gptq", "rtn", "nncf", "existing", "none"] = Field(
        "gptq",
        description="quantization method; existing: the model is a GPTQ checkpoint and its codes "
        "and grid are used; none: no quantization",
    )
    bits: Literal[2, 3, 4, 8] = Field(
        4,
        description="bits per code; 2 and 3 bits use four and eight levels of the 4-bit codes that "
        "runtimes read; export.entropy makes a packed file almost as small as 2 or 3 bits",
    )
    group_size: Literal[16, 32, 64, 128] | None = Field(
        64, description="consecutive inputs that share a scale; null: one scale per channel"
    )
    symmetric: bool = Field(
        True, description="true: the zero point is the middle code; false: one per group"
    )
    group_size_fallback: Literal["allow", "error"] = Field(
        "allow",
        description="if group_size does not divide the inputs of a layer; allow: use the largest "
        "smaller power of two, from 16, that divides them, or else one scale per channel; error: "
        "refuse the recipe",
    )
    damping: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="GPTQ adds this fraction of the mean diagonal of the Hessian to the diagonal",
    )
    embedding_bits: Literal[8] | None = Field(
        None,
        description="8: embedding and output head in INT8, one scale per row; null: in the "
        "precision of the checkpoint",
    )
    nncf: Nncf = Nncf()
    reconstruct: Reconstruct | None = Field(
        None,
        description="train kept weights and scales, block by block, with rounding in the forward "
        "pass; {}: with the defaults; null: no such training",
    )

    @model_validator(mode="after")
    def _check_method(self):
        if self.method != "nncf" and self.nncf != Nncf():
            raise ValueError(f"nncf: settings for method nncf, but method is {self.method}")
        if self.method == "nncf" and self.bits < 4:
            raise ValueError(f"bits: found {self.bits}; NNCF has 4 and 8")
        if self.method == "nncf" and self.bits == 8 and self.group_size is not None:
            raise ValueError("NNCF's INT8 is per channel: set group_size: null")
        if self.method in ("none", "existing") and self.embedding_bits:
            raise ValueError(f"embedding_bits: method {self.method} quantizes nothing")
        if self.method in ("none", "existing") and self.reconstruct:
            raise ValueError(
                f"reconstruct: method {self.method} rounds nothing; it goes with gptq, rtn and nncf"
            )
        return self

    @property
    def calibrates(self) -> bool:
        """Return whether quantization reads calibration data."""
        return self.method in ("gptq", "nncf") or self.reconstruct is not None


class Distill(Section):
    """Distillation: the student also learns the next-token distribution of a teacher."""

    teacher: Literal["dense", "dense-lora"] = Field(
        "dense",
        description="dense: the base model; dense-lora: the base model with LoRA trained on the "
        "task",
    )
    weight: float = Field(
        0.5,
        gt=0,
        le=1,
        description="weight of the KL divergence from the teacher; the task loss has the weight "
        "1 - weight",
    )
    temperature: float = Field(
        1.0, gt=0, description="temperature of both distributions; a higher one smooths them"
    )
    layers: float = Field(
        0.0,
        ge=0,
        description="weight of an additional loss: the squared error of block outputs divided by "
        "the teacher's squared outputs, averaged over blocks; 0: none",
    )


class Stop(Section):
    """Stop training before its last step, once the loss on held-out training examples is flat."""

    items: int = Field(
        64,
        ge=1,
        description="training examples held out for this rule, at most a quarter of them; the "
        "training does not use them",
    )
    every: int = Field(50, ge=1, description="steps between two measurements of the held-out loss")
    patience: int = Field(
        3, ge=1, description="measurements without an improvement after which the training stops"
    )
    improvement: float = Field(
        0.005, ge=0, lt=1, description="smallest fraction by which a loss has to fall to count"
    )


class Adapt(Section):
    """Elastic sparse LoRA; the defaults are those of the paper (arXiv 2410.03750)."""

    pipeline: Literal["shears", "sparsepeft", "sqft", "qa-sparsepeft"] = Field(
        "qa-sparsepeft",
        description="sparsepeft: masked adapter, merges into sparse floats; qa-sparsepeft: masked "
        "adapter trained with rounding in the forward pass, merges into sparse codes; shears: "
        "plain adapter on sparse floats, unmerged; sqft: plain adapter on sparse codes, unmerged",
    )
    merge_dense: bool = Field(
        False,
        description="shears: true merges the adapter anyway; the result is no longer sparse",
    )
    elastic: bool = Field(
        True,
        description="true: each training step draws a rank for every elastic group; false: always "
        "the highest rank",
    )
    trainable_scales: bool = Field(
        False, description="qa-sparsepeft: true trains the scales of the grid as well"
    )
    scale_learning_rate: float = Field(
        0.1,
        gt=0,
        description="learning rate of trainable scales, as a fraction of learning_rate; their "
        "steps are relative to the scale",
    )
    distill: Distill | None = Field(
        None, description="distillation from a teacher; {}: with the defaults; null: none"
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        description="last names of the Linears that get an adapter; null: those of the model "
        "family",
    )
    ranks: tuple[int, ...] = Field(
        (32, 28, 24, 20, 16),
        min_length=1,
        description="ranks that an elastic group can have; the highest is the adapter's size",
    )
    elastic_groups: tuple[tuple[str, ...], ...] | None = Field(
        None,
        description="groups of modules that share one rank in each block; other target modules "
        "always have the highest rank; null: those of the model family",
    )
    alpha: float = Field(
        64, gt=0, description="LoRA alpha; the update is multiplied by alpha / highest rank"
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout probability, on the inputs of the adapter only",
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate, after the warmup")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate changes after the warmup"
    )
    warmup_steps: int = Field(
        100, ge=0, description="first steps, in which the learning rate rises from 0"
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the training data; give either epochs or steps"
    )
    steps: int | None = Field(
        None, ge=1, description="optimizer steps; give either epochs or steps"
    )
    stop: Stop | None = Field(
        None,
        description="stop earlier, once the loss on held-out examples is flat, and keep the best "
        "adapter; steps or epochs are then the upper bound; {}: with the defaults; null: train to "
        "the end",
    )
    batch: int = Field(16, ge=1, description="training examples per batch and process")
    accumulation: int = Field(
        1, ge=1, description="batches per optimizer step (gradient accumulation)"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    loss_on: Literal["answer", "all"] = Field(
        "all", description="tokens that enter the loss: those of the answer, or all"
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="precision of activations; auto: bfloat16 if its matrix products are faster "
        "on this device",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="true: recompute activations in the backward pass; slower, less memory",
    )
    save_steps: int = Field(
        100,
        ge=1,
        description="steps between checkpoints; an interrupted training resumes from the last one",
    )

    @model_validator(mode="after")
    def _check_settings(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks must be positive and different, found {list(self.ranks)}")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError("target_modules is empty; leave it out to use those of the family")
        elastic = [name for group in self.elastic_groups or () for name in group]
        if unknown := sorted(set(elastic) - set(self.target_modules or elastic)):
            raise ValueError(f"elastic_groups name {unknown}, which are not in target_modules")
        if len(set(elastic)) < len(elastic):
            raise ValueError("a module is listed twice in elastic_groups")
        if self.merge_dense and self.pipeline != "shears":
            raise ValueError(f"merge_dense is for shears, found {self.pipeline}")
        if self.trainable_scales and self.pipeline != "qa-sparsepeft":
            raise ValueError(f"trainable_scales is for qa-sparsepeft, found {self.pipeline}")
        return self

    @property
    def on_grid(self) -> bool:
        """Return whether the base is quantized."""
        return self.pipeline in ("sqft", "qa-sparsepeft")

    @property
    def masked(self) -> bool:
        """Return whether the pruning mask is applied to the update."""
        return self.pipeline in ("sparsepeft", "qa-sparsepeft")

    @property
    def unmerged(self) -> bool:
        """Return whether the adapter stays separate from the base weights."""
        return self.pipeline == "sqft" or (self.pipeline == "shears" and not self.merge_dense)

    @property
    def max_rank(self) -> int:
        """Return the highest rank, which is the size of the adapter's matrices."""
        return max(self.ranks)

    def total_steps(self, examples: int, processes: int = 1) -> int:
        """Return the number of optimizer steps, counted as the Trainer of transformers does.

        :param processes: training processes; each one reads different batches.
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batches = math.ceil(examples / (self.batch * processes))
        return math.ceil(math.ceil(batches / self.accumulation) * self.epochs)


class Search(Section):
    """How the rank of every elastic group is chosen, on items held out from the training data."""

    strategy: Literal[
        "median",
        "maximal",
        "minimal",
        "configured",
        "frequent",
        "lowest-loss",
        "hill-climb",
        "evolutionary",
    ] = Field(
        "median",
        description="median, maximal, minimal: the same rank for all groups; configured: read "
        "configuration; frequent: the ranks drawn most often in training; lowest-loss, hill-climb, "
        "evolutionary: evaluate configurations and take the best",
    )
    budget: int = Field(
        20,
        ge=1,
        description="largest number of evaluations, for strategies that evaluate configurations",
    )
    items: int = Field(
        64,
        ge=1,
        description="training items held out to score the configurations; training does not use "
        "them",
    )
    configuration: FileName | None = Field(
        None, description="strategy configured: configuration.json of an earlier search"
    )

    @model_validator(mode="after")
    def _check_configuration(self):
        if (self.configuration is not None) != (self.strategy == "configured"):
            raise ValueError("configuration and strategy configured go together")
        return self

    @property
    def evaluates(self) -> bool:
        """Return whether the strategy evaluates configurations."""
        return self.strategy in ("lowest-loss", "hill-climb", "evolutionary")


OnnxGraph = Literal["auto", "fused", "standard"]


class Export(Section):
    """Which deployments are written."""

    targets: tuple[Literal["openvino", "onnx", "gguf", "web"], ...] = Field(
        ("openvino", "onnx"),
        description="runtimes to write a deployment for; gguf is for llama.cpp, web is a page for "
        "browsers",
    )
    onnx_graph: OnnxGraph = Field(
        "auto",
        description="fused: the operators of ONNX Runtime GenAI; standard: ONNX operators and "
        "MatMulNBits, which onnx.checker and OpenVINO can read; auto: fused if GenAI's builder "
        "supports the model",
    )
    gguf_head: Literal["auto", "float", "q8_0"] = Field(
        "auto",
        description="output head of GGUF files, if quantize leaves it float: float: as in the "
        "model; q8_0: rounded to 8 bits, which llama.cpp multiplies faster; auto: q8_0 where the "
        "KL divergence that it adds is below 0.001 nats at every token of the self-test",
    )
    on_unsupported: Literal["skip", "error"] = Field(
        "skip",
        description="a target that the model cannot have: skip it where another target works, with "
        "a notice and a line in the report; or refuse the recipe",
    )
    sparse_files: bool = Field(
        False,
        description="true: also write a packed copy of every deployment, which stores no zeros",
    )
    entropy: bool = Field(
        False, description="true: compress the packed copies too; smaller, but slower to load"
    )

    sparse_execution: bool = Field(
        False,
        description="true: also write an OpenVINO folder that computes directly from mask and kept "
        "codes with this package's kernels; load it with sqft_export.openvino_extension()",
    )

    @property
    def measured(self) -> tuple[str, ...]:
        """Return the targets whose deployments the benchmark runs; a page runs in a browser."""
        return tuple(name for name in self.targets if name != "web")

    @model_validator(mode="after")
    def _check_entropy(self):
        if self.entropy and not self.sparse_files:
            raise ValueError("entropy is for packed copies; set sparse_files: true")
        return self


class Verify(Section):
    """How deployments are compared with the model that was trained."""

    prompts: int = Field(
        32, ge=1, description="number of test prompts; their greedy tokens must be equal"
    )
    new_tokens: int = Field(16, ge=1, description="greedy tokens generated per prompt")
    tolerance: float = Field(
        1e-4,
        gt=0,
        description="largest allowed logit difference, in standard deviations of the logits",
    )
    divergence: float = Field(
        0.1,
        gt=0,
        description="largest allowed mean KL divergence of a runtime in its default precision, in "
        "nats per token",
    )
    tokenizers: Literal["auto", "required", "reported"] = Field(
        "auto",
        description="required: a runtime's tokenizer must give the token ids of the training; "
        "reported: differences are only reported; auto: reported for a runtime whose tokenizer "
        "already differs in plan, required for the others",
    )


class Benchmark(Section):
    """Which rows are measured, on which devices and for how long."""

    items: int = Field(400, ge=1, description="test items per dataset; every row scores the same")
    minutes: float | None = Field(
        None,
        gt=0,
        description="time limit instead of items: all rows score the same number of items per "
        "dataset, at least 8, as many as fit into this time",
    )
    baselines: tuple[
        Literal["dense", "dense-lora", "sparse", "sparse-quantized", "adapted", "merged"]
        | PeerName,
        ...,
    ] = Field(
        ("dense", "dense-lora", "sparse", "sparse-quantized", "adapted", "merged"),
        description="models that are measured next to the deployments. Names with lora-then are "
        "the dense base with LoRA, merged and quantized afterwards, in their runtime: by our GPTQ "
        "on the recipe's grid (int4), by llama.cpp with an importance matrix, or by NNCF. Files of "
        "a runtime that is no target are left out. Without this field, a recipe that trains also "
        "has lora-then-int4, and lora-then-q4_k_m or lora-then-nncf",
    )
    targets: tuple[Literal["auto", "cpu", "gpu", "npu", "vulkan", "cuda", "webgpu"], ...] = Field(
        ("cpu",),
        min_length=1,
        description="devices to measure deployments on; auto: all devices of this machine",
    )
    prompt_tokens: int = Field(32, ge=1, description="prompt tokens of the latency measurement")
    new_tokens: int = Field(
        32, ge=2, description="tokens generated per run of the latency measurement"
    )
    repeats: int = Field(5, ge=2, description="runs of the latency measurement per process")
    rounds: int = Field(
        3, ge=1, description="processes per row; the processes of different rows are interleaved"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads; null: one per available processor"
    )
    lm_eval: tuple[str, ...] = Field(
        (),
        description="lm-eval tasks to score on every row as well; needs the extra lm-eval",
    )
    lm_eval_folder: FileName | None = Field(
        None, description="folder with additional lm-eval task files"
    )

    @model_validator(mode="after")
    def _check_limit(self):
        if self.minutes is not None and "items" in self.model_fields_set:
            raise ValueError("give either items or minutes")
        return self


class Gates(Section):
    """Limits on the quality lost on held-out data; a run that exceeds one stops.

    ``docs/reference/reliability.md`` lists the defaults that only warn.
    """

    kl: float | None = Field(
        None,
        gt=0,
        description="largest allowed KL divergence of a pass from the pass before it, in nats per "
        "token; a pass that trains stops the run only if its perplexity rose too; null: only a "
        "warning, above 1",
    )
    accuracy_drop: float | None = Field(
        None,
        ge=0,
        le=100,
        description="largest allowed accuracy loss of the merged model or a deployment, in points "
        "below the dense base; null: only a warning, above 5 points if a paired test finds the "
        "difference significant",
    )


# Names of transformers' ``report_to``, which are the names of the packages too.
Logger = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Recipe(Section):
    """A complete recipe: model, data, and the settings of every pass."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="name of the run: letters, digits, dot, underscore and hyphen",
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="seed of every random choice; the same seed repeats the run"
    )
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = Field(
        "auto", description="device for torch; auto: the accelerator if there is one"
    )
    model: Model
    task: Task
    calibration: Calibration = Calibration()
    sparsify: Sparsify
    quantize: Quantize
    adapt: Adapt | None = Field(
        None,
        description="settings of the training; none: no training, the pruned and quantized model "
        "is exported",
    )
    search: Search = Search()
    export: Export = Export()
    verify: Verify = Verify()
    benchmark: Benchmark = Benchmark()
    gates: Gates = Gates()
    log: tuple[Logger, ...] = Field(
        (),
        description="loggers that get the figures of every pass and training step: tensorboard, "
        "wandb, mlflow, trackio; changes no result",
    )
    _file: Path = pydantic.PrivateAttr(default=Path())
    _overrides: tuple[str, ...] = pydantic.PrivateAttr(default=())
    _revisions: dict[str, str | None] | None = pydantic.PrivateAttr(default=None)
    _skipped: dict[str, str] = pydantic.PrivateAttr(default_factory=dict)

    @field_validator("adapt", mode="before")
    @classmethod
    def _parse_none(cls, found: object) -> object:
        if found is None:  # an empty section is more likely forgotten than intended
            raise ValueError("is empty; none, or no such section, trains nothing")
        return None if found == "none" else found

    @model_validator(mode="after")
    def _check_pipeline(self):
        if self.adapt is None:
            return self
        quantized = self.quantize.method != "none"
        if quantized != self.adapt.on_grid:
            raise ValueError(
                f"adapt.pipeline {self.adapt.pipeline} does not go with quantize.method "
                f"{self.quantize.method}: qa-sparsepeft and sqft need a quantized base, sparsepeft "
                "and shears need quantize.method: none"
            )
        return self

    def resolve(self, path: str) -> Path:
        """Return the absolute path of a file that the recipe names."""
        if path.startswith(BUILTIN):
            return Path(__file__).parent.parent / "builtin" / path.removeprefix(BUILTIN)
        return real_path(self._file.parent / path)

    # A view of the recipe can hold the value of a Combined without the fields that it combines.

    @Combined
    def base_name(self) -> str:
        """Return the name of the base model for model cards."""
        return self.model.hub or Path(str(self.model.path)).name

    @property
    def lm_eval_folder(self) -> Path | None:
        """Return the folder with the recipe's lm-eval task files."""
        folder = self.benchmark.lm_eval_folder
        return self.resolve(folder) if folder else None

    @property
    def training(self) -> Adapt:
        """Return the settings of training, in passes that run only if the recipe trains."""
        assert self.adapt is not None
        return self.adapt

    @Combined
    def scale_bits(self) -> int:
        """Return the significant bits of a scale.

        GGUF also stores scale x zero point of an asymmetric grid in float16. That product is exact
        only if scales have fewer bits.
        """
        offsets = not self.quantize.symmetric and "gguf" in self.export.targets
        return GGUF_SCALE_BITS if offsets else FLOAT16_BITS

    @Combined
    def peers(self) -> tuple[str, ...]:
        """Return the baselines that are quantized after training."""
        return peers_of(self)

    @Combined
    def grid_targets(self) -> tuple[str, ...]:
        """Return the runtimes that the baseline ``lora-then-int4`` is exported to."""
        return grid_targets(self)

    @Combined
    def unmerged(self) -> bool:
        """Return whether there is an adapter that stays separate from the base weights."""
        return self.adapt is not None and self.adapt.unmerged

    @Combined
    def dense_update(self) -> bool:
        """Return whether merging fills pruned positions with the adapter's update."""
        return self.adapt is not None and self.adapt.merge_dense

    @property
    def calibrates(self) -> bool:
        """Return whether any pass reads calibration data."""
        sparsify = self.sparsify
        return bool(sparsify.calibrates or sparsify.reconstruct or self.quantize.calibrates)

    @Combined
    def set_aside(self) -> int:
        """Return the number of training items that only search reads."""
        return self.search.items if self.search.evaluates else 0

    @Combined
    def splits_train(self) -> bool:
        """Return whether the test split is a share of the rows of ``task.train``."""
        return isinstance(self.task, Chat) and self.task.test is None

    @property
    def file(self) -> Path:
        """Return the path of the recipe file."""
        return self._file

    @property
    def revisions(self) -> dict[str, str | None] | None:
        """Return hub dataset -> commit that this run reads; None before ``pin_revisions``."""
        return self._revisions

    def at_revisions(self, revisions: dict[str, str | None]) -> "Recipe":
        """Return a copy of this recipe that reads datasets on the hub at these commits."""
        pinned = self.model_copy()
        pinned._revisions = revisions
        return pinned

    @property
    def skipped(self) -> dict[str, str]:
        """Return target -> why the model cannot have it, for all targets that were left out."""
        return self._skipped

    def without_targets(self, reasons: dict[str, str]) -> "Recipe":
        """Return a copy of this recipe without some targets.

        :param reasons: target -> why it is left out.
        """
        kept = tuple(name for name in self.export.targets if name not in reasons)
        export = self.export.model_copy(update={"targets": kept})
        recipe = self.model_copy(update={"export": export})
        recipe._skipped = dict(reasons)
        return recipe

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return the settings that were applied on top of the file, without the loggers."""
        return tuple(one for one in self._overrides if not one.startswith("log="))


def matches(name: str, modules: tuple[str, ...]) -> bool:
    """Return whether ``modules`` contains a Linear's last name or a wildcard for its full name."""
    last = name.rsplit(".", 1)[1]
    return any(fnmatchcase(name, module) or last == module for module in modules)
