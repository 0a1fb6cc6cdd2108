"""The known datasets of ``task.kind: dataset``, as prompts and answers.

A set is read from a local folder or from the Hugging Face hub. Its rows have the hub's columns or
those of LLM-Adapters (``instruction``, ``output``, ``answer``; arXiv 2304.01933). Both become the
same :class:`Record`. Prompts are those of lm-evaluation-harness, which the SQFT authors used for
training and scoring. Instructions (``math_10k``) use the Alpaca or the Phi-3 template.

An answer is right (``scoring``) if:

    exact    the generated text is equal, after the recipe's ``final`` mark if it has one
    mark     the text after ``####`` is equal, without commas and dollar signs (lm-eval's gsm8k)
    number   the last number differs by at most 1e-3 (LLM-Adapters' evaluator)
    choice   the right choice has the highest likelihood (lm-eval's acc; acc_norm is recorded too)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqft_export.data.files import Fields, read_rows
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Dataset

Scoring = Literal["exact", "mark", "number", "choice"]
TEMPLATES = {
    "question": "Question: {question}\nAnswer:",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{question}\n\n### Response:\n",
    "phi3": "<|user|>\n{question} <|end|>\n<|assistant|> ",
}
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Record:
    """One item of a set.

    prompt, answer: texts for training; they are joined without a separator.
    choices: (context, continuation) of every choice; empty if the item has no choices.
    right: index of the right choice.
    final: expected answer for the comparison: a number, or the text after the mark.
    labels: name of every choice in the log of answers.
    """

    prompt: str
    answer: str
    choices: tuple[tuple[str, str], ...] = ()
    right: int = 0
    final: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Set:
    """Where a set is stored and how its rows are read.

    hub: dataset, configuration, and names of its train and test splits; None: only local files.
    read: function of row and template that returns a record.
    files: other names of its local file or folder.
    """

    hub: tuple[str, str | None, str, str] | None
    read: Callable[[Fields, str], Record]
    scoring: Scoring
    files: tuple[str, ...] = ()


def _choice_record(context: str, continuations: list[str], right: int) -> Record:
    """Return a record whose choices are continuations of the same context."""
    pairs = tuple((context, f" {text.strip()}") for text in continuations)
    labels = tuple(text.strip() for text in continuations)
    return Record(*pairs[right], pairs, right, labels[right], labels)


def _split_instruction(row: Fields) -> tuple[str, list[str], int]:
    """Return question, choices and index of the right choice of a row in the LLM-Adapters form."""
    text, _, _ = row["instruction"].partition("Answer format:")
    head, *parts = re.split(r"\s*(?:Answer|Solution|Ending|Option)\d+: ?", text)
    question = re.sub(r"^Please [^:]*: ", "", head)
    if not parts:  # an instruction and an answer without choices (the SQFT repository's ARC-Easy)
        return question.strip(), [row["output"]], 0
    return question.strip(), parts, int(re.sub(r"\D", "", row["answer"])) - 1


def _split_labelled(row: Fields, question: str) -> tuple[str, list[str], int]:
    """Return the same of a row with ``choices`` and ``answerKey``, as in ARC and OpenBookQA."""
    choices = row["choices"]
    return row[question].strip(), choices["text"], choices["label"].index(row["answerKey"])


def _arc(row: Fields, template: str) -> Record:
    question, choices, right = (
        _split_instruction(row) if "instruction" in row else _split_labelled(row, "question")
    )
    return _choice_record(TEMPLATES["question"].format(question=question), choices, right)


def _openbookqa(row: Fields, template: str) -> Record:
    return _choice_record(
        *(
            _split_instruction(row)
            if "instruction" in row
            else _split_labelled(row, "question_stem")
        )
    )


def _piqa(row: Fields, template: str) -> Record:
    question, choices, right = (
        _split_instruction(row)
        if "instruction" in row
        else (row["goal"].strip(), [row["sol1"], row["sol2"]], int(row["label"]))
    )
    return _choice_record(TEMPLATES["question"].format(question=question), choices, right)


def _boolq(row: Fields, template: str) -> Record:
    """Read a yes/no question; rows in the LLM-Adapters form have no passage before it."""
    if "instruction" in row:
        text, _, _ = row["instruction"].partition("Answer format:")
        question, right, passage = text.split("question: ", 1)[1], row["answer"] == "true", None
    else:
        question, right, passage = row["question"], bool(row["answer"]), row.get("passage")
    context = f"Question: {question.strip().rstrip('?')}?\nAnswer:"
    return _choice_record(
        f"{passage}\n{context}" if passage else context, ["no", "yes"], int(right)
    )


def _winogrande(row: Fields, template: str) -> Record:
    """Read a sentence with a gap; choices differ in the context and share the continuation."""
    if "instruction" in row:
        sentence, options, right = _split_instruction(row)
    else:
        sentence, options = row["sentence"], [row["option1"], row["option2"]]
        right = int(row["answer"]) - 1
    before, after = sentence.split("_", 1)
    pairs = tuple((before + option.strip(), f" {after.strip()}") for option in options)
    labels = tuple(option.strip() for option in options)
    return Record(*pairs[right], pairs, right, labels[right], labels)


def _without_brackets(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(row: Fields, template: str) -> Record:
    if "instruction" in row:
        question, endings, right = _split_instruction(row)
    else:
        question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        endings, right = row["endings"], int(row["label"])
    return _choice_record(
        _without_brackets(question), [_without_brackets(e) for e in endings], right
    )


def _math(row: Fields, template: str) -> Record:
    """Read a math problem and its worked answer, in any form of the math sets."""
    if "Body" in row:
        body = row["Body"].strip().rstrip(".")
        question, answer, final = f"{body}. {row['Question']}", "", row["Answer"]
    elif "instruction" in row:
        question, answer, final = row["instruction"], row["output"], row.get("answer", "")
        if row.get("input"):
            question = f"{question}\n{row['input']}"
    elif "result" in row:
        question, answer, final = row["question"], "", row["result"]
    else:
        question, answer = row["question"], row["answer"]
        final = answer.rsplit("####", 1)[-1]
    final = plain_number(str(final))
    answer = answer.strip().removeprefix("A:").strip() or final
    prompt = TEMPLATES[template].format(question=question.strip())
    separator = "" if prompt[-1].isspace() else " "
    return Record(prompt, separator + answer, final=final)


def parse_number(text: str) -> float | None:
    """Return the value of a decimal number or of a fraction such as ``1/2``; else None."""
    found = re.fullmatch(r"(-?\d*\.?\d+)(?:/(\d*\.?\d+))?", text.strip())
    if not found or float(found[2] or 1) == 0:
        return None
    return float(found[1]) / float(found[2] or 1)


# A sign, a dollar sign, digits with commas between groups of three, a fraction, a full stop.
WRITTEN_NUMBER = re.compile(r"(-?)\$?(-?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\.?")


def plain_number(text: str) -> str:
    """Return a number without dollar sign, commas, ``.0`` and full stop; other text unchanged."""
    text = text.strip()
    found = WRITTEN_NUMBER.fullmatch(text)
    if found is None:
        return text
    fraction = (found[4] or "").rstrip("0").removesuffix(".")
    return (found[1] or found[2]) + found[3].replace(",", "") + fraction


SETS = {
    "gsm8k": Set(("openai/gsm8k", "main", "train", "test"), _math, "number"),
    "svamp": Set(("ChilleD/SVAMP", None, "train", "test"), _math, "number"),
    "mawps": Set(("MU-NLPC/Calc-mawps", None, "train", "test"), _math, "number"),
    "math_10k": Set(None, _math, "number", ("math_data",)),
    "arc_easy": Set(
        ("allenai/ai2_arc", "ARC-Easy", "train", "test"), _arc, "choice", ("arce_instruct",)
    ),
    "arc_challenge": Set(("allenai/ai2_arc", "ARC-Challenge", "train", "test"), _arc, "choice"),
    "openbookqa": Set(("allenai/openbookqa", "main", "train", "test"), _openbookqa, "choice"),
    "piqa": Set(("baber/piqa", None, "train", "validation"), _piqa, "choice"),
    "boolq": Set(("google/boolq", None, "train", "validation"), _boolq, "choice"),
    "winogrande": Set(
        ("allenai/winogrande", "winogrande_debiased", "train", "validation"), _winogrande, "choice"
    ),
    "hellaswag": Set(("Rowan/hellaswag", None, "train", "validation"), _hellaswag, "choice"),
}
COMMONSENSE = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
)
# Task -> sets for training and sets for testing, as chosen by the SQFT authors.
MIXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "math_10k": (("math_10k",), ("gsm8k", "svamp", "mawps")),
    "commonsense": (COMMONSENSE, COMMONSENSE),
}


def set_names(task: Dataset, split: str) -> tuple[str, ...]:
    """Return the names of the sets of a split, ``train`` or ``test``."""
    requested = task.train_sets if split == "train" else task.test_sets
    train, test = MIXES.get(task.name, ((task.name,), (task.name,)))
    return requested or (train if split == "train" else test)


def scoring_of(task: Dataset, name: str) -> Scoring:
    """Return how answers to a set are scored: GSM8K by its mark if the task trains on GSM8K."""
    return "mark" if name == task.name == "gsm8k" else SETS[name].scoring


def _same_name(path: Path, name: str) -> bool:
    return path.stem.lower().replace("-", "_") in (name, *SETS[name].files)


def local_file(folder: Path, name: str, split: str) -> Path | None:
    """Return the file of a split: ``<set>/<split>.json`` or ``.jsonl``, or ``<set>.json``."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _same_name(path, name):
            continue
        if path.is_file() and path.suffix in SUFFIXES:
            return path
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            of_split = [p for p in inside if p.stem == split]
            only = [p for p in inside if _same_name(p, name) or p.stem.startswith("arce_train")]
            if of_split or only:
                return (of_split or only)[0]
    return None


