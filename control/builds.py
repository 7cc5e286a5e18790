"""Builds: what a folder needs is installed on the server before its revision is committed, and kept for the next one.

`builds/NAME/` of the state directory has the disk of the function's builds, and the results of the last ones, each
named by the digest of its input. The files of a revision are hard links to those of a result: none is ever changed.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator

from control.events import Emit
from handlers.containers.building import Workshop, is_real
from handlers.images import builders
from handlers.images.layers import remove_tree
from handlers.images.staging import Staging
from host import disk, files, process

AT_ONCE = 2  # builds of this server
KEPT = 2  # results of a function
LOOK_S = 0.2
DISK, BUSY = 'disk', 'disk.busy'  # the second while it may be mounted: after a crash it is made anew


class Builds:
    """The builds of one server, kept below `folder`."""

    def __init__(self, folder: str, workshop: Workshop, emit: Emit) -> None:
        self._folder, self._workshop, self._emit = folder, workshop, emit
        self._locks: dict[str, threading.Lock] = {}
        self._rooms = threading.Semaphore(AT_ONCE)

    def begin(self, names: Iterable[str]) -> None:
        """Remove what a killed faasd has left, and what is of functions other than `names`."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        for name in os.listdir(self._folder):
            path = os.path.join(self._folder, name)
            if name not in names:
                remove_tree(path)
                continue
            for each in os.listdir(path):
                if each.startswith('.'):
                    remove_tree(os.path.join(path, each))
            files.remove_file(os.path.join(path, BUSY))

    def forget(self, name: str) -> None:
        """The function is removed."""
        shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)

    def need(self, programs: Iterable[str]) -> None:
        """Raise CannotBuild unless this server has these programs, of builders.INSTALL."""
        if error := builders.lacking(tuple(each for each in programs if each in builders.INSTALL)):
            raise error

    def build(
        self, name: str, staging: Staging, tell: Callable[[bytes], object], is_wanted: Callable[[], bool]
    ) -> None:
        """Build the folder in `staging` if it needs that. tell() is given the output.

        Raises CannotBuild; ConnectionAbortedError when it is not wanted any more; FaasError, OSError, what tell()
        raises.
        """
        if staging.spec.kind == 'image' or (plan := builders.plan(staging.tree, staging.spec)) is None:
            return
        own = os.path.join(self._folder, name)
        with disk.refusals(self._folder), self._lock(name, is_wanted):
            result = os.path.join(own, plan.key)
            if os.path.isdir(result):
                os.utime(result)
            else:
                self.need(plan.programs)
                os.makedirs(own, mode=0o700, exist_ok=True)
                with waited(self._rooms, is_wanted):
                    self._make(name, plan, staging.tree, own, tell, is_wanted)
                self._emit('build', f'Built {name}: {"; ".join(plan.lines)}', name=name)
            place(result, plan.results, staging.tree)
            staging.spec = plan.spec
            self._drop(own)

    def _make(self, name, plan, tree, own, tell, is_wanted):
        busy, made = os.path.join(own, BUSY), os.path.join(own, f'.{plan.key}')
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(own, DISK), busy)
        try:
            self._workshop.build(name, plan, tree, busy, made, tell, is_wanted)
            files.sync_file_system(made)
            os.rename(made, os.path.join(own, plan.key))
            files.sync_folder(own)
        finally:
            remove_tree(made)
            with contextlib.suppress(FileNotFoundError):
                os.rename(busy, os.path.join(own, DISK))

    def _drop(self, own):
        """Remove all but the last results."""
        results = [entry for entry in os.scandir(own) if entry.is_dir() and not entry.name.startswith('.')]
        for entry in sorted(results, key=lambda entry: entry.stat().st_mtime)[:-KEPT]:
            remove_tree(entry.path)

    def _lock(self, name, is_wanted):
        return waited(self._locks.setdefault(name, threading.Lock()), is_wanted)


@contextlib.contextmanager
def waited(lock: 'threading.Lock | threading.Semaphore', is_wanted: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock. Raises ConnectionAbortedError when that is not wanted any more."""
    while not lock.acquire(timeout=LOOK_S):
        if not is_wanted():
            raise ConnectionAbortedError
    try:
        yield
    finally:
        lock.release()


def place(result: str, paths: tuple[str, ...] | None, tree: str) -> None:
    """Put further names of the files of a result into the folder `tree`: of all of it, or of these."""
    if paths is None:
        remove_tree(tree)
        link(result, tree)
        return
    for path in paths:
        parent, target = os.path.dirname(path), os.path.join(tree, path)
        if parent:
            os.makedirs(os.path.join(tree, parent), mode=0o755, exist_ok=True)
            if not is_real(tree, parent):
                raise builders.CannotBuild(f'{parent} is a link, and the build needs a folder there')
        if os.path.isdir(target) and not os.path.islink(target):
            remove_tree(target)
        else:
            files.remove_file(target)
        link(os.path.join(result, path), target)


def link(source: str, target: str) -> None:
    process.run(['cp', '-al', '--', source, target], timeout_s=300)
