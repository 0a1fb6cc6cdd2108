"""The configuration that the recipe gives, such as an earlier search's ``configuration.json``."""

from sqft_export.search import Ranks, Space


def search(space: Space) -> Ranks:
    return space.configured
