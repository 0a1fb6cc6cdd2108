"""The group size of a layer; a module without torch, since plan needs none."""


def fallback_group_size(in_features: int, group_size: int | None) -> int:
    """Return the group size that a layer gets.

    ``group_size`` if it divides ``in_features``. Otherwise the largest smaller power of two, at
    least 16, that does. Otherwise, and for None, ``in_features``: one group per row (per channel).
    All runtimes have compressed kernels for the three cases.
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
