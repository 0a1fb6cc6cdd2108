"""Seconds per scored item, choices and generated answers, compared with another commit.

    python benchmarks/scoring.py --data <folder> --before <checkout> torch=<folder> onnx=<folder>

Every runtime scores the first items of ARC-Easy (choices, and perplexity of the right one) and of
GSM8K (answers of at most `--new-tokens` tokens; exactly that many with `--whole`). This code and
the checkout's (`git worktree add <checkout> <commit>`) run in separate processes, interleaved.
`--data` holds the tasks in the layout of LLM-Adapters. The results of both are compared: log
likelihoods and answers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
TASKS = {"choices": "arc_easy", "answers": "gsm8k"}


def write_questions(
    data: Path, model: Path, counts: dict[str, int], new_tokens: int, whole: bool, out: Path
) -> None:
    """Token ids, so that both commits score the same prompts."""
    from sqft_export.data.items import held_out, load_tokenizer, stop_ids
    from sqft_export.data.scoring import questions
    from sqft_export.recipe.load import load_recipe

    tokenizer, asked = load_tokenizer(model), {}
    for part, name in TASKS.items():
        task = {"kind": "dataset", "name": name, "folder": str(data), "max_new_tokens": new_tokens}
        recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", (f"task={json.dumps(task)}",), model)
        items = held_out(recipe, tokenizer)[: counts[part]]
        stops = [] if whole else stop_ids(model, tokenizer)
        asked[part] = questions(recipe, items, stops).to_json()
    out.write_text(json.dumps(asked))


def _request(asked: dict[str, Any]) -> Any:
    """The request in the form that the imported commit takes: older ones take the dict."""
    from sqft_export.data import scoring

    form = getattr(scoring, "ScoringRequest", None)
    return form(**asked) if form else asked


def child(kind: str, folder: Path, asked: dict[str, Any], threads: int) -> dict[str, Any]:
    """Seconds and answers of every part, by whichever sqft_export is imported."""
    from sqft_export.machine.counters import peak_memory
    from sqft_export.measure.decode import generate
    from sqft_export.measure.likelihood import score
    from sqft_export.targets import runner

    session = runner(kind).open_session(folder, False, threads)
    first = {k: v[:1] if isinstance(v, list) else v for k, v in asked["choices"].items()}
    score(session, _request(first))
    started = time.perf_counter()
    choices = dict(score(session, _request(asked["choices"])))
    middle = time.perf_counter()
    wanted = asked["answers"]
    said = generate(session, wanted["asked"], wanted["max_new_tokens"], wanted["stop"])
    ended = time.perf_counter()
    return {
        "choices": {"seconds": middle - started, "said": choices["likelihoods"]},
        "answers": {"seconds": ended - middle, "said": said},
        "peak": peak_memory(),
    }


def run(checkout: Path, kind: str, folder: str, asked: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child", kind, folder]
    done = subprocess.run(
        [*command, str(asked), "--threads", str(threads)],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far log likelihoods lie apart, and the share of answers that are the same."""
    pairs = zip(ours["choices"]["said"], theirs["choices"]["said"], strict=True)
    answers = zip(ours["answers"]["said"], theirs["answers"]["said"], strict=True)
    same = [one == other for one, other in answers]
    return {
        "largest_difference_nats": max(abs(one - other) for one, other in pairs),
        "same_answers": sum(same) / len(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployments", nargs="*", help="runtime=folder")
    parser.add_argument("--before", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--data", type=Path, help="folder of sets, as task.folder of a recipe")
    parser.add_argument("--choices", type=int, default=64)
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--whole", action="store_true", help="answers do not stop before they have all tokens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, asked = arguments.child
        questions = json.loads(Path(asked).read_text())
        print(json.dumps(child(kind, Path(folder), questions, arguments.threads)))
        return
    if arguments.data is None:
        parser.error("--data: name the folder that has arc_easy/ and gsm8k/")
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    from document import finish, spread, table

    sides = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    deployments = dict(pair.split("=", 1) for pair in arguments.deployments)
    counts = {"choices": arguments.choices, "answers": arguments.answers}
    rows: list[list[Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "questions.json"
        model = Path(next(iter(deployments.values())))
        length = arguments.new_tokens, arguments.whole
        write_questions(arguments.data, model, counts, *length, asked)
        for kind, folder in deployments.items():
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(arguments.rounds):
                for side, checkout in sides.items():
                    runs[side].append(run(checkout, kind, folder, asked, arguments.threads))
            for part, count in counts.items():
                taken = {s: [r[part]["seconds"] / count for r in each] for s, each in runs.items()}
                rows += [[kind, part, s, *spread(each).values()] for s, each in taken.items()]
                values[f"{kind} {part}"] = taken
                if "before" in taken:
                    pairs = zip(taken["before"], taken["now"], strict=True)
                    ratios[f"{kind}_{part}_before_over_now"] = spread([a / b for a, b in pairs])
            values[f"{kind} peak"] = {
                s: median(r["peak"] for r in each) for s, each in runs.items()
            }
            if "before" in runs:
                values[f"{kind} same"] = compared(runs["now"][0], runs["before"][0])
    table(["runtime", "part", "code", "s per item", "low", "high"], rows)
    print()
    for name, found in values.items():
        if name.endswith("same"):
            print(name, found)
    table(["before / now", "median", "low", "high"], [[n, *r.values()] for n, r in ratios.items()])
    finish("scoring", ratios, values)


if __name__ == "__main__":
    main()
