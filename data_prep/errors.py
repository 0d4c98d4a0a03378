"""Errors whose message is for the user, and the process exit codes that other programs rely on."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE = 0
EXIT_USER_ERROR = 2  # the input, configuration or data is wrong
EXIT_RANK_FAILED = 3  # a rank or a host failed
EXIT_STOPPED = 4  # stopped on request, after saving


class UserError(Exception):
    """The user's input is wrong. The message names the file, key, line or host, what was expected and what to do.

    The command line prints it as one `error: …` on stderr, without a traceback, and exits with `EXIT_USER_ERROR`.
    """


class RankFault(Exception):
    """A rank or a host does what it should not, and all ranks know it. The message names it and says what to do.

    It is printed as a `UserError` is; the exit code is `EXIT_RANK_FAILED`.
    """


def os_problem(error: OSError | MemoryError, doing: str = "", where: Path | str = "") -> tuple[str, str]:
    """What failed, for the user, and what helps against it (empty where nothing in particular does).

    Args:
        doing: what it prevents, in words ("cannot write the checkpoint").
        where: the path to name if the error names none.
    """
    if isinstance(error, MemoryError):
        return ": ".join(filter(None, (str(where), doing, "out of memory"))), "fewer ranks on a host need less"
    words = (str(error.filename or where), doing, error.strerror or str(error))
    return ": ".join(filter(None, words)), _remedy(error.errno)


def _remedy(number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space"
    if number == errno.EFBIG:
        return "raise the file size limit (ulimit -f)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check its permissions, its owner and how it is mounted"
    return ""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def as_user_error(error: OSError | MemoryError, doing: str = "", where: Path | str = "") -> UserError:
    """`os_problem` as one error."""
    return UserError("; ".join(filter(None, os_problem(error, doing, where))))
