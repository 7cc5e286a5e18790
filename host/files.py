"""Files that survive a power cut, and a reserve of room for them."""

import contextlib
import ctypes
import fnmatch
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator

from host import disk

libc = ctypes.CDLL(None, use_errno=True)

# The name of a file that write_file has not finished: '.NAME.XXXXXXXX.tmp'. faasd 0.1 wrote no '.tmp'.
# SQLite puts its own files beside a database that is being made.
_UNFINISHED = re.compile(r'\.(?P<name>.+)\.[a-z0-9_]{8}(?P<suffix>\.tmp(-journal|-wal|-shm)?)?', re.DOTALL)


@contextlib.contextmanager
def replacing(path: str, mode: int = 0o644) -> Iterator[str]:
    """The path of a new empty file. After the context it takes the place of `path`, to stay after a power cut.

    If the context raises, the new file is removed and `path` stays as it is.
    """
    folder, name = os.path.split(path)
    fd, temporary = tempfile.mkstemp(dir=folder, prefix=f'.{name}.', suffix='.tmp')
    try:
        os.fchmod(fd, mode)
        yield temporary
        os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    sync_folder(folder)


def write_file(path: str, content: str | bytes, mode: int = 0o644) -> None:
    """Replace `path` by content so that after a power cut it is the old or the new one, whole."""
    with replacing(path, mode) as temporary, open(temporary, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_file(path: str) -> None:
    """Unlink `path`, which may be gone already, so that it stays gone after a power cut."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(os.path.dirname(path))


def sweep(folder: str, names: Iterable[str] = ()) -> list[str]:
    """Remove the files that a killed write_file() or replacing() left in the folder; their names.

    `names` are patterns ('faas.db', '*.conf') of the files that faasd 0.1 wrote there: it named unfinished files
    '.NAME.XXXXXXXX', which other programs do, too. Call it before the first write. Raises OSError.
    """
    swept = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            match = _UNFINISHED.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            if match['suffix'] or any(fnmatch.fnmatchcase(match['name'], pattern) for pattern in names):
                os.unlink(entry.path)
                swept.append(entry.name)
    if swept:
        sync_folder(folder)
    return sorted(swept)


def sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file_system(folder: str) -> None:
    """Write what its file system has not written yet, in one go. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


class Reserve:
    """A file that keeps `size` bytes of a disk free for the changes that must succeed when it is full.

    make() takes the room while there is plenty, release() gives it back when a removal needs it.
    """

    def __init__(self, path: str, size: int = 4 << 20) -> None:
        self.path, self.size = path, size

    def make(self) -> bool:
        """True if the reserve is there. It is made only where it leaves as much again free, else False."""
        with contextlib.suppress(FileNotFoundError):
            if self._is_whole(os.stat(self.path)):
                return True
        if disk.look(os.path.dirname(self.path), 2 * self.size):
            return False
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.size)
            finally:
                os.close(fd)
        except OSError:
            self.release()
            return False
        return True

    def _is_whole(self, status: os.stat_result) -> bool:
        return stat.S_ISREG(status.st_mode) and status.st_blocks * 512 >= self.size

    def release(self) -> bool:
        """Remove the reserve; False if there was none."""
        try:
            os.unlink(self.path)
        except OSError:  # it is gone, or the disk is read-only
            return False
        return True
