"""Root file systems: the one that folder functions share, and that of an instance of an image.

The latter is the read-only layers, and over them a writable layer in memory. All of it is mounted in a mount namespace
that the OCI runtime inherits. The host does not see it, and it is gone when the container ends.
"""

import contextlib
import ctypes
import glob
import os
import re
import shutil
import stat
import struct
import threading
from collections.abc import Callable, Iterable

from host import process
from host.errors import FaasError

# Numbers of the system calls, the same on every architecture since Linux 5.1, and of linux/mount.h.
OPEN_TREE, MOVE_MOUNT, OPENAT2, MOUNT_SETATTR = 428, 429, 437, 442
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_IDMAP = 1, 2, 4, 8, 0x100000
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 1 << 18, 2, 4
CLONE_NEWNS = 0x20000
RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 4, 0x10

# What a folder sees of the host's /etc: what Debian's packages keep there to find themselves, and settings that
# interpreters need. Nothing of it may hold a secret: people write passwords into /etc/mysql or /etc/php/*/fpm.
SETTINGS = (
    *('/etc/alternatives', '/etc/ld.so.cache', '/etc/localtime', '/etc/timezone', '/etc/mime.types', '/etc/magic'),
    *('/etc/ssl/certs', '/etc/ssl/openssl.cnf', '/etc/fonts', '/etc/protocols', '/etc/services', '/etc/java-*-openjdk'),
    *('/etc/php/*/cli', '/etc/php/*/mods-available', '/etc/perl', '/etc/python3*', '/etc/ImageMagick-*'),
)
MOST_INODES = 65536  # of the writable layer
MOST_ACCOUNTS = 1 << 20  # bytes of an image's /etc/passwd or /etc/group

libc = ctypes.CDLL(None, use_errno=True)


class ImageUnusable(FaasError):
    """The image cannot run as it is, or not on this server."""


def _checked(result, what):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f'{what}: {os.strerror(number)}')
    return result


