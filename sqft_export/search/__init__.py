"""Search strategies, one file each; the file name is the word in the recipe.

Each offers ``choose(groups, ranks) -> {group: rank}``.
"""

import importlib
from types import ModuleType


def strategy(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
