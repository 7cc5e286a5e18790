"""What one instance alone gets: its secrets, and folders of the server.

Both lie in a file system in memory. It is mounted in the mount namespace that the OCI runtime inherits (rootfs.apart):
the host does not see it, and it is gone when the container ends. The configuration for the runtime lies there, too,
because variables may be secrets.
"""

import contextlib
import errno
import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from handlers.containers import bundle, rootfs
from handlers.images.spec import Spec
from handlers.images.wants import inside, place
from host.errors import FaasError

SECRETS = '/run/secrets'
MOST_INODES = 4096
MOST_BYTES = 64 << 20  # 256 secrets of 64 KiB, the configuration with as many, and room
MEMORY = ('/run', '/tmp')  # file systems of a folder's container, where the runtime can make mount points
# What belongs to the sandbox, or to faasd.
RESERVED = (
    *('/bin', '/boot', '/control.sock', '/dev', '/etc', '/function', '/lib', '/lib32', '/lib64', '/libx32'),
    *('/opt/faas', '/proc', '/root', '/run/faas', '/run/faasd', '/run/secrets', '/sbin', '/sys', '/usr'),
    *('/var/lib/faasd', '/var/run', '/var/tmp'),
)


class MountRefused(FaasError):
    """A function asks for a folder of the server that it does not get."""

    status = 403


class SecretStore(Protocol):
    """Gives the values of secrets. Both raise FaasError."""

    def get(self, name: str) -> bytes:
        """The value."""

    def variable(self, key: str, name: str) -> str:
        """The value as that of the environment variable `key`."""


class Private(NamedTuple):
    """`where` is the folder that the file system is mounted at. `places` may be mounted, each 'ro' or 'rw'."""

    where: str
    secrets: SecretStore | None = None
    places: Mapping[str, str] = {}

    @staticmethod
    def is_wanted(spec: Spec) -> bool:
        variables = spec.settings.get('env', {}).values()
        return any(map(spec.settings.get, ('secrets', 'mounts'))) or any(isinstance(each, dict) for each in variables)

    def check(self, spec: Spec) -> None:
        """Raise MountRefused unless the folders that the Spec wants are there and may be mounted."""
        for path, how in spec.settings.get('mounts', {}).items():
            os.close(self._open(path, how))

    def changed(self, spec: Spec, pid: int) -> set[tuple[str, int, int]]:
        """The (path, device, inode) of the folders that are others now than those that the instance sees.

        `pid` is its first process.
        """
        found = set()
        for path, how in spec.settings.get('mounts', {}).items():
            with contextlib.suppress(OSError, MountRefused):  # it has ended, or the service is only being restarted
                now, seen = identity(self._open(path, how)), identity(seen_by(pid, path))
                if now != seen:
                    found.add((path, *now))
        return found

    def add(self, config: dict, spec: Spec, base: int) -> str:
        """Add to the OCI configuration what the Spec wants. Returns the folder for config.json.

        `base` is the host's id of the instance's root. To be called by apart(). Raises FaasError, OSError.
        """
        where, settings = self.where, spec.settings
        rootfs.mount_memory(where, MOST_BYTES, MOST_INODES, 0o711)
        for folder, mode in (('bundle', 0o700), ('secrets', 0o755), ('mounts', 0o711)):
            os.mkdir(f'{where}/{folder}', mode)
        self._add_variables(config['process'], settings.get('env', {}))
        if settings.get('secrets'):
            self._add_secrets(config, settings['secrets'], base)
        if settings.get('mounts'):
            self._add_mounts(config, settings['mounts'], is_image=bool(spec.layers))
        return f'{where}/bundle'

    def _add_variables(self, process, wanted):
        values = {key: self.secrets.variable(key, each['secret']) for key, each in wanted.items() if type(each) is dict}
        texts = [line for line in process['env'] if line.partition('=')[0] not in values]
        process['env'] = texts + bundle.in_lines(values)

    def _add_secrets(self, config, names, base):
        user = config['process']['user']
        for name in names:
            path = f'{self.where}/secrets/{name}'
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), 'wb') as file:
                file.write(self.secrets.get(name))
            os.chown(path, base + user['uid'], base + user['gid'])
        config['mounts'].append(bundle.host(SECRETS, f'{self.where}/secrets'))

    def _add_mounts(self, config, wanted, is_image):
        kind = rootfs.MOUNT_ATTR_NOSUID | rootfs.MOUNT_ATTR_NODEV | rootfs.MOUNT_ATTR_NOEXEC
        points = []
        for number, (path, how) in enumerate(sorted(wanted.items())):  # a folder before those below it
            source = f'{self.where}/mounts/{number}'
            os.mkdir(source)
            fd = self._open(path, how)
            try:
                rootfs.attach(fd, source, kind | (rootfs.MOUNT_ATTR_RDONLY if how == 'ro' else 0))
            finally:
                os.close(fd)
            config['mounts'].append(bundle.host(path, source, how))
            if not is_image and not any(inside(path, each) for each in MEMORY):
                points.append(f'{self.where}/points{path}')
        if points:
            for folder in (*points, root := f'{self.where}/root'):
                os.makedirs(folder, exist_ok=True)
            rootfs.mount_over(config['root']['path'], f'{self.where}/points', root)
            config['root']['path'] = root

    def _open(self, path, how):
        """A descriptor (owned) of the folder of the host. Raises MountRefused."""
        allowed = [self.places[place] for place in self.places if inside(path, place)]
        if not allowed or (how == 'rw' and 'rw' not in allowed):
            line = f'FAAS_MOUNTS={path}{":rw" if how == "rw" else ""}'
            raise MountRefused(
                f'the server gives no function {path} ({how})', f'root allows it in /etc/faasd/faasd.env: {line}'
            )
        try:
            flags = os.O_PATH | os.O_DIRECTORY
            return rootfs.open_at(rootfs.AT_FDCWD, path, flags, rootfs.RESOLVE_NO_SYMLINKS)
        except OSError as error:
            if error.errno == errno.ELOOP:
                hint = f'write where it leads: {os.path.realpath(path)}'
                raise MountRefused(f'{path} is a link, or goes through one', hint) from error
            raise MountRefused(f'there is no folder {path} on the server', 'start the service that makes it') from error


def identity(fd: int) -> tuple[int, int]:
    """The device and the inode of a folder. Consumes the descriptor."""
    try:
        info = os.fstat(fd)
        return info.st_dev, info.st_ino
    finally:
        os.close(fd)


def seen_by(pid: int, path: str) -> int:
    """A descriptor (owned) of the folder as a process sees it. Raises OSError."""
    root = os.open(f'/proc/{pid}/root', os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return rootfs.open_at(root, path, os.O_PATH | os.O_DIRECTORY, rootfs.RESOLVE_IN_ROOT)
    finally:
        os.close(root)


def read_places(text: str) -> dict[str, str]:
    """{path: 'ro' or 'rw'} of '/run/postgresql /srv/shared:rw'. Raises ValueError."""
    places = {}
    for word in text.split():
        path, colon, how = word.partition(':')
        if (colon and how not in ('ro', 'rw')) or any(inside(path, each) or inside(each, path) for each in RESERVED):
            raise ValueError(f'{word} cannot be given to functions')
        places[place(path)] = how or 'ro'
    return places
