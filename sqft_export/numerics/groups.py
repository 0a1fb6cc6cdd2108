"""Which group size a layer gets; apart from the grid so that `plan` needs no torch."""


def fallback_group_size(in_features: int, group_size: int | None) -> int:
    """The group size a layer really gets.

    ``group_size`` where it divides ``in_features``; else the largest smaller power of two from 16
    up that does; else ``in_features``, one group per row (per channel). None asks for the latter.
    Both runtimes keep compressed kernels for all three.
    """
    if group_size is None:
        return in_features
    if in_features % group_size == 0:
        return group_size
    power = 2 ** (group_size.bit_length() - 1)
    while power >= 16:
        if in_features % power == 0:
            return power
        power //= 2
    return in_features
