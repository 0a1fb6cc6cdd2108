"""The exceptions a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: says where, what was found, and the way out.

    The command line prints its text without a traceback and exits with ``code``.
    """

    code = 2


class HostError(UserError):
    """The machine lacks something: disk, memory, permission."""

    code = 3


class DamagedError(UserError):
    """A file is not what was written: cut, flipped, exchanged."""

    code = 4


class CertificateError(UserError):
    """What runs is not what was trained."""

    code = 5


class GateError(UserError):
    """A pass cost more than the recipe's ``gates`` allow."""

    code = 6


def one_line(error: Exception, longest: int = 300) -> str:
    """What a library says, on one line and cut."""
    return " ".join(str(error).split())[:longest]