def missing_sets(
    task: Dataset, folder: Path | None, splits: tuple[str, ...] = ("train", "test")
) -> Iterator[str]:
    """Yield a message for every unknown set and for every set without a file."""
    if folder is not None and not folder.is_dir():
        yield f"task.folder: no such folder: {folder}"
        return
    for split in splits:
        names = set_names(task, split)
        if unknown := [name for name in names if name not in SETS]:
            yield f"task.{split}_sets: found {', '.join(unknown)}; allowed are {', '.join(SETS)}"
        elif folder is None:
            yield from (
                f"task.folder: is missing; {name} is not on the hub, set the folder of a local copy"
                for name in names
                if SETS[name].hub is None
            )
        elif missing := [name for name in names if local_file(folder, name, split) is None]:
            yield (
                f"task.folder: {folder} has no {split} file of {', '.join(missing)} "
                f"(<set>/{split}.json or .jsonl); list only existing sets in task.{split}_sets"
            )


def hub_datasets(task: Dataset) -> list[str]:
    """Return the datasets on the hub that contain a task's sets; empty for a local folder."""
    names = dict.fromkeys((*set_names(task, "train"), *set_names(task, "test")))
    sources = [SETS[name].hub for name in names] if task.folder is None else []
    return [source[0] for source in sources if source]