def apart(function: Callable[[], object]) -> object:
    """What function() returns. It runs in a thread with its own mount namespace and working directory."""
    answer = []

    def run():
        try:
            _checked(libc.unshare(CLONE_NEWNS), 'unshare')
            _checked(libc.mount(None, b'/', None, MS_REC | MS_PRIVATE, None), 'mount')
            answer.append((function(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=run, name='rootfs')
    thread.start()
    thread.join()
    ((value, error),) = answer
    if error:
        raise error
    return value


def lay_out(root: str) -> None:
    """Make or update the root file system that all folder functions share: mount points, links, and the runtime."""
    # With a user namespace every mount point must exist, and a tmpfs gets the mode of its mount point (runc 1.1). So
    # /tmp is not for everybody: a folder has one id, and users of the host can reach this one.
    for folder in ('dev', 'etc', 'function', 'opt/faas', 'proc', 'run', 'sys', 'tmp', 'usr', 'var'):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    os.chmod(os.path.join(root, 'tmp'), 0o755)  # a former faasd made it 1777
    links = {'control.sock': 'run/faas/control.sock', 'var/run': '/run', 'var/tmp': '/tmp'}
    for name in ('bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32'):
        if os.path.islink(f'/{name}'):
            links[name] = os.readlink(f'/{name}')
    for name, target in links.items():
        with contextlib.suppress(FileExistsError):
            os.symlink(target, os.path.join(root, name))
    for name, text in (
        ('passwd', 'root:x:0:0:function:/tmp:/usr/sbin/nologin\nnobody:x:65534:65534::/:/usr/sbin/nologin\n'),
        ('group', 'root:x:0:\nnogroup:x:65534:\n'),
        ('hosts', '127.0.0.1 localhost\n::1 localhost\n'),
        ('nsswitch.conf', 'passwd: files\ngroup: files\nhosts: files dns\n'),
        ('resolv.conf', ''),  # a mount point; an instance with DNS has another there
    ):
        with open(os.path.join(root, 'etc', name), 'w') as file:
            file.write(text)
    for path in glob_settings():
        where = root + path
        if os.path.isdir(path):
            os.makedirs(where, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(where), exist_ok=True)
            with open(where, 'a'):
                pass
    for module in ('runtime.py', 'protocol.py', 'pace.py'):
        shutil.copy(
            os.path.join(os.path.dirname(os.path.abspath(__file__)), module),
            os.path.join(root, 'opt/faas', module),
        )
    compile_all = ['/usr/bin/python3', '-I', '-S', '-m', 'compileall', '-q', '--invalidation-mode=unchecked-hash']
    process.run([*compile_all, '-s', root, '-p', '/', os.path.join(root, 'opt/faas')])


def glob_settings() -> list[str]:
    """The files and folders of SETTINGS that this host has."""
    found = sorted(path for pattern in SETTINGS for path in glob.glob(pattern))
    return [path for path in found if os.path.isdir(path) or os.path.isfile(path)]


def settings_shown(root: str) -> list[str]:
    """Those that lay_out() has made a mount point for, and that are there still."""
    return [path for path in glob_settings() if os.path.exists(root + path)]


def hosts_of(name: str) -> str:
    """The text of /etc/hosts of an instance."""
    return f'127.0.0.1 localhost {name}\n::1 localhost {name}\n'


def mount(where: str, layers: list[str], ids: int, size: int, owner: int) -> str:
    """Mount the root file system below the folder `where` and return its path. To be called by apart().

    `layers` are the folders of the image's layers, the bottom one first. `ids` (borrowed) is the user namespace that
    maps the owners of the layers to ids of the instance. `size` is how many bytes the instance can write. `owner` is
    the host's id of the instance's root.
    """
    os.chdir(where)
    mount_memory('.', size, MOST_INODES, 0o755)
    os.chdir(where)  # again: into the file system that is mounted there now
    for folder in ('layers', 'upper', 'work', 'root'):
        os.mkdir(folder)
    # The options of a mount are at most one page long, so the names are short. Of a layer that occurs twice the upper
    # one decides.
    layers = list(dict.fromkeys(reversed(layers)))
    for number, layer in enumerate(layers):
        os.mkdir(f'layers/{number}')
        map_ids(layer, f'layers/{number}', ids, MOUNT_ATTR_RDONLY)
    os.chmod('upper', stat.S_IMODE(os.stat('layers/0').st_mode))
    os.chown('upper', owner, owner)
    os.symlink('run/faas/control.sock', 'upper/control.sock')
    os.chdir('layers')
    options = (
        f'lowerdir={":".join(map(str, range(len(layers))))},upperdir=../upper,workdir=../work'
        ',redirect_dir=nofollow,metacopy=off,index=off,xino=off'
    )
    _checked(libc.mount(b'overlay', b'../root', b'overlay', MS_NODEV, options.encode()), 'mount of the layers')
    return os.path.join(where, 'root')


def scratch(where: str, lower: str, paths: Iterable[str]) -> str:
    """Mount at `where` a tmpfs with the read-only tree `lower` that has also the folders `paths`; returns its path.

    To be called by apart().
    """
    _checked(libc.mount(b'tmpfs', os.fsencode(where), b'tmpfs', MS_NOSUID | MS_NODEV, b'mode=755'), 'mount')
    points, root = os.path.join(where, 'points'), os.path.join(where, 'root')
    os.mkdir(root)
    for path in paths:
        os.makedirs(points + path)
    options = os.fsencode(f'lowerdir={points}:{lower}')
    _checked(libc.mount(b'overlay', os.fsencode(root), b'overlay', MS_NODEV, options), 'mount of the root')
    return root


def map_ids(layer: str, where: str, ids: int, attributes: int = 0) -> None:
    """Mount the folder `layer` at `where` with the owners mapped by the user namespace `ids`. Raises ImageUnusable."""
    try:
        attach(layer, where, attributes | MOUNT_ATTR_NODEV, ids)
    except CannotMap as error:
        raise ImageUnusable(
            f'the file system of {os.path.dirname(layer)} cannot map ids (ext4, xfs and btrfs can): {error}'
        ) from error


class CannotMap(Exception):
    """The kernel refuses these attributes of a mount."""


def attach(source: str | int, where: str, attributes: int, ids: int | None = None) -> None:
    """Mount the folder `source`, a path or a descriptor (borrowed), at `where`, without what is mounted below it.

    `attributes` are MOUNT_ATTR_…, and no other holds. `ids` (borrowed) is the user namespace that maps the owners.
    To be called by apart(). Raises OSError; CannotMap.
    """
    fd, path = (source, b'') if isinstance(source, int) else (AT_FDCWD, os.fsencode(source))
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH
    tree = _checked(libc.syscall(OPEN_TREE, fd, path, flags), 'open_tree')
    try:
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
        wanted = attributes | (0 if ids is None else MOUNT_ATTR_IDMAP)
        packed = struct.pack('QQQQ', wanted, MOUNT_ATTR_RDONLY & ~attributes, MS_PRIVATE, ids or 0)
        if libc.syscall(MOUNT_SETATTR, tree, b'', AT_EMPTY_PATH, packed, len(packed)):
            raise CannotMap(os.strerror(ctypes.get_errno()))
        _checked(
            libc.syscall(MOVE_MOUNT, tree, b'', AT_FDCWD, os.fsencode(where), MOVE_MOUNT_F_EMPTY_PATH), 'move_mount'
        )
    finally:
        os.close(tree)


def mount_memory(where: str, size: int, inodes: int, mode: int) -> None:
    """Mount a file system in memory, of `size` bytes. To be called by apart()."""
    options = f'mode={mode:o},size={size},nr_inodes={inodes}'
    _checked(libc.mount(b'tmpfs', os.fsencode(where), b'tmpfs', MS_NOSUID | MS_NODEV, options.encode()), 'mount')


def mount_over(lower: str, upper: str, where: str) -> None:
    """Mount at `where` what is in both folders, read-only; `upper` decides. To be called by apart()."""
    options = f'lowerdir={upper}:{lower}'
    _checked(libc.mount(b'overlay', os.fsencode(where), b'overlay', MS_NODEV, options.encode()), 'mount')


def open_at(folder: int, path: str, flags: int, resolve: int) -> int:
    """A descriptor (owned) of openat2(2). Raises OSError."""
    how = struct.pack('QQQ', flags | os.O_CLOEXEC, 0, resolve)  # struct open_how of linux/openat2.h
    return _checked(libc.syscall(OPENAT2, folder, path.encode(), how, len(how)), path)


def read_within(root: str, path: str) -> list[str]:
    """The lines of the text file `path` in a tree of a stranger, [] without one. Links cannot lead out of the tree."""
    fd = open_within(root, path)
    if fd is None:
        return []
    with open(fd, 'rb') as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return []
        return file.read(MOST_ACCOUNTS).decode(errors='replace').splitlines()


def open_within(root: str, path: str, flags: int = 0) -> int | None:
    """A descriptor (owned by the caller) to read `path` in a tree of a stranger. None: there is no such thing."""
    top = os.open(root, os.O_PATH | os.O_CLOEXEC)
    try:
        return open_at(top, path, flags | os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, RESOLVE_IN_ROOT)
    except OSError:
        return None
    finally:
        os.close(top)


def find_user(root: str, user: str) -> tuple[dict, str]:
    """({'uid', 'gid', 'additionalGids'}, home) for the USER of an image: a name or number, perhaps with :group.

    The OCI image specification, config.md, says how. Raises ImageUnusable.
    """
    wanted, _, wanted_group = user.partition(':')
    accounts = [line.split(':') for line in read_within(root, 'etc/passwd')]
    groups = [line.split(':') for line in read_within(root, 'etc/group')]
    wanted = wanted or '0'
    entry = next((each for each in accounts if len(each) >= 6 and wanted in (each[0], each[2])), None)
    if entry is None and not wanted.isdecimal():
        raise ImageUnusable(f"the image's user {wanted!r} is not in the image's /etc/passwd")
    uid = _number(entry[2] if entry else wanted)
    gid = _number(entry[3]) if entry else 0
    more = []
    if wanted_group:
        found = next((each for each in groups if len(each) >= 3 and wanted_group in (each[0], each[2])), None)
        if found is None and not wanted_group.isdecimal():
            raise ImageUnusable(f"the image's group {wanted_group!r} is not in the image's /etc/group")
        gid = _number(found[2] if found else wanted_group)
    elif entry:
        more = [_number(each[2]) for each in groups if len(each) >= 4 and entry[0] in each[3].split(',')]
    return {'uid': uid, 'gid': gid, 'additionalGids': [gid, *more]}, (entry[5] if entry else '') or '/'


def _number(text):
    if not re.fullmatch('[0-9]{1,5}', text, re.ASCII) or int(text) > 65535:
        raise ImageUnusable(f"the image's user or group has the number {text!r}, and 65535 is the greatest")
    return int(text)


