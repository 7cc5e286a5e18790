"""Volumes: file systems that functions keep their files in. Each is one file, NAME.img."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable

from control.events import Emit
from handlers.containers import volumes
from handlers.containers.rootfs import apart
from handlers.containers.volumes import Holders, VolumeInUse
from handlers.images import wants
from handlers.images.spec import Spec
from host import files, process, volume_image
from host.errors import EXPECTED, FaasError
from host.volume_image import InUse

DEFAULT_SIZE = 1 << 30  # bytes
LEAST_SIZE = 16 << 20  # a smaller file system has no journal
CHECK_S = 600  # how long e2fsck and resize2fs may take
CORRECTED = (0, 1)  # exit codes of e2fsck


class NoVolume(FaasError):
    """There is no volume of that name."""

    status = 404


class VolumeExists(FaasError):
    """There is a volume of that name."""

    status = 409


class Volumes:
    """The volumes in `folder`. They are mounted only for a moment, below `run`, or by instances.

    `wanted()` returns [(function, Spec)] of the live functions. `holders`: who has which.
    """

    def __init__(self, folder: str, run: str, emit: Emit) -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
        self.folder, self._emit = folder, emit
        self._mount_point = os.path.join(run, 'volume')  # each look has a mount namespace of its own
        os.makedirs(self._mount_point, mode=0o700, exist_ok=True)
        self._changing = threading.RLock()
        self.holders = Holders()
        self.wanted: Callable[[], list[tuple[str, Spec]]] = list

    def thaw(self) -> None:
        """Let writes go on that a snapshot of a killed faasd has stopped. Before those who write are ended."""
        for name in self._names():
            with contextlib.suppress(*EXPECTED):
                try:
                    with volume_image.locked(self._path(name), 0):
                        continue  # it is not mounted
                except InUse:
                    if self._looked_at(name, volume_image.thaw):
                        self._emit('volume', f'Thawed {name}: an earlier faasd was ended during its snapshot')

    # For instances

    def mount(self, name: str, where: str) -> None:
        """Mount the file system at the folder `where`, in the mount namespace of this thread.

        Raises NoVolume, FaasError.
        """
        try:
            volume_image.mount(self._path(name), where)
        except FileNotFoundError as error:
            raise missing(name) from error
        except OSError as error:
            hint = 'the log of the kernel says more: dmesg'
            raise FaasError(f'the volume {name} cannot be mounted: {error}', hint) from error

    # For deploys

    def prepare(self, function: str, spec: Spec) -> Callable[[], object]:
        """See that the volumes are there that the function wants, and large enough. Returns what undoes it.

        Raises FaasError, OSError.
        """
        volumes.check(spec)
        made = []

        def undo() -> None:
            for name in made:
                with contextlib.suppress(*EXPECTED), self._changing, volume_image.locked(self._path(name)):
                    files.remove_file(self._path(name))

        try:
            for name, volume in spec.settings.get('volumes', {}).items():
                for other, its in self.wanted():
                    if other != function and name in its.settings.get('volumes', {}) and not (
                        spec.settings.get('overlap') and its.settings.get('overlap')
                    ):
                        hint = 'choose another name, or let both say overlap = true'
                        raise VolumeInUse(f'the volume {name} belongs to the function {other}', hint)
                with self._changing:
                    if name not in self._names():
                        self.create(name, volume['size'], f'for {function}')
                        made.append(name)
                    elif volume['size'] and volume['size'] > os.stat(self._path(name)).st_size:
                        self.resize(name, volume['size'], f'for {function}')
        except BaseException:
            undo()
            raise
        return undo

    # Verbs

    def list(self) -> list[dict]:
        """[{'name', 'size', 'used', 'functions', 'path'}], in bytes; 'used' is None when it cannot be known."""
        rows = []
        for name in self._names():
            used = None
            with contextlib.suppress(*EXPECTED):
                used = self._looked_at(name, used_bytes)
            with contextlib.suppress(FileNotFoundError):  # it has just been removed
                path = self._path(name)
                size = os.stat(path).st_size
                rows.append({'name': name, 'size': size, 'used': used, 'functions': self._users(name), 'path': path})
        return rows

    def create(self, name: str, size: int | None, by: str) -> dict:
        """Make a volume of `size` bytes, or of 1 GiB. Returns {'name', 'size'}. Raises FaasError, OSError."""
        with self._changing:
            size = checked_size(size or DEFAULT_SIZE)
            self._refuse_existing(name)
            with files.replacing(self._path(name), 0o600) as temporary:
                volume_image.make(temporary, size)
        self._emit('volume', f'Created the volume {name}, {wants.to_text(size)}, {by}')
        return {'name': name, 'size': size}

    def resize(self, name: str, size: int, by: str) -> dict:
        """Give a volume another size in bytes: a smaller one only while nobody uses it.

        Returns {'name', 'size'}. Raises FaasError, OSError.
        """
        with self._changing:
            size, path = checked_size(size), self._known(name)
            former = os.stat(path).st_size
            try:
                with volume_image.locked(path):
                    self._resize_unused(path, former, size)
            except InUse as error:
                if size < former:
                    raise self._in_use(name, 'becomes not smaller') from error
                if size >= former:  # a killed faasd may have made the file larger alone
                    self._grow(name, size)
        self._emit('volume', f'Resized the volume {name} from {wants.to_text(former)} to {wants.to_text(size)}, {by}')
        return {'name': name, 'size': size}

    def _resize_unused(self, path: str, former: int, size: int) -> None:
        """With e2fsprogs, so that nothing has to be mounted. A killed faasd leaves the former size, or the new one."""
        if size > former:
            volume_image.allocate(path, size)
        process.run(['e2fsck', '-f', '-p', path], ok=CORRECTED, timeout_s=CHECK_S)
        try:
            process.run(['resize2fs', path, f'{size >> 10}K'], timeout_s=CHECK_S)
        except process.CommandError as error:
            raise FaasError(f'the volume stays as it is: {error.reason}', 'choose a larger size') from error
        with open(path, 'r+b') as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def _grow(self, name: str, size: int) -> None:
        path = self._path(name)
        try:
            self._looked_at(name, lambda where: volume_image.grow(path, size, where))
        except PermissionError as error:  # root without CAP_SYS_RESOURCE, as in some containers
            raise self._in_use(name, 'cannot be resized meanwhile on this server') from error

    def snapshot(self, name: str, new: str | None, by: str) -> dict:
        """Make the volume `new` from `name` as it is now. Returns {'name', 'size', 'path', 'shared'}.

        Nobody can write meanwhile: for a moment where both share their blocks (`shared`), else as long as the copy
        takes. Raises FaasError, OSError.
        """
        new = new or f'{name[:46].rstrip("-")}-{time.strftime("%Y%m%d-%H%M%S", time.gmtime())}'
        with self._changing:
            path = self._known(name)
            self._refuse_existing(new)
            with files.replacing(self._path(new), 0o600) as temporary:

                def copy(where: str) -> bool:
                    with volume_image.frozen(where):
                        return volume_image.copy(path, temporary)

                shared = self._looked_at(name, copy)
            size = os.stat(self._path(new)).st_size
        self._emit('volume', f'Made the snapshot {new} of the volume {name}, {by}')
        return {'name': new, 'size': size, 'path': self._path(new), 'shared': shared}

    def remove(self, name: str, by: str) -> None:
        """Raises NoVolume; VolumeInUse while a function wants it or an instance has it."""
        with self._changing:
            path = self._known(name)
            if users := self._users(name):
                hint = f'first: faas rm {users[0]}, or take it from what that function asks for'
                raise VolumeInUse(f'the volume {name} is used by {", ".join(users)}', hint)
            try:
                with volume_image.locked(path):
                    files.remove_file(path)
            except InUse as error:
                raise self._in_use(name, 'is not removed') from error
        self._emit('volume', f'Removed the volume {name}, {by}')

    # Parts

    def _names(self):
        ends = (entry.removesuffix('.img') for entry in sorted(os.listdir(self.folder)) if entry.endswith('.img'))
        return [name for name in ends if re.fullmatch(wants.NAME, name)]

    def _path(self, name):
        return os.path.join(self.folder, f'{name}.img')

    def _known(self, name):
        if name not in self._names():
            raise missing(name)
        return self._path(name)

    def _refuse_existing(self, name):
        if not re.fullmatch(wants.NAME, name, re.ASCII):
            hint = 'use a-z, 0-9 and - inside, at most 63 characters'
            raise wants.BadWant(f'{name[:80]!r} is not a name of a volume', hint)
        if name in self._names():
            raise VolumeExists(f'there is a volume {name}', 'choose another name: faas volume list')

    def _users(self, name):
        wanting = {function for function, spec in self.wanted() if name in spec.settings.get('volumes', {})}
        return sorted(wanting.union(self.holders.users(name)))

    def _in_use(self, name, what):
        users = ', '.join(self._users(name)) or 'somebody'
        return VolumeInUse(f'the volume {name} is used by {users} and {what}', 'try again when nobody uses it')

    def _looked_at(self, name, look):
        """What look(folder) returns with the file system mounted at `folder`, which nobody else sees."""

        def within() -> object:
            volume_image.mount(self._path(name), self._mount_point)
            return look(self._mount_point)

        return apart(within)


def used_bytes(where: str) -> int:
    status = os.statvfs(where)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def checked_size(size: int) -> int:
    """The size in whole blocks. Raises BadWant."""
    if size < LEAST_SIZE:
        raise wants.BadWant('a volume has at least 16M', 'choose a larger size')
    return size // volume_image.BLOCK * volume_image.BLOCK


def missing(name: str) -> NoVolume:
    return NoVolume(f'there is no volume {name[:80]}', "'faas volume list' shows what there is")
