"""Source folder → a revision on disk, unpacked by a process without privileges in a root directory of its own.

Run as a program it is that process: archive on stdin, the empty target folder as its argument.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile

MOST_ENTRIES = 20_000
MOST_DEPTH = 32
NOBODY = 65534
CHUNK = 1 << 18
WORKER_CPU_S, WORKER_MEMORY = 120, 1 << 30


class Spec(__import__('typing').NamedTuple):
    kind: str = 'handler'
    args: tuple = ()
    env: dict = {}
    cwd: str = '/'
    user: str = ''
    ports: tuple = ()
    stop_signal: str = 'SIGTERM'
    layers: tuple = ()
    start_timeout_s: float = None
    concurrency: int = None


class ImageError(Exception):
    """The archive cannot become a function; one line, and `hint` says what to do."""

    def __init__(self, text, hint=None):
        super().__init__(text)
        self.hint = hint


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


class Staging:
    """A folder below `functions` in which a revision grows, for as long as the context lasts."""

    def __init__(self, functions):
        with disk_full_is_named():
            os.makedirs(functions, mode=0o700, exist_ok=True)
            self._folder = tempfile.mkdtemp(dir=functions, prefix='.incoming-')
            self._tree = os.path.join(self._folder, 'tree')
            os.mkdir(self._tree)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self._folder, ignore_errors=True)

    def receive(self, read, length):
        """Spool and unpack a tar archive of `length` bytes from read(n). Raises ImageError; EOFError if it is cut."""
        import shell  # not in the worker: it has no use for it

        with disk_full_is_named(), tempfile.TemporaryFile(dir=self._folder) as archive:
            while length:
                chunk = read(min(length, CHUNK))
                if not chunk:
                    raise EOFError
                archive.write(chunk)
                length -= len(chunk)
            archive.seek(0)
            done = shell.run(
                ['/usr/bin/python3', '-I', '-S', os.path.abspath(__file__), self._tree],
                stdin=archive,
                ok=range(256),
                timeout_s=300,
            )
        if done.returncode == errno.ENOSPC:
            raise DiskFull
        if done.returncode:
            raise ImageError(
                (done.stderr.strip().splitlines() or ['the archive cannot be unpacked'])[-1],
                'send a tar of the folder that holds handler.py',
            )
        shell.run(['chown', '-hR', '0:0', self._tree], timeout_s=300)

    def keep(self, path):
        """Move the finished tree to `path`, to stay there after a power cut."""
        import shell

        with disk_full_is_named():
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(self._tree, path)
            shell.sync_folder(os.path.dirname(path))
            shell.sync_folder(os.path.dirname(os.path.dirname(path)))


def unpack(archive):
    """Unpack a tar of files, folders and links that stay inside into the current folder. Raises ImageError."""
    made = set()
    with tarfile.open(fileobj=archive, mode='r|') as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            if name == '.' and member.isdir():
                continue
            inside(member.name, member.name)
            made.update((name, *map(str, pathlib.PurePath(name).parents)))
            if len(made) > MOST_ENTRIES:
                raise ImageError(f'more than {MOST_ENTRIES} files and folders')
            os.makedirs(os.path.dirname(name) or '.', mode=0o755, exist_ok=True)
            if member.isdir():
                os.makedirs(name, mode=0o755, exist_ok=True)
            elif member.issym():
                if os.path.isabs(member.linkname):
                    raise ImageError(f'{member.name!r} links to {member.linkname!r}, out of the folder')
                inside(os.path.join(os.path.dirname(name), member.linkname), member.name)
                os.symlink(member.linkname, name)
            elif member.isreg() and not member.issparse():
                fd = os.open(
                    name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o755 if member.mode & 0o111 else 0o644
                )
                with open(fd, 'wb') as file:
                    shutil.copyfileobj(tar.extractfile(member), file, CHUNK)
            else:
                raise ImageError(f'{member.name!r} is neither file, folder nor symbolic link')
    if not os.path.isfile('handler.py'):
        raise ImageError('there is no handler.py in the folder')


def inside(path, name):
    """Raise ImageError unless `path` stays in the folder by its text alone."""
    parts = os.path.normpath(path).split('/')
    if os.path.isabs(path) or parts[0] == '..' or len(parts) > MOST_DEPTH or '\0' in path:
        raise ImageError(f'{name!r} leads out of the folder, or too deep into it')


def worker(folder):
    """Drop everything but `folder`, unpack stdin into it, precompile what is Python, and see that the disk has it."""
    import ctypes
    import py_compile
    import resource

    libc = ctypes.CDLL(None)
    ''.encode('latin-1'), ''.encode('ascii')  # codecs are imported at first use: there is no library behind chroot
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CPU, (WORKER_CPU_S, WORKER_CPU_S))  # it compiles what strangers wrote
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    os.chown(folder, NOBODY, NOBODY)
    os.chroot(folder)
    os.chdir('/')
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    unpack(sys.stdin.buffer)
    for where, _, names in os.walk('.'):
        for name in names:
            if name.endswith('.py'):  # the container sees it at /function, which tracebacks show
                path = os.path.join(where, name)
                with contextlib.suppress(Exception):  # said better when it is run
                    py_compile.compile(
                        path,
                        dfile=os.path.join('/function', os.path.relpath(path)),
                        doraise=True,
                        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                    )
    fd = os.open('.', os.O_RDONLY)
    if libc.syncfs(fd):
        raise OSError(errno.EIO, 'syncfs')


if __name__ == '__main__':
    try:
        with disk_full_is_named():
            worker(sys.argv[1])
    except DiskFull:
        sys.exit(errno.ENOSPC)
    except (ImageError, OSError, tarfile.TarError, EOFError, ValueError) as error:
        sys.exit(str(error) or type(error).__name__)
