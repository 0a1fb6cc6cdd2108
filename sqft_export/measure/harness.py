"""Run tasks of lm-eval on any target: an lm-eval model on top of a ``targets.Session``.

Needs the extra ``lm-eval``, which computes the scores. A deployment's answers come from its own
runtime in the default mode.

    from sqft_export.measure.harness import SessionLM
    lm_eval.simple_evaluate(model=SessionLM(folder), tasks=["hellaswag"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sqft_export.data.items import load_tokenizer, stop_ids
from sqft_export.data.stops import cut_at_stop, stop_pieces
from sqft_export.errors import UserError
from sqft_export.machine.processes import ALONE, Processes
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.measure.results import TaskMetrics
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session, target
from sqft_export.targets.folder import context_of, kind_of

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_CONTEXT = 2048  # tokens, if no config of the model states its context
DEFAULT_NEW_TOKENS = 256  # of an answer, if the task does not set max_gen_toks


class SessionLM(TemplateLM):
    """A deployment, or a Hugging Face folder, as lm-eval's model.

    :param folder: OpenVINO, ONNX or Hugging Face folder.
    :param threads: CPU threads; None: the runtime's choice.
    :param device: cpu, gpu or npu.
    :param session: an open session of the folder; None: open one.
    :param processes: processes that split the batches; each has the model and the same tasks, and
        gets all results.

    ``warnings`` lists tasks whose prompts or answers did not fit into the context.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        device: str = "cpu",
        session: Session | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__()
        self.folder = Path(folder)
        if session is None:
            kind = kind_of(self.folder)
            session = target(kind).open_session(self.folder, False, threads, device)
        self.session, self.processes = session, processes
        self.tokenizer = load_tokenizer(self.folder)
        self.stop = stop_ids(self.folder, self.tokenizer)
        self.max_length = context_of(self.folder) or DEFAULT_CONTEXT
        self.warnings: list[str] = []

    @property
    def eot_token_id(self) -> int:
        """The first id that ends an answer."""
        return self.stop[0]

    @property
    def prefix_token_id(self) -> int:
        """The first id of a text without context: the start token, else ``eot_token_id``."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches requests."""
        return self.folder.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Return the ids of a text; do not add a start token if the text begins with one."""
        has_start = self.tokenizer.bos_token is not None and string.startswith(
            self.tokenizer.bos_token
        )
        add_special = not has_start if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=add_special)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        targets = [target for _, _, target in requests]
        # Long prompts are cut at their beginning, as lm-eval's own models do.
        prompts = [
            (prompt + target)[-self.max_length - 1 :][: -len(target)]
            for _, prompt, target in requests
        ]
        found = log_likelihoods(self.session, prompts, targets, self.processes)
        return [
            (total, first == len(target))
            for (total, first), target in zip(found, targets, strict=True)
        ]

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of every text, summed over windows of the context length."""
        totals = []
        for request in requests:
            # The prefix token comes before the tokenizer's start token, as in lm-eval's `hf` model.
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows = [(None, *make_disjoint_window(part)) for part in parts]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(windows)))
        return totals

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answer to every request.

        :raises UserError: if a task requests sampling.
        """
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            options = request.args[1]
            if options.get("do_sample") or options.get("temperature", 0) > 0:
                raise UserError(
                    "lm-eval: the task requests sampled answers (do_sample or temperature); "
                    "only greedy decoding is supported"
                )
            limit = options.get("max_gen_toks", DEFAULT_NEW_TOKENS)
            groups.setdefault((limit, _until_texts(options)), []).append(index)
        for (limit, until), indices in groups.items():
            stops = Stops(self.stop, until, self._pieces(until), self.max_length)
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            fitting, new_tokens = self._fit(prompts, limit)
            found = generate(self.session, fitting, new_tokens, stops, self.processes)
            for index, ids in zip(indices, found, strict=True):
                answers[index] = self._answer(ids, until)
        return answers

    def _fit(self, prompts: list[list[int]], limit: int) -> tuple[list[list[int]], int]:
        """Return prompts cut to fit into the context with their answers, and the longest answer.

        If prompt and answer do not fit, the answer may take up to half of the context. The prompt
        is then cut at its beginning, as lm-eval's own models do.

        :param limit: largest number of tokens of an answer.
        """
        half = self.max_length // 2
        answers = [min(limit, max(self.max_length - len(prompt), half)) for prompt in prompts]
        fitting = [p[-(self.max_length - n) :] for p, n in zip(prompts, answers, strict=True)]
        short = sum(n < limit for n in answers)
        cut = sum(len(one) < len(whole) for one, whole in zip(fitting, prompts, strict=True))
        if short or cut:
            self.warnings.append(
                f"lm-eval: max_gen_toks {limit} and prompts of up to {max(map(len, prompts))} "
                f"tokens do not fit into the context of {self.max_length}; {cut} of {len(prompts)} "
                f"prompts were cut at their beginning, and {short} answers are limited to fewer "
                f"tokens ({min(answers)} or more)"
            )
        return fitting, max(answers)

    def _pieces(self, until: tuple[str, ...]) -> dict[int, str]:
        return {int(token): text for token, text in stop_pieces(self.tokenizer, until).items()}

    def _answer(self, ids: list[int], until: tuple[str, ...]) -> str:
        """Return the text before the first ``until``, without special tokens.

        An ``until`` may itself be a special token.
        """
        added = self.tokenizer.get_added_vocab()
        ends = [ids.index(added[text]) for text in until if added.get(text) in ids]
        kept = ids[: min(ends, default=len(ids))]
        text = self.tokenizer.decode(
            kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cut_at_stop(text, until)


def _until_texts(options: Mapping[str, str | list[str]]) -> tuple[str, ...]:
    found = options.get("until") or []
    return tuple(text for text in ([found] if isinstance(found, str) else found) if text)


def _tasks(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """Return a task manager of the folder's tasks, and of lm-eval's own only if requested.

    lm-eval takes seconds to index its own tasks.
    """
    if include:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=str(include) if include else None)


def _unknown(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def unknown_tasks(tasks: Sequence[str], include: Path | None) -> list[str]:
    """Return the names that are no task of lm-eval. It may take seconds to index all tasks."""
    return _unknown(tasks, _tasks(tasks, include))


def evaluate(
    model: SessionLM, tasks: list[str], include: Path | None, items: int | None
) -> TaskMetrics:
    """Return lm-eval's results by task: every metric and its standard error.

    :param include: folder with additional task files.
    :param items: number of items per task; None: all.
    :raises UserError: if lm-eval does not know a task; the message names all of them.
    """
    manager = _tasks(tasks, include)
    if unknown := _unknown(tasks, manager):
        raise UserError(
            f"--lm-eval: found {', '.join(unknown)}, which is no task of lm-eval; "
            "`lm-eval ls tasks` lists its tasks, --include-path adds a folder of task files"
        )
    found = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=items, log_samples=False
    )
    return {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for name, figures in found["results"].items()
    }
