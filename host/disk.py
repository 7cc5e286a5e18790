"""What the disk says: can a folder be written to, and is a file still the one that was looked at?"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from host.errors import FaasError

SAMPLE = 64 << 10  # bytes; less may fit into what the file system keeps in an inode
SAMPLE_PREFIX = '.try.'


class DiskRefuses(FaasError):
    """A folder cannot be written to: its disk is full or read-only."""

    status = 507


class DiskFull(DiskRefuses):
    """No space, no inode or no quota is left."""


class DiskReadOnly(DiskRefuses):
    """The disk is mounted read-only, or became so after an error."""


REASONS = {
    errno.ENOSPC: (DiskFull, 'is full', "make room there; 'faas rm NAME' removes a function with its files"),
    errno.EDQUOT: (DiskFull, 'is full: the quota is used up', 'raise the quota, or remove files there'),
    errno.EROFS: (DiskReadOnly, 'is read-only', "look for errors of the disk ('dmesg'), then: mount -o remount,rw"),
}


def refusal(number: int, folder: str | os.PathLike[str]) -> DiskRefuses:
    """The error that says of the folder's disk what an errno of REASONS means."""
    kind, text, hint = REASONS[number]
    return kind(f'the disk of {os.fspath(folder)} {text}', hint)


@contextlib.contextmanager
def refusals(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise DiskRefuses in place of an OSError that says that the folder's disk is full or read-only."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise refusal(error.errno, folder) from error


def look(folder: str | os.PathLike[str], room: int = SAMPLE) -> DiskRefuses | None:
    """What the disk would refuse to write to the folder: `room` bytes, or everything. It writes nothing."""
    disk = os.statvfs(folder)
    if disk.f_flag & os.ST_RDONLY:
        return refusal(errno.EROFS, folder)
    # A file system that has no fixed number of inodes says 0 of 0.
    if disk.f_bavail * disk.f_frsize < room or (disk.f_files and not disk.f_favail):
        return refusal(errno.ENOSPC, folder)
    return None


def try_write(folder: str | os.PathLike[str]) -> None:
    """Write a small file to `folder`, sync it and remove it.

    Raises DiskRefuses, which names the folder and says what is full or read-only; OSError for every other reason.
    """
    with refusals(folder):
        fd, path = tempfile.mkstemp(dir=folder, prefix=SAMPLE_PREFIX, suffix='.tmp')  # files.sweep() knows the suffix
        try:
            rest = memoryview(os.urandom(SAMPLE))  # a file system that compresses must not make it nothing
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(path)


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
