"""Which Linears a recipe means by a list of module names."""

from fnmatch import fnmatchcase


def matches(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a Linear is meant: by its last name, or by its whole one with wildcards."""
    last = name.rsplit(".", 1)[1]
    return any(fnmatchcase(name, module) or last == module for module in modules)
