"""The volumes of an instance: mounted from the file systems that the store has, and who has which."""

import contextlib
import os
import shutil
import stat
import threading
from typing import Protocol

from handlers.containers import rootfs
from handlers.images.spec import Spec
from handlers.images.wants import BadWant
from host import files
from host.errors import FaasError

FOLDER = 'files'  # what is mounted of the file system: in the top folder is lost+found, which initdb refuses
FOLDER_ID = 1000  # on the disk, of what a folder's one user owns
MOST_DEPTH = 100  # of folders that are copied from an image
OPTIONS = ['bind', 'rw', 'nosuid', 'nodev', 'noatime']
TAKEN = ('/proc', '/sys', '/dev', '/run', '/control.sock')
# The root file system of folders is the server's: these are links there, or mounts of their own.
TAKEN_BY_FOLDERS = (
    '/usr', '/function', '/opt/faas', '/etc', '/tmp', '/var/tmp',
    '/bin', '/sbin', '/lib', '/lib32', '/lib64', '/libx32',
)  # fmt: skip


class VolumeInUse(FaasError):
    """Another instance has the volume."""

    status = 409


class VolumeStore(Protocol):
    """Has the file systems of volumes."""

    def mount(self, name: str, where: str) -> None:
        """Mount the file system at the folder `where`, in the mount namespace of this thread. Raises FaasError."""


class Holders:
    """Which instances have which volumes. An instance that does not overlap has its volumes alone."""

    def __init__(self) -> None:
        self._holds: dict[str, tuple[str, dict[str, bool]]] = {}  # ident → (function, {volume: whether it overlaps})
        self._lock = threading.Lock()

    def take(self, ident: str, function: str, wanted: dict[str, bool], sure: bool = False) -> None:
        """Note what the instance has. Raises VolumeInUse, unless it is `sure` that it has it."""
        with self._lock:
            for other, held in self._holds.values():
                for name in () if sure else held.keys() & wanted.keys():
                    if not (held[name] and wanted[name]):
                        text = f'an instance of {other} has the volume {name}'
                        raise VolumeInUse(text, 'try again when it has ended')
            if wanted:
                self._holds[ident] = function, wanted

    def release(self, ident: str) -> None:
        with self._lock:
            self._holds.pop(ident, None)

    def users(self, name: str) -> list[str]:
        """The functions whose instances have the volume."""
        with self._lock:
            return sorted({function for function, held in self._holds.values() if name in held})


def check(spec: Spec) -> None:
    """Raise BadWant if a volume cannot be mounted where the Spec says."""
    paths = sorted(volume['path'] for volume in spec.settings.get('volumes', {}).values())
    taken = TAKEN if spec.layers else TAKEN + TAKEN_BY_FOLDERS
    for number, path in enumerate(paths):
        if any(is_within(path, each) or is_within(each, path) for each in taken):
            raise BadWant(f'volumes: {path} is taken', 'choose a place such as /data')
        if any(is_within(other, path) or is_within(path, other) for other in paths[:number]):
            raise BadWant(f'volumes: {path} is within the place of another', 'choose places apart from each other')


def is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f'{folder}/')


def add(config: dict, spec: Spec, where: str, store: VolumeStore, ids: int, base: int) -> None:
    """Mount the volumes of the Spec below `where`, and add them to the configuration. To be called by apart().

    `ids` (borrowed) is the user namespace that maps the owners on the disk to ids of the instance, `base` the host's
    id of its root. An image's root file system is mounted at `where`; a folder gets one that has the mount points.
    Raises FaasError, OSError.
    """
    wanted = spec.settings.get('volumes', {})
    if not spec.layers:
        places = [volume['path'] for volume in wanted.values()]
        config['root']['path'] = rootfs.scratch(where, config['root']['path'], places)
    root, user = config['root']['path'], config['process']['user']
    for number, (name, volume) in enumerate(sorted(wanted.items())):
        disk, inside = (os.path.join(where, f'{what}{number}') for what in ('disk', 'volume'))
        os.mkdir(disk)
        os.mkdir(inside)
        store.mount(name, disk)
        owner = (user['uid'], user['gid']) if spec.layers else (FOLDER_ID, FOLDER_ID)
        fill(disk, root if spec.layers else None, volume['path'], base, owner)
        rootfs.map_ids(os.path.join(disk, FOLDER), inside, ids)
        config['mounts'].append({'destination': volume['path'], 'type': 'bind', 'source': inside, 'options': OPTIONS})


def fill(disk: str, root: str | None, path: str, base: int, owner: tuple[int, int]) -> None:
    """Make the volume's folder in its file system, once: a copy of the image's folder `path`, or an empty one.

    Ids on the disk are those inside. An empty one belongs to `owner`. Raises FaasError, OSError.
    """
    final, new = os.path.join(disk, FOLDER), os.path.join(disk, f'{FOLDER}.new')
    if os.path.isdir(final):
        return
    shutil.rmtree(new, ignore_errors=True)  # of a faasd that was killed
    os.mkdir(new)
    source = rootfs.open_within(root, path, os.O_DIRECTORY) if root else None
    if source is None:
        os.chown(new, *owner)
    else:
        target = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy_tree(source, target, base)
        except OSError as error:
            raise FaasError(
                f'{path} of the image cannot be copied to the volume: {error.strerror}',
                'a larger volume may help: faas volume resize',
            ) from error
        finally:
            os.close(source)
            os.close(target)
    files.sync_file_system(disk)
    os.rename(new, final)
    files.sync_folder(disk)


def copy_tree(source: int, target: int, base: int, depth: int = 0) -> None:
    """Copy what is in a folder of an image, and its owner and mode; ids become less by `base`.

    Neither devices nor sockets are copied. Raises FaasError, OSError.
    """
    if depth > MOST_DEPTH:
        raise FaasError(f'the image has more than {MOST_DEPTH} folders in each other', 'make it less deep')
    with os.scandir(source) as entries:
        for entry in entries:
            info, name = entry.stat(follow_symlinks=False), entry.name
            if entry.is_symlink():
                os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
                os.chown(name, info.st_uid - base, info.st_gid - base, dir_fd=target, follow_symlinks=False)
            elif stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode):
                is_folder = stat.S_ISDIR(info.st_mode)
                with contextlib.ExitStack() as stack:
                    if is_folder:
                        os.mkdir(name, 0o700, dir_fd=target)
                    flags = (os.O_RDONLY | os.O_DIRECTORY) if is_folder else (os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
                    old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
                    stack.callback(os.close, old)
                    new = os.open(name, flags, 0o600, dir_fd=target)
                    stack.callback(os.close, new)
                    if is_folder:
                        copy_tree(old, new, base, depth + 1)
                    else:
                        with open(old, 'rb', closefd=False) as reader, open(new, 'wb', closefd=False) as writer:
                            shutil.copyfileobj(reader, writer, 1 << 20)
                        give(new, info, base)
    give(target, os.fstat(source), base)


def give(fd: int, info: os.stat_result, base: int) -> None:
    """Owner, mode and time of what was copied."""
    os.chown(fd, info.st_uid - base, info.st_gid - base)
    os.chmod(fd, stat.S_IMODE(info.st_mode))
    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
