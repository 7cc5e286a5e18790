"""What was uploaded → a revision on disk: a source folder, or an image whose layers are stored once.

A revision is `functions/ID/REVISION/` with its spec.json, and a folder's files in tree/. Images share
`layers/SHA256/`, named by what a layer unpacks to. Layers lie there as they are mounted: with their owners' ids moved
up by id_base, which are nobody's on this machine, and with overlayfs's marks for what they take away.
"""

import contextlib
import errno
import json
import os
import queue
import tempfile
import threading

from handlers.images.archive import ImageError
from handlers.images.layers import remove_tree
from handlers.images.spec import Spec, is_hex, is_tuple
from host import files, process

CHUNK = 1 << 20
UNPACK_TIMEOUT_S = 900
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'unpack.py')


class DiskFull(ImageError):
    """No space left while a revision was staged."""

    status = 507

    def __init__(self):
        super().__init__('no space left on the disk', 'free some space under /var/lib/faasd and deploy again')


@contextlib.contextmanager
def disk_full_is_named():
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull from error
        raise


class Writer:
    """Writes to an unbuffered file beside the caller, who meanwhile reads what comes next."""

    def __init__(self, file):
        self._file, self._chunks, self._error = file, queue.Queue(4), None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        for chunk in iter(self._chunks.get, None):
            try:
                while chunk and not self._error:
                    chunk = chunk[self._file.write(chunk) :]
            except OSError as error:
                self._error = error

    def write(self, chunk):
        """Have it written soon. Raises OSError when an earlier one could not be."""
        if self._error:
            raise self._error
        self._chunks.put(chunk)

    def close(self):
        """Wait until all is written. Raises OSError when it could not be."""
        self._chunks.put(None)
        self._thread.join()
        if self._error:
            raise self._error


class Staging:
    """A folder below `functions` in which a revision grows, for as long as the context lasts.

    Files of strangers belong to the 65,536 ids from id_base on, and unpack to no more than most_bytes. `reference` says
    which image is meant, where an archive holds several. Layers that it needs are not collected while it lasts.
    """

    def __init__(self, functions, layers, *, id_base, most_bytes, reference=None):
        self._layers, self._pinned, self._new, self.spec = layers, set(), [], None
        self._order = {'id_base': id_base, 'most_bytes': most_bytes, 'reference': reference}
        with disk_full_is_named(), contextlib.ExitStack() as undo:
            os.makedirs(functions, mode=0o700, exist_ok=True)
            self._folder = tempfile.mkdtemp(dir=functions, prefix='.incoming-')
            undo.callback(self.__exit__)
            self._work = os.path.join(self._folder, 'work')
            os.mkdir(self._work, mode=0o700)
            undo.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        remove_tree(self._folder)
        self._layers.unpin(self._pinned)
        self._pinned = set()

    def receive(self, read, length):
        """Spool and unpack an archive of `length` bytes from read(n), or of all bytes that it gives (None).

        Returns its Spec. Raises ImageError; EOFError if it is cut; what read() raises.
        """
        with disk_full_is_named(), tempfile.TemporaryFile(dir=self._folder, buffering=0) as spool:
            with contextlib.closing(Writer(spool)) as writer:
                while length is None or length:
                    chunk = read(CHUNK if length is None else min(length, CHUNK))
                    if not chunk:
                        if length is None:
                            break
                        raise EOFError
                    length = length and length - len(chunk)
                    writer.write(chunk)
            spool.seek(0)
            self._pinned = self._layers.pin_present()
            answer = self._unpack(spool)
        try:
            self.spec = Spec.checked(answer['spec'])
            self._new = answer['layers']
            if not is_tuple(tuple(self._new), is_hex) or not set(self._new) <= set(self.spec.layers):
                raise ValueError('it made other layers than it says')
            for name in self._new if self.spec.kind == 'image' else ['tree']:
                if os.path.islink(os.path.join(self._work, name)) or not os.path.isdir(os.path.join(self._work, name)):
                    raise ValueError(f'it did not make {name}')
            if missing := set(self.spec.layers) - self._pinned - set(self._new):
                raise ValueError(f'it did not make {len(missing)} layers')
            for digits, folders in answer['opaque'].items():
                for folder in folders if digits in self._new else ():
                    make_opaque(os.path.join(self._work, digits), folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(f'the archive cannot be unpacked: {error}') from error
        needed = set(self.spec.layers)
        self._layers.pin(needed)
        self._layers.unpin(self._pinned)
        self._pinned = needed
        if self.spec.kind != 'image':
            process.run(['chown', '-hR', '0:0', os.path.join(self._work, 'tree')], timeout_s=300)
        return self.spec

    def _unpack(self, spool):
        """What the unprivileged process says of the archive. Raises ImageError."""
        order = os.path.join(self._folder, 'order.json')
        with open(order, 'w') as file:
            json.dump({**self._order, 'folder': self._work, 'stored': sorted(self._pinned)}, file)
        try:
            done = process.run(
                ['/usr/bin/python3', '-I', '-S', WORKER, order], stdin=spool, ok=range(256), timeout_s=UNPACK_TIMEOUT_S
            )
        except process.CommandError as error:
            raise ImageError(f'the archive cannot be unpacked: {error.reason}') from error
        if done.returncode == errno.ENOSPC:
            raise DiskFull
        try:
            answer = json.loads(done.stdout)
            if error := answer.get('error'):
                hint = answer.get('hint')
                raise ImageError(one_line(error), hint and one_line(hint))
        except (ValueError, AttributeError, RecursionError) as error:
            why = (done.stderr.strip().splitlines() or ['without a word'])[-1]
            raise ImageError(f'the archive cannot be unpacked: {one_line(why)}') from error
        return answer

    def keep(self, path):
        """Move the finished revision to `path`, and its layers to theirs, to stay there after a power cut."""
        with disk_full_is_named():
            for digits in self._new:
                self._layers.add(digits, os.path.join(self._work, digits))
            if self._new:
                files.sync_folder(self._layers.folder)
                files.sync_folder(os.path.dirname(self._layers.folder))
            revision = os.path.join(self._folder, 'revision')
            os.mkdir(revision, mode=0o755)
            if self.spec.kind != 'image':
                os.rename(os.path.join(self._work, 'tree'), os.path.join(revision, 'tree'))
            files.write_file(os.path.join(revision, 'spec.json'), self.spec.to_json())
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            remove_tree(path)
            os.rename(revision, path)
            files.sync_folder(os.path.dirname(path))
            files.sync_folder(os.path.dirname(os.path.dirname(path)))


def make_opaque(top, path):
    """Mark the folder `path` below `top` so that overlayfs shows nothing of the layers under it.

    An attribute that only the daemon can set: a tmpfs takes those of users since Linux 6.6 alone, and overlayfs must be
    able to set the same in an instance's writable layer.
    """
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in path.split('/'):
            if name == '..':
                raise ValueError(f'{path!r} leads out of its layer')
            if name:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
        os.setxattr(fd, 'trusted.overlay.opaque', b'y')
        os.fsync(fd)
    except (FileNotFoundError, NotADirectoryError):  # removed by what came later in the layer
        pass
    finally:
        os.close(fd)


def one_line(text):
    return ' '.join(str(text).split())[:500]
