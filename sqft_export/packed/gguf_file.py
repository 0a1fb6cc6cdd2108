"""Read a GGUF file with the ``gguf`` package, after checking all counts in its header.

The package trusts an array's length and would read past the end of the file.
"""

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.errors import UserError, one_line
from sqft_export.untrusted import open_regular

if TYPE_CHECKING:
    from gguf import GGUFReader

MAX_GGUF_ENTRIES = 2**16  # limit on fields, and on tensors
MAX_GGUF_VALUES = 2**22  # in all arrays together; a vocabulary of 256,000 needs a quarter
MAX_GGUF_AXES = 8
MAX_GGUF_ELEMENTS = 2**48  # per tensor
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def read_gguf(file: Path) -> "GGUFReader":
    """Return a reader, which maps the file.

    :raises UserError: if the file is not GGUF, or a count or length in it is impossible.
    """
    import gguf

    _check_counts(file)
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the package can raise anything on an untrusted file
        raise UserError(f"{file}: not a GGUF file: {one_line(error)}") from error


def _check_counts(file: Path) -> None:
    with open_regular(file) as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise UserError(f"{file}: is empty") from error
        with content:
            try:
                _Header(content).check()
            except (ValueError, struct.error) as error:
                raise UserError(f"{file}: not a GGUF file: {one_line(error)}") from error


class _Header:
    """Walk over fields and tensor descriptions and check their counts; store nothing."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at, self.values = content, 0, 0

    def check(self) -> None:
        """Check the complete header.

        :raises ValueError: at the first count or length that is too large.
        """
        if self.content[:4] != _MAGIC:
            raise ValueError("it does not start with GGUF")
        self.at = 4
        self.number("<I")
        tensors, fields = self.number("<Q"), self.number("<Q")
        if max(tensors, fields) > MAX_GGUF_ENTRIES:
            found = f"{tensors} tensors and {fields} fields"
            raise ValueError(f"it announces {found}; at most {MAX_GGUF_ENTRIES} are read")
        for _ in range(fields):
            self.skip_text()
            self.skip_value(self.number("<I"), nested=False)
        for _ in range(tensors):
            self.check_tensor()

    def number(self, kind: str) -> int:
        """Read one number of a ``struct`` format."""
        found = struct.unpack_from(kind, self.content, self.at)[0]
        self.at += struct.calcsize(kind)
        return found

    def skip(self, size: int) -> None:
        """Skip bytes that must be in the file."""
        if size > len(self.content) - self.at:
            raise ValueError("it is cut short, or a length in it is wrong")
        self.at += size

    def skip_text(self) -> None:
        """Skip a string with its length."""
        self.skip(self.number("<Q"))

    def skip_value(self, kind: int, nested: bool) -> None:
        """Skip a field's value; arrays of arrays are not allowed."""
        if kind == _STRING:
            self.skip_text()
        elif kind == _ARRAY and not nested:
            self.skip_array(self.number("<I"), self.number("<Q"))
        elif kind in _SCALAR_BYTES:
            self.skip(_SCALAR_BYTES[kind])
        else:
            raise ValueError(f"it has a value of kind {kind}")

    def skip_array(self, kind: int, length: int) -> None:
        """Skip an array's values and count them."""
        self.values += length
        if self.values > MAX_GGUF_VALUES:
            raise ValueError(f"its arrays have more than {MAX_GGUF_VALUES} values")
        if kind in _SCALAR_BYTES:
            self.skip(length * _SCALAR_BYTES[kind])
            return
        for _ in range(length):
            self.skip_value(kind, nested=True)

    def check_tensor(self) -> None:
        """Check and skip one tensor description."""
        self.skip_text()
        axes = self.number("<I")
        if axes > MAX_GGUF_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        elements = 1
        for _ in range(axes):
            elements *= self.number("<Q")
        if elements > MAX_GGUF_ELEMENTS:
            raise ValueError(f"a tensor has {elements} elements")
        self.number("<I")
        self.number("<Q")
