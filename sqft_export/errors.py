"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: says where, what was found, and the way out.

    The command line prints its text without a traceback and exits with 2.
    """
