"""Writes files completely or not at all, and reads files up to a limit of size."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path

_TEMPORARY = re.compile(r"\.fewbit-[0-9a-f]{16}\.tmp")
_ABANDONED = 3600.0  # seconds; no write takes this long, so the process of an older temporary file is gone


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file completely or not at all: after an error, an interrupt or a kill it has its old content.

    Through a link, the file that it points to is written. An existing file keeps its mode and, if the system allows it, its
    owner, but not its other hard links. A read-only file is not replaced. Devices, pipes and open files such as /dev/stdout are
    written to directly. Raises OSError with `path`.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        _write(os.path.abspath(path), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_special(path: str | Path) -> bool:
    """Whether a path is a device, a pipe or an open file. Such a path is written to directly, and its suffix says nothing about
    the format."""
    return _open_file(os.path.abspath(path)) is not None or (os.path.exists(path) and not os.path.isfile(path))


def read(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError with `path` for anything else."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(number, "rb") as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            if status.st_size > most or len(data := file.read(most + 1)) > most:  # some files state no size
                raise OSError(errno.EFBIG, f"it is larger than the limit of {most >> 20} MiB")
            return data
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: str, data: bytes) -> None:
    number = _open_file(path)
    if number is not None:
        if sys.stdout is not None:
            sys.stdout.flush()  # what was printed before comes first
        with open(os.dup(number), "wb") as file:
            file.write(data)
        return
    target = os.path.realpath(path)
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is None or stat.S_ISREG(old.st_mode):
        _replace(target, data, old)
    else:
        with open(path, "wb") as file:
            file.write(data)


def _open_file(path: str) -> int | None:
    """The number of the open file that a path stands for, such as 1 for /dev/stdout; None for all other paths."""
    for _ in range(40):  # systems follow about this many links
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd") and name.isdecimal():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


def _replace(target: str, data: bytes, old: os.stat_result | None) -> None:
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fewbit-{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with open(os.open(temporary, flags, 0o666 if old is None else 0o600), "wb") as file:
            file.write(data)
            file.flush()
            if old is not None:
                _take_over(file.fileno(), old)
            _sync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    _collect(folder)


def _take_over(number: int, old: os.stat_result) -> None:
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):  # the owner first: a change of owner clears bits of the mode
            os.fchown(number, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):  # some file systems have no modes; the new file is then private
            os.fchmod(number, stat.S_IMODE(old.st_mode))


def _sync(number: int) -> None:
    """Write the file to disk. Without this a power cut may leave an empty file under the new name."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # file systems without fsync raise these
            raise


def _collect(folder: str) -> None:
    """Remove temporary files that killed processes left in the folder."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                        os.unlink(entry.path)
