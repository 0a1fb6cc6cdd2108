"""The conversations of a chat task: read, split, and compared."""

import functools
from collections.abc import Iterator
from pathlib import Path

from sqft_export.data.chat import Conversation
from sqft_export.data.columns import DataLayout, conversation_of, drop_seen, kind_of_rows
from sqft_export.data.tables import Stamp, Table
from sqft_export.errors import UserError
from sqft_export.recipe.schema import HUB, Chat
from sqft_export.recipe.sections import TaskSections

MAX_NAMED_PLACES = 3  # of conversations, in a message


def chat_files(recipe: TaskSections, task: Chat, split: str) -> list[Path]:
    """Return the files that a split depends on.

    The test split depends on the training file too, whose conversations it leaves out. Sources on
    the hub are not in the list.
    """
    sources = [task.train] if split == "train" else [task.source(split), task.train]
    local = (source for source in dict.fromkeys(sources) if not source.startswith(HUB))
    return [recipe.resolve(source) for source in local]


def hub_sources(task: Chat) -> list[str]:
    """Return the sources on the hub, as the recipe writes them."""
    sources = dict.fromkeys((task.train, task.source("test")))
    return [source for source in sources if source.startswith(HUB)]


def revision_key(source: str) -> str:
    """Return the key of a chat task's source among the recipe's pinned revisions."""
    return f"task {source}"


def read_conversations(recipe: TaskSections, task: Chat, split: str) -> list[Conversation]:
    """Return the conversations of a split; the test split has no training conversations.

    :raises UserError: naming file and row, or the split that has no conversation.
    """
    if split == "train":
        return split_conversations(recipe, task)[0]
    return held_out_conversations(recipe, task)[0]


def held_out_conversations(
    recipe: TaskSections, task: Chat
) -> tuple[list[Conversation], list[Conversation]]:
    """Return test conversations, and those that are left out because training reads them.

    :raises UserError: if none is left.
    """
    train, test = split_conversations(recipe, task)
    new, seen = drop_seen(test, train)
    if not new:
        raise UserError(
            f"{recipe.file}: task.test: all {len(seen)} test conversations are training "
            "conversations too; name a file with others"
        )
    return new, seen


def split_conversations(
    recipe: TaskSections, task: Chat
) -> tuple[list[Conversation], list[Conversation]]:
    """Return all conversations of the training split and of the test split.

    Example: of ten rows and ``test_share: 0.2``, rows 5 and 10 are the test split. Of fewer rows
    than ``1 / test_share``, the last one is.

    :raises UserError: if one of them has none.
    """
    rows = all_conversations(recipe, task, "train")
    if task.test is not None:
        return rows, all_conversations(recipe, task, "test")
    share = task.test_share
    chosen = [int((n + 1) * share + 1e-9) > int(n * share + 1e-9) for n in range(len(rows))]
    if not any(chosen):
        chosen[-1] = True
    train = [row for row, held in zip(rows, chosen, strict=True) if not held]
    test = [row for row, held in zip(rows, chosen, strict=True) if held]
    if not train or not test:
        raise UserError(
            f"{recipe.file}: task.test_share: found {share:g}; of {len(rows)} conversations it "
            f"leaves {len(train)} to train on and {len(test)} to test with; both need one. Add "
            "conversations, or name held-out ones with task.test (--test)"
        )
    return train, test


def first_places(conversations: list[Conversation]) -> str:
    """Return file and row of the first conversations; ``...`` stands for the others."""
    more = ["..."] if len(conversations) > MAX_NAMED_PLACES else []
    return ", ".join([*(one.place for one in conversations[:MAX_NAMED_PLACES]), *more])


def all_conversations(recipe: TaskSections, task: Chat, split: str) -> list[Conversation]:
    """Return every conversation of a split's source.

    :raises UserError: naming file and row.
    """
    table, columns = _table(recipe, task, split), task.columns
    stamp = table.stamp()
    if stamp is None:
        return list(_parse(table, columns))
    return list(_parse_once(table, tuple(columns.items()), stamp))


@functools.lru_cache(maxsize=2)  # a training and a test source
def _parse_once(
    table: Table, columns: tuple[tuple[str, str], ...], stamp: Stamp
) -> tuple[Conversation, ...]:
    """Return the conversations of a table in the state of its stamp."""
    return tuple(_parse(table, dict(columns)))


def _parse(table: Table, columns: dict[str, str]) -> Iterator[Conversation]:
    kind: DataLayout | None = None
    for number, row in table.rows():
        place = table.place(number)
        kind = kind or kind_of_rows(row, place, columns)
        yield conversation_of(row, place, kind, columns)


def _table(recipe: TaskSections, task: Chat, split: str) -> Table:
    source = task.source(split)
    part = task.split if split == "train" else task.test_split
    if not source.startswith(HUB):
        return Table(str(recipe.resolve(source)), part)
    revision = (recipe.revisions or {}).get(revision_key(source)) or task.revision
    return Table(source, part, task.subset, revision)
