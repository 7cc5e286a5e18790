"""What the disk says: can a folder be written to, and is a file still the one that was looked at?"""

import errno
import os
import tempfile
from typing import NamedTuple

from host.errors import FaasError

SAMPLE = 64 << 10  # bytes; less may fit into what the file system keeps in an inode
SAMPLE_PREFIX = '.try.'


class DiskRefuses(FaasError):
    """A folder cannot be written to: its disk is full or read-only."""

    status = 507


REASONS = {
    errno.ENOSPC: ('is full', "make room there; 'faas rm NAME' removes a function with its files"),
    errno.EDQUOT: ('is full: the quota is used up', 'raise the quota, or remove files there'),
    errno.EROFS: ('is read-only', "look for errors of the disk ('dmesg'), then: mount -o remount,rw"),
}


def try_write(folder: str | os.PathLike[str]) -> None:
    """Write a small file to `folder`, sync it and remove it.

    Raises DiskRefuses, which names the folder and says what is full or read-only; OSError for every other reason.
    """
    try:
        fd, path = tempfile.mkstemp(dir=folder, prefix=SAMPLE_PREFIX)
        try:
            rest = memoryview(os.urandom(SAMPLE))  # a file system that compresses must not make it nothing
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(path)
    except OSError as error:
        if error.errno not in REASONS:
            raise
        text, hint = REASONS[error.errno]
        raise DiskRefuses(f'the disk of {os.fspath(folder)} {text}', hint) from error


class Signature(NamedTuple):
    """What changes when a file is written, replaced or touched; two that are equal stand for the same content."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int


def signature(path: str | os.PathLike[str]) -> Signature | None:
    """The Signature of a file, or None if there is none. Raises OSError when that cannot be told."""
    try:
        return signature_of(os.stat(path))
    except FileNotFoundError:
        return None


def signature_of(found: os.stat_result) -> Signature:
    return Signature(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
