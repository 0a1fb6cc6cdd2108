"""Run a recipe up to a pass again and again; each run is killed in a block, the last one is not.

Arguments: folder, pass, settings. Every run is a separate process that SIGKILL ends, as the system
does when memory runs out. They are forked here, so that libraries are imported once.
"""

import os
import signal
import sys
from pathlib import Path

from conftest import small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.model import block_state, blocks
from sqft_export.run.pipeline import run_recipe


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_block(index: int) -> None:
    """End the process once a pass has compressed a block, before the block's state is saved."""
    run_block = blocks._run_block

    def run(block, *others):
        if block.index == index:
            kill()
        return run_block(block, *others)

    blocks._run_block = run


def kill_while_saving(finished: int) -> None:
    """End the process when a state's tensors are written and its JSON file is not."""
    replace = block_state._replace_file

    def write(file: Path, text: str) -> None:
        if file.stem == str(finished):
            file.with_suffix(".partial").write_text(text[: len(text) // 2])
            kill()
        replace(file, text)

    block_state._replace_file = write


def kill_at_the_end() -> None:
    """End the process between the last block and the seal, when shards got their final names."""
    Store.seal = lambda *_, **__: kill()


def run(folder: Path, last: str, settings: list[str]) -> None:
    run_recipe(small_recipe(*settings), folder, (last,))


def main(folder: Path, last: str, settings: list[str]) -> None:
    kills = (
        lambda: kill_in_block(1),
        lambda: kill_while_saving(3),
        lambda: kill_in_block(3),
        kill_at_the_end,
        lambda: None,
    )
    for number, prepare in enumerate(kills):
        if not (child := os.fork()):
            prepare()
            run(folder, last, settings)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        states = sorted(p.stem for p in folder.glob(f"{last}-*.partial/states/*/*.json"))
        print(number, os.waitstatus_to_exitcode(status), *states, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
