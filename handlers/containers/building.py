"""The sandbox in which a folder is built: a container as that of an instance, with a disk that it may write to.

The disk is a file system in a file, so its size is a bound. It is mounted in a mount namespace of its own and goes
with that, whatever happens to faasd. On it are the folder, /tmp, and what package managers keep from build to build.
"""

import contextlib
import os
import select
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

from handlers.containers import rootfs, seccomp
from handlers.containers.containers import Container, ContainerError, Containers
from handlers.images.builders import PATH, PYTHON, CannotBuild, Plan
from handlers.images.spec import Spec
from host import process
from host.errors import FaasError

CERTIFICATES = '/etc/ssl/certs/ca-certificates.crt'
CACHE = '/run/cache'  # inside: what package managers keep
PIDS = 1024
MOST_RESULTS = 500_000  # files and folders, as an image may have
LOOK_S = 0.2  # how often a build is asked whether anybody waits for it
COPY_S = 600
RELEASE_S = 10  # how long a disk may be in use by a container that has ended
TAIL_LINES = 20
LINE = 4096  # characters of one


class BuildLimits(NamedTuple):
    """What one build may use: bytes of memory, cores, seconds, bytes on its disk; and what it may reach."""

    memory: int
    cpus: float
    timeout_s: float
    disk: int
    egress: list[str]


class BuildFailed(CannotBuild):
    """A build ended badly; the text is the reason, `log` its own last lines."""

    def __init__(self, reason: str, log: list[str] = (), hint: str | None = None) -> None:
        super().__init__(reason, hint)
        self.log = list(log)


class Workshop:
    """Builds folders in containers. `run_dir` is where a disk is mounted, which only the build sees."""

    def __init__(self, containers: Containers, run_dir: str, limits: BuildLimits) -> None:
        self._containers, self._limits = containers, limits
        self._disk, self._inside = os.path.join(run_dir, 'build', 'disk'), os.path.join(run_dir, 'build', 'inside')

    def build(
        self,
        name: str,
        plan: Plan,
        tree: str,
        disk: str,
        into: str,
        tell: Callable[[bytes], object],
        is_wanted: Callable[[], bool],
    ) -> None:
        """Build the folder `tree` as the plan says; the results are put below the new folder `into`.

        `disk` is the path of the disk, which is made if there is none. tell() is given the output. Raises BuildFailed;
        ConnectionAbortedError when it is not wanted any more; FaasError, OSError, what tell() raises.
        """
        for folder in (self._disk, self._inside):
            os.makedirs(folder, mode=0o755, exist_ok=True)
        wait_released(disk)
        if not os.path.exists(disk):
            make_disk(disk, self._limits.disk)
        rootfs.apart(lambda: self._build(name, plan, tree, disk, into, tell, is_wanted))

    def _build(self, name, plan, tree, disk, into, tell, is_wanted):
        try:
            process.run(['mount', '-t', 'ext4', '-o', 'loop,nosuid,nodev,noatime', disk, self._disk])
        except process.CommandError as error:
            hint = 'modprobe loop; a container needs /dev/loop-control and /dev/loop*'
            raise FaasError(f'the disk of the build cannot be mounted: {error.reason}', hint) from error
        try:
            work = os.path.join(self._disk, 'function')
            for folder in (work, os.path.join(self._disk, 'tmp')):
                shutil.rmtree(folder, ignore_errors=True)
            for folder in ('tmp', 'cache'):
                os.makedirs(os.path.join(self._disk, folder), mode=0o755, exist_ok=True)
            copy(tree, work)
            if plan.results is None:  # what was compiled of a file is used even when a command has changed the file
                process.run(['find', work, '-name', '__pycache__', '-prune', '-exec', 'rm', '-rf', '{}', '+'])
            if os.path.exists(CERTIFICATES):
                shutil.copy(CERTIFICATES, os.path.join(self._disk, 'tmp', '.ca.pem'))
            reason, log = self._run(name, plan, tell, is_wanted)
            if reason:
                room = os.statvfs(self._disk)
                raise BuildFailed(f'the build {reason}', log, self._hint(reason, room.f_bavail * room.f_frsize))
            collect(work, plan.results, into)
        finally:
            process.run(['umount', self._disk])

    def _hint(self, reason, room):
        if room < 1 << 20:
            return f'its disk is full: raise FAAS_BUILD_DISK, {self._limits.disk >> 20} MiB'
        for text, name in (('memory', 'FAAS_BUILD_MEMORY'), ('no end', 'FAAS_BUILD_TIMEOUT')):
            if text in reason:
                return f'raise {name} on the server'
        return None

    def _run(self, name, plan, tell, is_wanted):
        """(why it failed or None, its last lines)"""
        spec = self._spec(plan)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        output = Output(reader, tell)
        try:
            try:
                container = self._containers.start(name, 0, spec, self._inside, writer, more=self._add_disk)
            except ContainerError as error:
                raise BuildFailed(f'the build cannot be started: {error}', hint=error.hint) from error
            finally:
                os.close(writer)
            if container.control:
                container.control.close()
            try:
                late = self._watch(container, output, is_wanted)
            finally:
                container.kill()
                reason = self._containers.remove(container)
            output.copy()
            if not is_wanted():
                raise ConnectionAbortedError
            return late or (None if reason == 'ended with exit code 0' else reason), output.tail()
        finally:
            os.close(reader)

    def _spec(self, plan):
        limits = self._limits
        settings = {'memory': limits.memory, 'cpus': limits.cpus, 'pids': PIDS}
        environment = {
            'PATH': f'/function/node_modules/.bin:{PATH}',
            'HOME': CACHE,
            'TMPDIR': '/tmp',
            'CI': 'true',
            'PIP_CACHE_DIR': f'{CACHE}/pip',
            'PIP_ROOT_USER_ACTION': 'ignore',
            'npm_config_cache': f'{CACHE}/npm',
            'npm_config_progress': 'false',
            'GOCACHE': f'{CACHE}/go-build',
            'GOPATH': f'{CACHE}/go',
            'GOFLAGS': '-modcacherw -buildvcs=false',
        }
        if os.path.exists(CERTIFICATES):
            names = ('SSL_CERT_FILE', 'PIP_CERT', 'NODE_EXTRA_CA_CERTS')
            environment |= dict.fromkeys(names, '/tmp/.ca.pem')
        script = ['set -e', f'export PYTHONPATH=/function/{PYTHON}']
        for line in plan.lines:
            script += [f'echo {quoted("$ " + line)}', line]
        own = plan.spec.settings.get('env', {})
        texts = {key: text for key, text in own.items() if isinstance(text, str) and key not in ('PATH', 'PYTHONPATH')}
        egress = {'egress': limits.egress} if limits.egress else {}
        command = ('/usr/bin/sh', '-c', '\n'.join(script))
        return Spec('command', command, environment | texts, settings=settings | egress)

    def _add_disk(self, config, users):
        """Have the container see the disk, with root's files there as its own; nobody answers its listen() calls."""
        rootfs.map_ids(self._disk, self._inside, users, rootfs.MOUNT_ATTR_NOSUID)
        places = {'/function': 'function', '/tmp': 'tmp', CACHE: 'cache'}
        config['mounts'] = [each for each in config['mounts'] if each['destination'] not in places]
        for place, folder in places.items():
            source = os.path.join(self._inside, folder)
            options = ['rbind', 'rw', 'nosuid', 'nodev']
            config['mounts'].append({'destination': place, 'type': 'bind', 'source': source, 'options': options})
        config['linux']['seccomp'] = seccomp.FOLDER

    def _watch(self, container: Container, output: 'Output', is_wanted: Callable[[], bool]) -> str | None:
        """Copy the output until the container ends, is late, or is not wanted. Returns why it must end, if it must."""
        deadline = time.monotonic() + self._limits.timeout_s
        poll = select.poll()
        poll.register(container.pidfd, select.POLLIN)
        poll.register(output.reader, select.POLLIN)
        while True:
            ready = dict(poll.poll(LOOK_S * 1000))
            if output.reader in ready and not output.copy():
                poll.unregister(output.reader)
            if container.pidfd in ready or not is_wanted():
                return None
            if time.monotonic() > deadline:
                return f'had no end after {self._limits.timeout_s:g} s'


