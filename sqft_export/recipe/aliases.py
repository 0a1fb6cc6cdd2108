"""Old words of recipe fields. They are still read, with a notice."""

import logging
from typing import Any

_logger = logging.getLogger(__name__)
# Field -> old word -> new word.
OLD_WORDS = {
    "sparsify.method": {"given": "existing"},
    "quantize.method": {"given": "existing"},
    "search.strategy": {"given": "configured"},
}


def replace_old_words(data: dict[str, Any]) -> None:
    """Replace the old words in a recipe's mapping, and log a notice for each."""
    for path, words in OLD_WORDS.items():
        name, _, field = path.partition(".")
        section = data.get(name)
        found = section.get(field) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(found, str) and found in words:
            section[field] = words[found]
            _logger.warning("%s: %s is the old name of %s", path, found, words[found])
