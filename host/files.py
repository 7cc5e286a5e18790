"""Writes files so that a power cut leaves the old or the new one."""

import contextlib
import os
import tempfile


def write_file(path, content, mode=0o644):
    """Replace `path` by content (str or bytes) so that after a power cut it is the old or the new one, whole."""
    folder = os.path.dirname(path)
    fd, temporary = tempfile.mkstemp(dir=folder, prefix=f'.{os.path.basename(path)}.')
    try:
        with open(fd, 'wb') as file:
            os.fchmod(fd, mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def remove_file(path):
    """Unlink `path`, which may be gone already, so that it stays gone after a power cut."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(os.path.dirname(path))


def sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
