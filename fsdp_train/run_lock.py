"""The lock of a run's directory: two runs that write into one mix their metrics and overwrite each other's results.

`flock` where the file system has it, and a sign of life in the lock file where it has not, or where it does not reach from host
to host.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama.errors import InputError

LOCK_FILE = ".lock"
PATIENCE = 30.0  # seconds that a newcomer waits; a holder without a sign of life for so long is gone
BEAT = 5.0  # seconds between two signs of life
POLL = 0.5  # seconds between two looks at a lock that somebody holds
CONFIRMATION = 0.5  # seconds after which two who created a lock at once see who has it
RECORD_BYTES = 512  # of the lock file: always overwritten as a whole


class RunLock:
    """The right to write in a directory, for one run at a time.

    `flock` ends with the process that holds it, however it dies, so a directory whose run was
    killed on this host is free at once. Across hosts, and on file systems without `flock`, the
    holder writes a sign of life into the lock file every few seconds; a newcomer watches it, by its
    own clock, and takes the lock of a holder that gives none for `PATIENCE` seconds.

    Attributes:
        lost: whether somebody else has it by now, as seen at the last look (every few seconds).
    """

    def __init__(self, directory: Path, wait: float, tell: Callable[[str], None]) -> None:
        """Take the lock of `directory`, waiting at most `wait` seconds for another holder.

        Raises:
            InputError: a living run holds it; the message says which.
            OSError: the lock file cannot be written.
        """
        self._path = directory / LOCK_FILE
        self._since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._file = self._take(wait, tell)
        self.lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._give_signs_of_life, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise InputError if another run has taken the lock, or somebody has removed it.

        It happens to a process that stood still for longer than `PATIENCE` (a suspended machine, a
        file system that did not answer). Whoever took the lock has gone on from the checkpoints
        here, so this process must not write any more.
        """
        record = self._look()
        if self.lost:
            holder = f"now held by {_describe(record)}" if record else "gone"
            raise InputError(f"{self._path.parent}: the lock of this run is {holder}; it stops here and writes nothing more")

    def _look(self) -> dict[str, Any]:
        """The record in the lock file; find out whether it is still this process's."""
        with suppress(OSError):  # the file system does not answer: nothing is known
            record = self._read()
            self.lost = record.get("token") != self._token
            return record
        return {}

    def release(self) -> None:
        """Let the next run in."""
        self._released.set()
        self._thread.join()
        self._look()
        if not self.lost:
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _take(self, wait: float, tell: Callable[[str], None]) -> int:
        """The open lock file, with this process's record in it."""
        began = time.monotonic()
        first: dict[str, Any] = {}  # the holder's record as it was at the beginning
        while True:
            file, granted = _open_locked(self._path)
            record = self._read()
            is_here = record.get("boot") == _boot_id()
            # Granted: nobody on this host holds it. A record of another host says nothing yet,
            # since not every file system takes flock from host to host.
            if (granted and is_here) or (not record and granted is not False):
                self._write(file)
                if granted is None:  # two may have created it at once: the last to write has it
                    time.sleep(CONFIRMATION)
                if self._read().get("token") == self._token:
                    return file
            os.close(file)
            if record and not first:
                first = record
                tell(f"{self._path.parent}: {_describe(record)} is writing here; waiting for it")
            waited = time.monotonic() - began
            if waited < wait:
                time.sleep(min(POLL, wait - waited))
                continue
            refused_here = is_here and granted is False  # the kernel knows that it lives
            if record != first or refused_here or wait < PATIENCE:
                raise InputError(
                    f"{self._path.parent}: {_describe(record)} is writing here; choose another"
                    " --train.output_dir, or end that run"
                )
            tell(f"{self._path.parent}: no sign of life for {waited:.0f} s; the lock is taken")
            self._path.unlink(missing_ok=True)
            began, first = time.monotonic(), {}

    def _read(self) -> dict[str, Any]:
        """The record in the lock file, opened anew: a network file system then asks its server."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        if not text.strip():  # just created
            return {}
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        # What cannot be read is not known to be free either: it is watched like any other.
        return record if isinstance(record, dict) else {"text": text}

    def _write(self, file: int) -> None:
        record = {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "process": os.getpid(),
            "since": self._since,
            "token": self._token,
            "beats": self._beats,
        }
        os.pwrite(file, json.dumps(record).ljust(RECORD_BYTES - 1).encode() + b"\n", 0)

    def _give_signs_of_life(self) -> None:
        while not self._released.wait(BEAT):
            self._look()
            if self.lost:
                return
            self._beats += 1
            with suppress(OSError):  # the next one may go through
                self._write(self._file)


def _open_locked(path: Path) -> tuple[int, bool | None]:
    """The lock file, open, and whether flock was granted; None where the file system has none."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        granted = _flock(file)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file, granted
        os.close(file)  # its holder removed it meanwhile


def _flock(file: int) -> bool | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL):
            return None
        raise
    return True


def _boot_id() -> str:
    """What tells this running kernel from others; containers of one host share its flocks too."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _describe(record: dict[str, Any]) -> str:
    if "host" not in record:
        return "another run"
    return f"process {record.get('process')} on {record.get('host')} (since {record.get('since')})"
