"""The highest rank for every group."""


def choose(groups: list[str], ranks: tuple[int, ...]) -> dict[str, int]:
    return dict.fromkeys(groups, max(ranks))
