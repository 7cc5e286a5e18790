"""What was uploaded → a revision on disk: a source folder, or an image whose layers are stored once.

A revision is `functions/ID/REVISION/` with its spec.json, and a folder's files in tree/. Images share
`layers/SHA256/`, named by what a layer unpacks to. Layers lie there as they are mounted: with their owners' ids moved
up by id_base, which are nobody's on this machine, and with overlayfs's marks for what they take away.
"""

import collections
import contextlib
import errno
import itertools
import json
import os
import queue
import re
import signal
import tempfile
import threading
from typing import NamedTuple

import shell
from handlers.archive import MOST_LAYERS, ImageError

NOBODY = 65534
CHUNK = 1 << 20
UNPACK_TIMEOUT_S = 900
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'unpack.py')


class DiskFull(ImageError):
    """No space left while a revision was staged."""

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


# What is started, and how


class Spec(NamedTuple):
    """How a revision is started.

    kind is 'handler' (a handler.py), 'command' (args in a folder) or 'image' (args over `layers`, hex digests from the
    bottom). user is '' for root, else as the image has it. ports are those of TCP that it says it serves.
    """

    kind: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str = '/function'
    user: str = ''
    ports: tuple[int, ...] = ()
    stop_signal: str = 'SIGTERM'
    layers: tuple[str, ...] = ()
    start_timeout_s: float | None = None
    concurrency: int | None = None

    def to_json(self):
        return json.dumps(self._asdict(), indent=1) + '\n'

    @classmethod
    def from_json(cls, text):
        """The Spec in a text. Raises ValueError unless every field is as it must be."""
        try:
            return cls.checked(json.loads(text))
        except RecursionError as error:
            raise ValueError('the spec is nested too deep') from error

    @classmethod
    def checked(cls, said):
        """The Spec that a dict from JSON describes. Raises ValueError."""
        if not isinstance(said, dict) or said.keys() - set(cls._fields):
            raise ValueError('the spec is not made of its fields')
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        spec = cls(**{'kind': None, **said})
        texts = (*(spec.args if isinstance(spec.args, tuple) else ()), spec.cwd, spec.user)
        env = spec.env.items() if isinstance(spec.env, dict) else [(None, None)]
        for name, right in (
            ('kind', spec.kind in ('handler', 'command', 'image')),
            ('args', isinstance(spec.args, tuple) and all(map(is_text, texts))),
            ('env', all(is_text(key) and is_text(value) and key and '=' not in key for key, value in env)),
            ('cwd', is_text(spec.cwd) and spec.cwd.startswith('/') and '..' not in spec.cwd.split('/')),
            ('ports', is_tuple(spec.ports, lambda port: is_int(port, 1, 65535))),
            ('stop_signal', is_text(spec.stop_signal) and is_signal(spec.stop_signal)),
            ('layers', is_tuple(spec.layers, is_hex) and len(spec.layers) <= MOST_LAYERS),
            ('start_timeout_s', spec.start_timeout_s is None or is_number(spec.start_timeout_s, 0.1, 3600)),
            ('concurrency', spec.concurrency is None or is_int(spec.concurrency, 1, 100_000)),
        ):
            if not right:
                raise ValueError(f"the spec's {name} is not as it must be")
        if (spec.kind != 'handler' and not (spec.args and spec.args[0])) or (spec.kind == 'image') != bool(spec.layers):
            raise ValueError(f'the spec is not one of kind {spec.kind}')
        return spec


def is_text(value):
    """Whether it is text that a process can be given."""
    try:
        return isinstance(value, str) and '\0' not in value and os.fsencode(value) is not None
    except UnicodeEncodeError:
        return False


def is_tuple(value, each):
    return isinstance(value, tuple) and all(map(each, value))


def is_int(value, least, most):
    return type(value) is int and least <= value <= most


def is_number(value, least, most):
    return type(value) in (int, float) and least <= value <= most


def is_hex(value):
    return isinstance(value, str) and re.fullmatch('[0-9a-f]{64}', value) is not None


def is_signal(name):
    try:
        return signal_number(name) > 0
    except ValueError:
        return False


def signal_number(name):
    """The number of a Spec's stop_signal, such as SIGQUIT or SIGRTMIN+3. Raises ValueError."""
    found = re.fullmatch(r'(SIG[A-Z0-9]+)([+-][0-9]{1,2})?', name)
    if not found or found[1] not in signal.Signals.__members__:
        raise ValueError(f'there is no signal {name!r}')
    return signal.Signals[found[1]] + int(found[2] or 0)


def read_spec(folder):
    """The Spec of a revision's folder; without one it is a handler.py's, of an older version. Raises ValueError."""
    try:
        with open(os.path.join(folder, 'spec.json')) as file:
            return Spec.from_json(file.read())
    except FileNotFoundError:
        os.stat(folder)
        return Spec('handler')


def tree(folder):
    """Where a revision's files are, of a revision that is no image."""
    return os.path.join(folder, 'tree') if os.path.exists(os.path.join(folder, 'spec.json')) else folder


def remove_tree(path):
    """Remove a folder that strangers filled, if it is there: through links it may be deeper than Python can recurse."""
    with contextlib.suppress(shell.CommandError):
        shell.run(['rm', '-rf', '--', path], timeout_s=300)


# Layers


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
            shell.write_file(path, f'{wanted}\n', 0o600)
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


# A revision


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
            shell.run(['chown', '-hR', '0:0', os.path.join(self._work, 'tree')], timeout_s=300)
        return self.spec

    def _unpack(self, spool):
        """What the unprivileged process says of the archive. Raises ImageError."""
        order = os.path.join(self._folder, 'order.json')
        with open(order, 'w') as file:
            json.dump({**self._order, 'folder': self._work, 'stored': sorted(self._pinned)}, file)
        try:
            done = shell.run(
                ['/usr/bin/python3', '-I', '-S', WORKER, order], stdin=spool, ok=range(256), timeout_s=UNPACK_TIMEOUT_S
            )
        except shell.CommandError as error:
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
                shell.sync_folder(self._layers.folder)
                shell.sync_folder(os.path.dirname(self._layers.folder))
            revision = os.path.join(self._folder, 'revision')
            os.mkdir(revision, mode=0o755)
            if self.spec.kind != 'image':
                os.rename(os.path.join(self._work, 'tree'), os.path.join(revision, 'tree'))
            shell.write_file(os.path.join(revision, 'spec.json'), self.spec.to_json())
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            remove_tree(path)
            os.rename(revision, path)
            shell.sync_folder(os.path.dirname(path))
            shell.sync_folder(os.path.dirname(os.path.dirname(path)))


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
