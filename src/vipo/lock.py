"""One process at a time in a run directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from .files import writing

log = logging.getLogger(__name__)
LOCK = ".lock"


class RunLock:
    """Keeps other processes out of a run directory, by flock on its file .lock, which names the holder.

    The lock goes with the process, however that ends; the file stays, and its presence alone means nothing. On NFS the
    kernel passes the lock to the server, which then holds it against other machines too, unless the folder was mounted
    with nolock or local_lock; where a file system has no locks there is a warning.

    Args:
        folder: the run directory; entering takes the lock at once if there is anything in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream: IO[str] | None = None

    def __enter__(self) -> Self:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def take(self) -> None:
        """Take the lock unless it is held already; make the folder if it is missing.

        Raises:
            ValueError: another process has it.
            OSError: the folder cannot be written to.
        """
        if self._stream is not None:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = (self.folder / LOCK).open("a+", encoding="utf-8")
        try:
            _flock(stream, self.folder)
        except ValueError:
            stream.close()
            raise
        self._stream = stream
        with writing(self.folder):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()


def require_unlocked(folder: Path) -> None:
    """Raise ValueError if another process is writing to the run directory; nothing is written."""
    if (folder / LOCK).is_file() and os.access(folder / LOCK, os.R_OK | os.W_OK):
        with (folder / LOCK).open("r+", encoding="utf-8") as stream:
            _flock(stream, folder, fcntl.LOCK_SH)  # several ranks may ask at once


def _flock(stream: IO[str], folder: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise ValueError(
                f"run.output: {folder} is being written by {holder}; wait, stop that one, or give another --run.output"
            ) from None
        log.warning("%s cannot be locked (%s): make sure that no other run writes there", folder, error.strerror)
