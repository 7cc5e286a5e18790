"""The state directory: who uses it, what is swept at the start, and what is looked after while faasd runs."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable

import registry
from control.events import Emit
from host import disk, files
from host.errors import StartError

UNFINISHED = ('faas.db', 'Corefile', '*.conf', 'server_*.key', 'children.json')  # of 0.1


class Storage:
    """The folders `state`, which survives a reboot, and `run`, which does not."""

    registry: registry.Registry

    def __init__(self, state: str, run: str, emit: Emit) -> None:
        self.state, self._run, self._emit = state, run, emit
        self._folders = [state]
        self._reserve = files.Reserve(f'{state}/reserve')

    def claim(self, undo: contextlib.ExitStack) -> None:
        """Let no other faasd use the folders, for as long as this process lives. Raises StartError.

        The state directory itself is locked, too: the lock file in /run may be deleted under a running faasd.
        """
        for folder, mode in ((self.state, 0o711), (self._run, 0o755)):  # CoreDNS reads the zone as another user
            os.makedirs(folder, mode=mode, exist_ok=True)
        locks = {self.state: os.O_RDONLY | os.O_DIRECTORY, f'{self._run}/faasd.lock': os.O_CREAT | os.O_RDWR}
        for path, flags in locks.items():
            lock = os.open(path, flags | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StartError('another faasd runs on this host', 'end it first') from error

    def open_registry(self, undo: contextlib.ExitStack) -> registry.Registry:
        """Raises RegistryError when the registry is empty or lost and there is code of functions."""
        self._sweep(self.state)
        self._sweep(self._run)
        self.registry = registry.Registry(f'{self.state}/registry.db', self._reserve)
        undo.callback(self.registry.close)
        for folder in registry.check_files(self.registry, f'{self.state}/functions'):
            self._emit('registry', f'Moved code that the registry does not know to {folder}', problem=True)
        self.registry.abandon_stale()
        return self.registry

    def add(self, folders: Iterable[str]) -> None:
        """Sweep and look after these folders, too."""
        for folder in folders:
            self._sweep(folder)
            self._folders.append(folder)

    def _sweep(self, folder: str) -> None:
        """Remove what a killed write has left: some of it holds keys."""
        if swept := files.sweep(folder, UNFINISHED):
            self._emit('faasd', f'Removed {len(swept)} unfinished files from {folder}')

    # For the monitor

    def look_after_registry(self) -> None:
        """Raises DatabaseError when the file is no longer the one that is open."""
        self.registry.check_file()
        self.registry.abandon_stale()

    def look_at_disks(self) -> None:
        """Raises DiskRefuses; also when removals have used the reserve and there is no room for another."""
        for folder in self._folders:
            with contextlib.suppress(FileNotFoundError):  # other checks make a lost folder again, within seconds
                if refusal := disk.look(folder):  # root may still write a little where nobody else can
                    raise refusal
                disk.try_write(folder)
        if not self._reserve.make():
            raise disk.refusal(errno.ENOSPC, self.state)
