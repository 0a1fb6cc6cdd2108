"""The middle rank for every group, the method authors' heuristic."""


def choose(groups: list[str], ranks: tuple[int, ...]) -> dict[str, int]:
    return dict.fromkeys(groups, sorted(ranks, reverse=True)[(len(ranks) - 1) // 2])
