"""Items split over processes get the scores of one process, and each process computes a part."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

WORKER = """
import torch
from conftest import TINY
from sqft_export.data.items import load_tokenizer
from sqft_export.machine.processes import join_processes
from sqft_export.measure import decode, likelihood
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.targets.torch import TorchSession

session = TorchSession(load_model(Checkpoint(TINY), torch.float32))
tokenizer = load_tokenizer(TINY)
texts = [f"Question: Tom has {n} apples." + " He is glad." * (n % 5) for n in range(23)]
prompts = [tokenizer(text)["input_ids"] for text in texts]
targets = [tokenizer(f" {n * 8}")["input_ids"] for n in range(23)]
prompts += prompts[:4]  # two targets after one prompt
targets += [tokenizer(f" {n}")["input_ids"] for n in range(4)]
tokens = []
forward = session.forward

def counted(ids, *rest):
    tokens.append(ids.size)
    return forward(ids, *rest)

session.forward = counted
likelihood.SCORING_PASS_TOKENS = decode.MAX_CACHE_TOKENS = 128  # several batches

def results(*processes):
    tokens.clear()
    found = likelihood.log_likelihoods(session, prompts, targets, *processes)
    answers = decode.generate(session, prompts[:23], 6, [0, 1], *processes)
    return found, answers, sum(tokens)

*alone, all_tokens = results()
with join_processes("scoring") as processes:
    *shared, own_tokens = results(processes)
    assert shared == alone
    assert sum(processes.gather(own_tokens)) == all_tokens
    assert own_tokens < 0.75 * all_tokens, (own_tokens, all_tokens)
"""


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
