"""The lowest rank for every group."""

from sqft_export.search import Ranks, Space


def search(space: Space) -> Ranks:
    return dict.fromkeys(space.groups, min(space.ranks))
