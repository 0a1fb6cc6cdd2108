"""Run a GGUF folder in the llama.cpp of an installed package; write logits to a file.

wheel_run.py <folder> <execution> <exact: 0 or 1> <out.npy>
"""

import sys
from pathlib import Path

import numpy as np

from sqft_export.targets import gguf

PROMPT, STEPS = 40, 4


def main() -> None:
    folder, execution, exact, out = sys.argv[1:]
    session = gguf.open_session(Path(folder), exact == "1", 2, execution=execution)
    tokens = np.array([[7 * i % 60 + 3 for i in range(PROMPT + STEPS)]])
    logits = [session.forward(tokens[:, :PROMPT])]  # one pass, then one token at a time
    logits += [session.forward(tokens[:, i : i + 1]) for i in range(PROMPT, PROMPT + STEPS)]
    np.save(out, np.concatenate(logits, axis=1)[0])


if __name__ == "__main__":
    main()
