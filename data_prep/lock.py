"""One lock on a file, for what only one process at a time may do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

# what file systems say that know no locks, such as some mounts of NFS and Lustre
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(Exception):
    """Another process holds the lock; `holder` says which, as far as it could leave a note."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path}: held by {holder}")
        self.holder = holder


def lock_file(path: Path) -> IO[str]:
    """Locks `path` until what is returned is closed, or this process ends. Two locks of one process exclude each other.

    On a file system that knows no locks nothing is held back: nothing more can be done there.

    Raises:
        LockedError: another holds it, on this host or, where the file system knows how, on another.
        OSError: the file cannot be made or opened.
    """
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).strip()
        file.close()
        raise LockedError(path, holder or "another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
    with suppress(OSError):  # for the message above only; a full disk is met where it matters
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file
