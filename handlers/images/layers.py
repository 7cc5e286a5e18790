"""The layers that images share: `layers/SHA256/`, each stored once."""

import collections
import contextlib
import itertools
import os
import threading

from handlers.images.spec import is_hex
from host import files, process


def remove_tree(path):
    """Remove a folder that strangers filled, if it is there: through links it may be deeper than Python can recurse."""
    with contextlib.suppress(process.CommandError):
        process.run(['rm', '-rf', '--', path], timeout_s=300)


class Layers:
    """The layers that images share, in `folder`, each under the hex digits of its diff_id. Safe for threads.

    The folder is on the filesystem of the revisions, and one daemon's.
    """

    def __init__(self, folder):
        self.folder = folder
        self._lock, self._pins = threading.Lock(), collections.Counter()
        self._numbers = itertools.count()

    def prepare(self):
        """Make the folder, and remove what a killed run left half done. Raises OSError."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        for name in os.listdir(self.folder):
            if name.startswith('.'):
                remove_tree(os.path.join(self.folder, name))

    def id_base(self, wanted):
        """The first of the ids that own the files of layers: `wanted`, unless layers are there that have others."""
        path = os.path.join(self.folder, 'id_base')
        if not self.present():
            files.write_file(path, f'{wanted}\n', 0o600)
        with open(path) as file:
            return int(file.read())

    def path(self, digits):
        return os.path.join(self.folder, digits)

    def present(self):
        """The set of those that are stored."""
        try:
            return set(filter(is_hex, os.listdir(self.folder)))
        except FileNotFoundError:
            return set()

    def collect(self, wanted):
        """Remove what is not in wanted() and not needed by a Staging under way."""
        with self._lock:  # what a Staging lets go of while this looks around is named by then
            gone, present = [], self.present()
            for digits in present - wanted() if present else ():  # wanted() reads the spec of every function
                if not self._pins[digits]:
                    gone.append(self.path(f'.{digits}.{next(self._numbers)}'))
                    os.rename(self.path(digits), gone[-1])  # whole or not at all, however we end
        for path in gone:
            remove_tree(path)

    def pin_present(self):
        """Keep those that are stored from being collected; the set, for unpin()."""
        with self._lock:
            pinned = self.present()
            self._pins.update(pinned)
            return pinned

    def pin(self, wanted):
        with self._lock:
            self._pins.update(wanted)

    def unpin(self, pinned):
        with self._lock:
            self._pins.subtract(pinned)
            self._pins = +self._pins  # without those at 0

    def add(self, digits, folder):
        """Move a finished layer here, unless somebody else was quicker."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with self._lock:
            if not os.path.lexists(self.path(digits)):
                os.rename(folder, self.path(digits))
