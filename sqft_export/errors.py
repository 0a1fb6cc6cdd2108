"""The exceptions a user is meant to read."""

MAX_MESSAGE_CHARACTERS = 5000  # of one message, whatever a file holds


def one_line(text: object, longest: int = 300) -> str:
    """A text from outside, such as a library's message, on one line and cut."""
    shown = " ".join(str(text).split())
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


class UserError(Exception):
    """Something the user can put right: says where, what was found, and the way out.

    The command line prints its text without a traceback and exits with ``code``.
    """

    code = 2

    def __init__(self, message: str = "") -> None:
        more = len(message) - MAX_MESSAGE_CHARACTERS
        cut = f"{message[:MAX_MESSAGE_CHARACTERS]}... and {more:,} characters more"
        super().__init__(cut if more > 0 else message)


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
