"""InstanceSet: the instances of one function, and the files of replaced revisions that they may still need."""

import socket
from collections.abc import Callable, Iterator

from handlers.serving.instance import Instance


class InstanceSet:
    """Every instance from its making to its end. A replaced revision's folder is deleted after its last instance."""

    def __init__(self, forget: Callable[[str], object]) -> None:
        """`forget(folder)` deletes the files of a revision; it must not block."""
        self._forget = forget
        self._instances: set[Instance] = set()
        self._replaced: set[str] = set()

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self._instances))

    def __len__(self) -> int:
        return len(self._instances)

    def add(self, instance: Instance) -> None:
        self._instances.add(instance)

    def remove(self, instance: Instance) -> None:
        """It has ended, or is no longer ours."""
        self._instances.discard(instance)
        self._collect()

    def kill(self, reason: str) -> None:
        """End every instance now."""
        for instance in self:
            instance.kill(reason)

    def share(self, listener: socket.socket) -> bool:
        """True if an instance has `listener` and can make it blocking."""
        return any(instance.has_listener and instance.listener is listener for instance in self)

    def replaced(self, folder: str) -> None:
        """No instance of the revision in `folder` will be started any more."""
        self._replaced.add(folder)
        self._collect()

    def _collect(self):
        for folder in self._replaced - {instance.revision.folder for instance in self._instances}:
            self._replaced.discard(folder)
            self._forget(folder)
