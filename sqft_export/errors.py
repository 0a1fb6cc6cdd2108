"""Exceptions whose text is written for users."""

MAX_MESSAGE_CHARACTERS = 5000  # a damaged file must not fill the terminal


def one_line(text: object, longest: int = 300) -> str:
    """Return an external text, such as a library's message, on one line.

    :param longest: characters after which the text is cut.
    """
    shown = " ".join(str(text).split())
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


class UserError(Exception):
    """An error that the user can fix. The message says where, what was found, and what helps.

    The command line prints the message without a traceback and exits with ``code``.
    """

    code = 2

    def __init__(self, message: str = "") -> None:
        more = len(message) - MAX_MESSAGE_CHARACTERS
        cut = f"{message[:MAX_MESSAGE_CHARACTERS]}... and {more:,} characters more"
        super().__init__(cut if more > 0 else message)


class HostError(UserError):
    """The machine lacks a resource (disk, memory or permission), or lost a device."""

    code = 3


class DamagedError(UserError):
    """A file is not the one that was written: it was cut, changed or replaced."""

    code = 4


class CertificateError(UserError):
    """A deployment does not compute what was trained."""

    code = 5


class GateError(UserError):
    """A pass costs more quality than the recipe's ``gates`` allow."""

    code = 6