class Output:
    """What a build prints. `reader` (borrowed) does not block."""

    def __init__(self, reader: int, tell: Callable[[bytes], object]) -> None:
        self.reader, self._tell, self._last = reader, tell, b''

    def copy(self) -> bool:
        """Tell what has arrived. False at the end."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reader, 65536):
                self._last = (self._last + data)[-TAIL_LINES * LINE :]
                self._tell(data)
            return False
        return True

    def tail(self) -> list[str]:
        """The last lines."""
        return [line[:LINE] for line in self._last.decode(errors='replace').splitlines()[-TAIL_LINES:]]


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def make_disk(path: str, size: int) -> None:
    """Make the file system. It has no journal: after a crash a new one is made."""
    with open(path, 'xb') as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    options = ['-q', '-F', '-m', '0', '-O', '^has_journal', '-E', 'lazy_itable_init=1,nodiscard,root_owner=0:0']
    try:
        process.run(['mkfs.ext4', *options, path], timeout_s=60)
    except BaseException:
        os.unlink(path)
        raise


def wait_released(disk: str) -> None:
    """Wait until no loop device has the disk: two would destroy it. Raises FaasError."""
    deadline = time.monotonic() + RELEASE_S
    while os.path.exists(disk) and process.run(['losetup', '--associated', disk]).stdout.strip():
        if time.monotonic() > deadline:
            raise FaasError(f'{disk} is in use', 'a build of this function is not over: try again')
        time.sleep(0.02)


def copy(source: str, target: str) -> None:
    """Copy a file or folder as `target`, links as links."""
    process.run(['cp', '-dR', '--preserve=mode,timestamps,links', '--', source, target], timeout_s=COPY_S)


def collect(work: str, results: tuple[str, ...] | None, into: str) -> None:
    """Put copies of the results of a stranger's build below the new folder `into`. Raises BuildFailed."""
    os.mkdir(into, 0o755)
    for result in ('.',) if results is None else results:
        source = work if result == '.' else os.path.join(work, result)
        if not is_real(work, result):
            raise BuildFailed(f'the build has made no {result}')
        found = process.run(['find', source, '-printf', '%y'], timeout_s=COPY_S).stdout
        if len(found) > MOST_RESULTS or set(found) - set('fdl'):
            text = f'the build has made more than {MOST_RESULTS} files, or one that is none (a pipe, a socket)'
            raise BuildFailed(text)
        target = into if result == '.' else os.path.join(into, result)
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        copy(f'{source}/.' if result == '.' else source, target)
    # Everybody may read them: in an instance they belong to nobody.
    process.run(['chmod', '-R', 'ug-s,o-t,u+rw,a+rX', into], timeout_s=COPY_S)


def is_real(top: str, path: str) -> bool:
    """True if `path` is there, below `top`, and no part of it is a link."""
    where = top
    for part in path.split('/'):
        where = os.path.join(where, part)
        if os.path.islink(where) or not os.path.exists(where):
            return False
    return True