def hub_rows(
    name: str, split: str, where: str, revisions: dict[str, str | None] | None = None
) -> list[Fields]:
    """Return the rows of a set on the hub.

    :param revisions: dataset -> commit to read; the newest commit of datasets not listed.
    :raises UserError: if the dataset cannot be read.
    """
    import datasets

    source = SETS[name].hub
    assert source is not None
    dataset, subset, train, test = source
    try:
        found = datasets.load_dataset(
            dataset,
            subset,
            split=train if split == "train" else test,
            revision=(revisions or {}).get(dataset),
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{where}: task: {dataset} can't be read from the hub ({type(error).__name__}); "
            "set task.folder to read a local copy"
        ) from error
    return list(found)


def records(
    task: Dataset,
    split: str,
    folder: Path | None,
    where: str,
    revisions: dict[str, str | None] | None = None,
) -> Iterator[tuple[str, Scoring, Record]]:
    """Yield set, scoring and record of every item of a split, in the order of the sets.

    :param revisions: see :func:`hub_rows`.
    :raises UserError: if a row does not fit its set; the message names the file and the item.
    """
    for name in set_names(task, split):
        file = local_file(folder, name, split) if folder else None
        rows = read_rows(file) if file else hub_rows(name, split, where, revisions)
        for number, row in enumerate(rows, start=1):
            try:
                record = SETS[name].read(row, task.template)
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
                place = f"{file or name}: item {number}"
                raise UserError(f"{place}: not a row of {name}: {error!r}") from error
            number_wanted = split == "test" and scoring_of(task, name) == "number"
            if number_wanted and parse_number(record.final) is None:
                raise UserError(
                    f"{file or name}: item {number}: not a row of {name}: its answer "
                    f"{record.final!r} is not a number"
                )
            if split == "test" and SETS[name].scoring == "choice" and len(record.choices) < 2:
                raise UserError(
                    f"{file or name}: item {number}: has an answer but no other choices; use such "
                    "a file for training, not for testing"
                )
            yield name, scoring_of(task, name), record
