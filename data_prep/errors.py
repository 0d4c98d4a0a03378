"""Errors whose message is for the user, and the process exit codes that other programs rely on."""

EXIT_DONE = 0
EXIT_USER_ERROR = 2  # the input, configuration or data is wrong
EXIT_RANK_FAILED = 3  # a rank or a host failed
EXIT_STOPPED = 4  # stopped on request, after saving


class UserError(Exception):
    """The user's input is wrong. The message names the file, key, line or host, what was expected and what to do.

    The command line prints it as one `error: …` on stderr, without a traceback, and exits with `EXIT_USER_ERROR`.
    """
