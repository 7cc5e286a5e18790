"""The cgroup of a server's containers, with version 1, version 2, or both."""

import contextlib
import os
from collections.abc import Iterator

ROOT = '/sys/fs/cgroup'
MEMORY_V1 = f'{ROOT}/memory'


class Cgroup:
    """`path` is from the root of each hierarchy. Each container has one below it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _all(self) -> Iterator[str]:
        """Its folders: one with cgroup v2, one for each controller with v1."""
        with contextlib.suppress(OSError):
            for where in [ROOT] + [entry.path for entry in os.scandir(ROOT) if entry.is_dir(follow_symlinks=False)]:
                if os.path.isdir(where + self.path):
                    yield where + self.path

    def folders(self, ident: str) -> Iterator[str]:
        """The folders that a container has, or may have."""
        return (os.path.join(where, ident) for where in self._all())

    def remove_container(self, ident: str) -> None:
        """Remove what the OCI runtime did not come to know."""
        for folder in self.folders(ident):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def remove(self) -> None:
        """Remove it, and what is left in it."""
        for where in self._all():
            with contextlib.suppress(OSError):
                with os.scandir(where) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            os.rmdir(entry.path)
                os.rmdir(where)

    def bound_sockets(self, ident: str, memory: int) -> None:
        """Bound what waits in a container's TCP and UDP sockets: version 1 has another limit for that than for memory.

        It is called before the container starts: the kernel does not count sockets that were there before, and runc no
        longer sets it (kernelTCP).
        """
        if os.path.isdir(MEMORY_V1):
            os.makedirs(folder := f'{MEMORY_V1}{self.path}/{ident}')
            with (
                contextlib.suppress(FileNotFoundError, PermissionError),  # a later kernel may be without it
                open(f'{folder}/memory.kmem.tcp.limit_in_bytes', 'w') as file,
            ):
                file.write(str(memory))
