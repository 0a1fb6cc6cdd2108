"""Several training examples in one row, without attention between them.

    row             a b c | d e | f g h i | padding
    position_ids    0 1 2   0 1   0 1 2 3   0 1 2

Transformers' models read a restart of the positions as the start of another sequence, and no token
attends across it, if they get no attention mask and no cache. The labels of each first token are
masked, so no token predicts the beginning of the next example.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

# Largest difference of a packed example's logits, in standard deviations. Rounding is far below.
MAX_PACKED_DIFFERENCE = 1e-3


class TrainingRow(TypedDict):
    """A training example; the first ``skip`` tokens are not in the loss.

    loss: per token, whether it is in the loss; None: all tokens after the first ``skip``.
    lengths: tokens of every example in a packed row.
    """

    input_ids: list[int]
    skip: int
    loss: NotRequired[list[bool] | None]
    lengths: NotRequired[list[int]]


def fill_rows(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Return the indices of the examples of every row.

    Each example, from long to short, goes into the fullest row that has room for it.

    :param lengths: tokens of every example, at most ``longest``.
    :param longest: largest number of tokens per row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free tokens and number of every row, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[index], 0))
        if place == len(rooms):
            rows.append([])
            room, number = longest, len(rows) - 1
        else:
            room, number = rooms.pop(place)
        rows[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return [sorted(row) for row in rows]


def pack_rows(rows: list[TrainingRow], longest: int) -> list[TrainingRow]:
    """Return packed rows, with the ``lengths`` of the examples in each.

    :param rows: examples with ``input_ids``, ``skip`` and ``loss``; see ``training.collate``.
    """
    packed: list[TrainingRow] = []
    for indices in fill_rows([len(row["input_ids"]) for row in rows], longest):
        parts = [rows[index] for index in indices]
        packed.append(
            {
                "input_ids": [token for part in parts for token in part["input_ids"]],
                "skip": 0,
                "loss": [one for part in parts for one in _loss_mask(part)],
                "lengths": [len(part["input_ids"]) for part in parts],
            }
        )
    return packed


def _loss_mask(row: TrainingRow) -> list[bool]:
    """Return whether each token is in the loss; the first one never is."""
    length, skip = len(row["input_ids"]), max(1, row["skip"])
    mask = row.get("loss") or [True] * length
    return [n >= skip and mask[n] for n in range(length)]


def position_ids(lengths: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return int64 ``[rows, width]``; positions restart at every example and at the padding.

    :param lengths: tokens of every example in each row.
    """
    found = torch.zeros(len(lengths), width, dtype=torch.int64)
    for number, row in enumerate(lengths):
        ends = [*accumulate(row), width]
        for start, end in zip([0, *ends], ends, strict=False):
            found[number, start:end] = torch.arange(end - start)
    return found


def separates_packed(model: nn.Module, vocabulary: int) -> bool:
    """Return whether two packed examples have the logits that they have in separate rows.

    :param model: causal language model of transformers; a small one of the same kind suffices.
    :param vocabulary: number of token ids to draw from.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 24), generator=generator)
    lengths = [10, 14]
    parts = ids.split(lengths, dim=1)
    with torch.no_grad():
        positions = position_ids([lengths], ids.shape[1])
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(input_ids=p, use_cache=False).logits for p in parts], dim=1)
    return float((packed - separate).abs().max() / separate.std()) < MAX_PACKED_DIFFERENCE
