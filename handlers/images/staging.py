"""Makes a revision on disk from an upload: a source folder, or an image whose layers are stored once.

A revision is `functions/ID/REVISION/` with spec.json, and the files of a folder in tree/. Images share
`layers/SHA256/`, named by the digest of the unpacked layer. Layers are stored as they are mounted: id_base is added to
the ids of the owners, so that they are unused on this machine, and what a layer removes is marked for overlayfs.
"""

import contextlib
import errno
import json
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO

from handlers.images.layers import Layers, remove_tree
from handlers.images.spec import Spec, is_hex, is_tuple
from handlers.images.streams import ImageError
from host import disk, files, process

CHUNK = 1 << 20
UNPACK_LEAST_S, UNPACK_MOST_S, UNPACK_BYTES_A_SECOND = 30, 900, 100_000  # bytes as they were uploaded
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'unpack.py')


class Writer:
    """Writes to an unbuffered file in a thread, while the caller reads the next chunk."""

    def __init__(self, file: BinaryIO) -> None:
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

    def write(self, chunk: bytes) -> None:
        """Have it written soon. Raises OSError when an earlier chunk could not be written."""
        if self._error:
            raise self._error
        self._chunks.put(chunk)

    def close(self) -> None:
        """Wait until all is written. Raises OSError when that failed."""
        self._chunks.put(None)
        self._thread.join()
        if self._error:
            raise self._error


class Staging:
    """A folder below `functions` in which a revision is made. It is removed at the end of the context.

    The files of an image belong to the 65,536 ids from id_base on. An upload may unpack to most_bytes. `reference`
    names the image to take from an archive of several. The layers that the revision needs are kept meanwhile.
    """

    def __init__(
        self, functions: str, layers: Layers, *, id_base: int, most_bytes: int, reference: str | None = None
    ) -> None:
        self._functions = functions
        self._layers, self._pinned, self._new, self.spec = layers, set(), [], None
        self.removal_s = 300  # how long the removal may take; the next start of faasd removes what is left
        self._blobs = []  # (digest of the layer, digest of a blob that holds it)
        self._order = {'id_base': id_base, 'most_bytes': most_bytes, 'reference': reference}
        with disk.refusals(functions), contextlib.ExitStack() as undo:
            os.makedirs(functions, mode=0o700, exist_ok=True)
            self._folder = tempfile.mkdtemp(dir=functions, prefix='.incoming-')
            undo.push(self.__exit__)
            self._work = os.path.join(self._folder, 'work')
            os.mkdir(self._work, mode=0o700)
            undo.pop_all()

    def __enter__(self) -> 'Staging':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, frames: TracebackType | None) -> None:
        remove_tree(self._folder, self.removal_s)
        self._layers.unpin(self._pinned)
        self._pinned = set()

    @property
    def tree(self) -> str:
        """The unpacked folder of a function that is not an image."""
        return os.path.join(self._work, 'tree')

    def receive(
        self, read: Callable[[int], bytes], length: int | None, is_wanted: Callable[[], bool] = lambda: True
    ) -> Spec:
        """Store and unpack an archive of `length` bytes from read(n). None: read until the end.

        Unpacking ends when is_wanted() says no. Returns the Spec. Raises ImageError; DiskRefuses; EOFError if the
        archive is cut; ConnectionAbortedError if it is not wanted any more; what read() raises.
        """
        with disk.refusals(self._functions), tempfile.TemporaryFile(dir=self._folder, buffering=0) as spool:
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
            answer = self._unpack(spool, is_wanted)
        try:
            self.spec = Spec.checked(answer['spec'])
            self._new = answer['layers']
            if not is_tuple(tuple(self._new), is_hex) or not set(self._new) <= set(self.spec.layers):
                raise ValueError('other layers were made than announced')
            for name in self._new if self.spec.kind == 'image' else ['tree']:
                if os.path.islink(os.path.join(self._work, name)) or not os.path.isdir(os.path.join(self._work, name)):
                    raise ValueError(f'{name} was not made')
            needed = set(self.spec.layers)
            if missing := needed - self._pinned - set(self._new):
                raise ValueError(f'{len(missing)} layers were not made')
            self._blobs = [(digits, blob) for digits in needed for blob in answer['blobs'].get(digits, ())]
            if not all(is_hex(blob) for _, blob in self._blobs):
                raise ValueError('a digest is none')
            for digits, folders in answer['opaque'].items():
                for folder in folders if digits in self._new else ():
                    make_opaque(os.path.join(self._work, digits), folder)
            if any(answer['opaque'].values()):
                files.sync_file_system(self._work)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ImageError(f'the archive cannot be unpacked: {error}') from error
        self._layers.pin(needed)
        self._layers.unpin(self._pinned)
        self._pinned = needed
        if self.spec.kind != 'image':
            process.run(['chown', '-hR', '0:0', os.path.join(self._work, 'tree')], timeout_s=300)
        return self.spec

    def _unpack(self, spool: BinaryIO, is_wanted: Callable[[], bool]) -> dict:
        """The answer of the unprivileged process. Raises ImageError, DiskFull, ConnectionAbortedError."""
        order = os.path.join(self._folder, 'order.json')
        with open(order, 'w') as file:
            stored = {digits: self._layers.blobs(digits) for digits in self._pinned}
            json.dump({**self._order, 'folder': self._work, 'stored': stored, 'parent': os.getpid()}, file)
        try:
            argv = ['/usr/bin/python3', '-I', '-S', WORKER, order]
            size = os.fstat(spool.fileno()).st_size
            timeout_s = min(UNPACK_MOST_S, UNPACK_LEAST_S + size // UNPACK_BYTES_A_SECOND)
            done = process.run_while(is_wanted, argv, stdin=spool, timeout_s=timeout_s)
        except process.CommandError as error:
            if not is_wanted():
                raise ConnectionAbortedError from error
            raise ImageError(f'the archive cannot be unpacked: {error.reason}') from error
        if done.returncode == errno.ENOSPC:
            raise disk.refusal(errno.ENOSPC, self._functions)
        try:
            answer = json.loads(done.stdout)
            if error := answer.get('error'):
                hint = answer.get('hint')
                raise ImageError(one_line(error), hint and one_line(hint))
        except (ValueError, AttributeError, RecursionError) as error:
            why = (done.stderr.strip().splitlines() or ['without a word'])[-1]
            raise ImageError(f'the archive cannot be unpacked: {one_line(why)}') from error
        return answer

    def keep(self, path: str) -> None:
        """Move the finished revision to `path` and its layers to the Layers, to stay there after a power cut."""
        with disk.refusals(self._functions):
            for digits in self._new:
                self._layers.add(digits, os.path.join(self._work, digits))
            if self._new:
                files.sync_folder(self._layers.folder)
                files.sync_folder(os.path.dirname(self._layers.folder))
            for digits, blob in self._blobs:
                self._layers.add_blob(digits, blob)
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


def make_opaque(top: str, path: str) -> None:
    """Mark the folder `path` below `top` so that overlayfs shows nothing of the layers under it. The caller syncs it.

    Only the daemon can set this attribute. The kind that users can set does not work: overlayfs must set the same in
    the writable layer of an instance, which is a tmpfs, and a tmpfs takes user attributes only since Linux 6.6.
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
    except (FileNotFoundError, NotADirectoryError):  # a later entry of the layer has removed it
        pass
    finally:
        os.close(fd)


def one_line(text: object) -> str:
    """The text with blanks in place of line ends, cut to 500 characters."""
    return ' '.join(str(text).split())[:500]
