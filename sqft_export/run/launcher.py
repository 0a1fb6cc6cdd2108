"""Several processes: what a launcher (``torchrun``, ``accelerate launch``) tells each of them."""

import os


def process_rank() -> int:
    """Number of this process under a launcher (``torchrun``, ``accelerate launch``); 0 writes."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
