"""The two ways in which a command ends badly on purpose. Anything else is our own bug and keeps its traceback."""


class UserError(Exception):
    """The request was wrong (usage, config, data): exit code 2.

    The message is one line: what, where, what was found, what was expected, what to do.
    """

    exit_code = 2


class Refused(Exception):
    """The answer is no (a check failed, it does not fit, a verification failed): exit code 1."""

    exit_code = 1
