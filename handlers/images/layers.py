"""The layers that images share: `layers/SHA256/`, each stored once.

`layers/SHA256.blobs` has the digests of the packed blobs that were found to hold the layer, the latest first.
"""

import collections
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable

from handlers.images.spec import is_hex
from host import files, process
from host.errors import FaasError


def remove_tree(path: str, timeout_s: float = 300) -> None:
    """Remove a folder that strangers filled, if it exists. It may be deeper than Python can recurse."""
    with contextlib.suppress(process.CommandError):
        process.run(['rm', '-rf', '--', path], timeout_s=timeout_s)


MOST_BLOBS = 8  # of a layer


class Layers:
    """The layers that images share, in `folder`, each named by the hex digits of its diff_id. Safe for threads.

    The folder is on the file system of the revisions, and belongs to one daemon.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._lock, self._pins = threading.Lock(), collections.Counter()
        self._numbers = itertools.count()

    def prepare(self) -> None:
        """Make the folder, and remove what a killed run left unfinished. Raises OSError."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        present = self.present()
        for name in os.listdir(self.folder):
            if name.startswith('.') or (name.endswith('.blobs') and name.removesuffix('.blobs') not in present):
                remove_tree(os.path.join(self.folder, name))

    def id_base(self, wanted: int) -> int:
        """The first of the ids that own the files of layers: `wanted`, unless stored layers have others.

        Writes only where that changes: a start on a full disk has no room. Raises OSError, FaasError.
        """
        path = os.path.join(self.folder, 'id_base')
        try:
            with open(path) as file:
                text = file.read()
        except FileNotFoundError:
            text = ''
        if text != f'{wanted}\n' and not self.present():
            files.write_file(path, f'{wanted}\n', 0o600)
            return wanted
        if not text.strip().isdecimal():
            raise FaasError(
                f'{path} does not say which ids own the files of the layers',
                "write the first one there: 'stat -c %u' of a layer shows it",
            )
        return int(text)

    def path(self, digits: str) -> str:
        return os.path.join(self.folder, digits)

    def present(self) -> set[str]:
        """The digits of those that are stored."""
        try:
            return set(filter(is_hex, os.listdir(self.folder)))
        except FileNotFoundError:
            return set()

    def collect(self, wanted: Callable[[], set[str]]) -> None:
        """Remove what is not in wanted() and is not pinned by a Staging."""
        with self._lock:  # a Staging names its layers in a spec before it unpins them
            gone, present = [], self.present()
            for digits in present - wanted() if present else ():  # wanted() reads every function's spec
                if not self._pins[digits]:
                    gone.append(self.path(f'.{digits}.{next(self._numbers)}'))
                    os.rename(self.path(digits), gone[-1])  # so that a kill leaves no half of a layer under its name
                    gone.append(self.path(f'{digits}.blobs'))
        for path in gone:
            remove_tree(path)

    def pin_present(self) -> set[str]:
        """Keep those that are stored from being collected. Returns them, for unpin()."""
        with self._lock:
            pinned = self.present()
            self._pins.update(pinned)
            return pinned

    def pin(self, wanted: Iterable[str]) -> None:
        with self._lock:
            self._pins.update(wanted)

    def unpin(self, pinned: Iterable[str]) -> None:
        with self._lock:
            self._pins.subtract(pinned)
            self._pins = +self._pins  # without those at 0

    def blobs(self, digits: str) -> list[str]:
        """The digests of the packed blobs that hold this layer, as far as they were seen."""
        try:
            with open(self.path(f'{digits}.blobs')) as file:
                return list(filter(is_hex, file.read().split()))
        except FileNotFoundError:
            return []

    def add_blob(self, digits: str, blob: str) -> None:
        """Remember that the blob was found to hold the layer. Raises OSError."""
        with self._lock:
            known = self.blobs(digits)
            if blob not in known:
                files.write_file(self.path(f'{digits}.blobs'), '\n'.join([blob, *known[: MOST_BLOBS - 1]]), 0o600)

    def add(self, digits: str, folder: str) -> None:
        """Move a finished layer here, unless another Staging has stored the same meanwhile."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with self._lock:
            if not os.path.lexists(self.path(digits)):
                os.rename(folder, self.path(digits))
