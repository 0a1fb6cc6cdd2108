"""Interfaces name their types."""

import re
from pathlib import Path

import sqft_export

PACKAGE = Path(sqft_export.__file__).parent
TYPED = ("adapters", "kernels", "libraries", "model", "numerics", "packed", "quantizers")
TYPED += ("recipe", "search", "sparsifiers", "targets", "textfiles.py", "untrusted.py")
MAX_UNTYPED_LINES = 20  # JSON of unknown structure in ``read_json`` and ``parse_json``


def test_few_lines_are_untyped():
    found = [
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for name in TYPED
        for file in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).rglob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"\bAny\b", line)
    ]
    assert len(found) <= MAX_UNTYPED_LINES, "\n".join(found)
