"""Any task of lm-eval on any target: a model of the evaluation harness over one of our sessions.

Needs the extra ``lm-eval``. Scores are lm-eval's own; what a deployment says comes from the runtime
it is for, in its default mode.

    from sqft_export.measure.harness import SessionLM
    lm_eval.simple_evaluate(model=SessionLM(folder), tasks=["hellaswag"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sqft_export.data.items import load_tokenizer, stop_ids
from sqft_export.data.stops import cut_at_stop, stop_pieces
from sqft_export.errors import UserError
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session, target
from sqft_export.targets.folder import context_of, kind_of

USUAL_CONTEXT = 2048  # where no config says how many tokens a model is for
NEW_TOKENS = 256  # of an answer, where a task says no number


class SessionLM(TemplateLM):
    """A deployment, or a Hugging Face folder, as lm-eval's model.

    :param folder: OpenVINO, ONNX or Hugging Face folder.
    :param threads: None: the runtime's choice.
    :param device: cpu, gpu or npu.
    :param session: the folder's, where it is open already.

    ``warnings`` says where a task's answers and prompts did not fit into the context.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        device: str = "cpu",
        session: Session | None = None,
    ):
        super().__init__()
        self.folder = Path(folder)
        if session is None:
            kind = kind_of(self.folder)
            session = target(kind).open_session(self.folder, False, threads, device)
        self.session = session
        self.tokenizer = load_tokenizer(self.folder)
        self.stop = stop_ids(self.folder, self.tokenizer)
        self.max_length = context_of(self.folder) or USUAL_CONTEXT
        self.warnings: list[str] = []

    @property
    def eot_token_id(self) -> int:
        return self.stop[0]

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return self.folder.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        begins = self.tokenizer.bos_token is not None and string.startswith(
            self.tokenizer.bos_token
        )
        wanted = not begins if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=wanted)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        targets = [target for _, _, target in requests]
        # What does not fit is cut off in front, as lm-eval's own models do.
        prompts = [
            (prompt + target)[-self.max_length - 1 :][: -len(target)]
            for _, prompt, target in requests
        ]
        found = log_likelihoods(self.session, prompts, targets)
        return [
            (total, first == len(target))
            for (total, first), target in zip(found, targets, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            # With the tokenizer's own first token after the prefix, as lm-eval's `hf` has it.
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows = [(None, *make_disjoint_window(part)) for part in parts]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(windows)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            asked = request.args[1]
            if asked.get("do_sample") or asked.get("temperature", 0) > 0:
                raise UserError("lm-eval: the task samples its answers; greedy ones are given here")
            limit = asked.get("max_gen_toks", NEW_TOKENS)
            alike.setdefault((limit, _until_texts(asked)), []).append(index)
        for (limit, until), indices in alike.items():
            stops = Stops(self.stop, until, self._pieces(until), self.max_length)
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            fitting, new_tokens = self._fit(prompts, limit)
            said = generate(self.session, fitting, new_tokens, stops)
            for index, ids in zip(indices, said, strict=True):
                answers[index] = self._answer(ids, until)
        return answers

    def _fit(self, prompts: list[list[int]], limit: int) -> tuple[list[list[int]], int]:
        """Prompts cut so that the context holds them and their answers, and the longest answer.

        Where both do not fit, the prompt keeps half of the context at least, and is cut in front,
        as lm-eval's own models do.
        """
        half = self.max_length // 2
        answers = [min(limit, max(self.max_length - len(prompt), half)) for prompt in prompts]
        fitting = [p[-(self.max_length - n) :] for p, n in zip(prompts, answers, strict=True)]
        short = sum(n < limit for n in answers)
        cut = sum(len(one) < len(whole) for one, whole in zip(fitting, prompts, strict=True))
        if short or cut:
            self.warnings.append(
                f"lm-eval: max_gen_toks: found {limit}, prompts of up to {max(map(len, prompts))} "
                f"tokens and a context of {self.max_length}; of {len(prompts)} prompts {cut} were "
                f"cut in front, and {short} have room for fewer new tokens, {min(answers)} at least"
            )
        return fitting, max(answers)

    def _pieces(self, until: tuple[str, ...]) -> dict[int, str]:
        return {int(token): text for token, text in stop_pieces(self.tokenizer, until).items()}

    def _answer(self, ids: list[int], until: tuple[str, ...]) -> str:
        """Text up to the first ``until``, without special tokens; one of them may be the end."""
        added = self.tokenizer.get_added_vocab()
        ends = [ids.index(added[text]) for text in until if added.get(text) in ids]
        said = ids[: min(ends, default=len(ids))]
        text = self.tokenizer.decode(
            said, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cut_at_stop(text, until)


def _until_texts(asked: dict[str, Any]) -> tuple[str, ...]:
    found = asked.get("until") or []
    return tuple(text for text in ([found] if isinstance(found, str) else found) if text)


def _tasks(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """What lm-eval knows, without its own thousands of tasks where none of them is asked for."""
    if include:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=str(include) if include else None)


def _strangers(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def unknown_tasks(tasks: Sequence[str], include: Path | None) -> list[str]:
    """Those that lm-eval has no task for; it takes some seconds to know all it has."""
    return _strangers(tasks, _tasks(tasks, include))


def evaluate(
    model: SessionLM, tasks: list[str], include: Path | None, items: int | None
) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task: every metric, and its standard error.

    :param include: folder with task files of one's own.
    :param items: of every task; None: all.
    :raises UserError: naming the tasks that lm-eval does not know.
    """
    manager = _tasks(tasks, include)
    if strangers := _strangers(tasks, manager):
        raise UserError(f"--lm-eval: found {', '.join(strangers)}, which lm-eval has no task for")
    found = simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=items, log_samples=False
    )
    return {
        name: {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for name, figures in found["results"].items()
    }
