"""Containers by runc or crun: the OCI bundle of an instance, its ids and limits, and the log of its output."""

import collections
import contextlib
import json
import os
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import threading
import time
from typing import NamedTuple

import shell
from handlers import injection, protocol, rootfs, seccomp

RUNTIME = '/opt/faas/runtime.py'
LOG_LIMIT = 1 << 20  # bytes; one older file of that size is kept
TAIL_LINES = 20
LINE_LIMIT = 4096
PAUSE_S = 0.01  # between two turns of the copier: a function that floods its log gets a pipe's worth for each

# Every instance has a range of its own, so that no two can signal, trace or read each other, and nothing in the host's
# tree is theirs; the first range owns the layers of images there, mapped to an instance's own when they are mounted.
# From above what systemd gives to containers (UIDS-GIDS.md: 524288 to 1879048191) up to 2^31, where programs begin to
# fail.
ID_RANGE = 65536
ID_SLOTS = 4096


class Limits(NamedTuple):
    """What one instance may use: bytes of memory, processes and threads, cores."""

    memory: int
    pids: int
    cpus: float


class ContainerError(Exception):
    """The OCI runtime could not start a container."""


class Containers:
    """Makes and removes the containers of one server; `prefix` tells them from another server's on the same kernel."""

    def __init__(
        self, prefix, limits, run_dir='/run/faasd', id_base=0x70000000, cgroup='', runtime='runc', layers_base=None
    ):
        self.prefix, self.limits, self._id_base = prefix, limits, id_base
        self._layers_base = layers_base or id_base  # the first of the ids that own the files of layers
        self._cgroup = f'{cgroup}/{prefix}'
        self._rootfs, self._instances = os.path.join(run_dir, 'rootfs'), os.path.join(run_dir, 'instances')
        self._image = os.path.join(run_dir, 'image')  # where each instance of an image sees its own root file system
        self._roots = {each: os.path.join(run_dir, each) for each in ('runc', 'crun')}
        self._runtime = (runtime, '--root', self._roots[runtime])
        self._slots, self._lock = set(), threading.Lock()
        self._mappings = {}  # slot → the user namespace that maps the owners of layers to it

    def prepare(self, wanted=lambda record: False):
        """Remove what a killed run left of its instances, and lay out the root file system that all folders share.

        Returns [(record, Container)] of those that still run, serve a listener of their own, and are `wanted`.
        """
        kept = {}
        for folder in (self._instances, *self._roots.values()):
            if os.path.isdir(folder):
                for ident in os.listdir(folder):
                    if ident not in kept and (left := self._left(ident, wanted)):
                        kept[ident] = left
                    if ident not in kept:
                        self._delete(ident)
        self._remove_cgroups()
        if not kept:  # else it may be in use, and is only brought up to date
            shutil.rmtree(self._rootfs, ignore_errors=True)
        os.makedirs(self._instances, mode=0o700, exist_ok=True)
        os.makedirs(self._image, exist_ok=True)
        # With a user namespace every mount point must exist before, and a tmpfs takes the mode of its mount point (runc
        # 1.1).
        for folder in ('dev', 'etc', 'function', 'opt/faas', 'proc', 'run', 'sys', 'tmp', 'usr', 'var'):
            os.makedirs(os.path.join(self._rootfs, folder), exist_ok=True)
        os.chmod(os.path.join(self._rootfs, 'tmp'), 0o1777)
        links = {'control.sock': 'run/faas/control.sock', 'var/tmp': '/tmp'}
        for name in ('bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32'):
            if os.path.islink(f'/{name}'):
                links[name] = os.readlink(f'/{name}')
        for name, target in links.items():
            with contextlib.suppress(FileExistsError):
                os.symlink(target, os.path.join(self._rootfs, name))
        for name, text in (
            ('passwd', 'root:x:0:0:function:/tmp:/usr/sbin/nologin\nnobody:x:65534:65534::/:/usr/sbin/nologin\n'),
            ('group', 'root:x:0:\nnogroup:x:65534:\n'),
            ('hosts', '127.0.0.1 localhost\n::1 localhost\n'),
            ('nsswitch.conf', 'passwd: files\ngroup: files\nhosts: files\n'),
        ):
            with open(os.path.join(self._rootfs, 'etc', name), 'w') as file:
                file.write(text)
        for module in ('runtime.py', 'protocol.py'):
            shutil.copy(
                os.path.join(os.path.dirname(os.path.abspath(__file__)), module),
                os.path.join(self._rootfs, 'opt/faas', module),
            )
        compile_all = ['/usr/bin/python3', '-I', '-S', '-m', 'compileall', '-q', '--invalidation-mode=unchecked-hash']
        shell.run([*compile_all, '-s', self._rootfs, '-p', '/', os.path.join(self._rootfs, 'opt/faas')])
        return list(kept.values())

    def _left(self, ident, wanted):
        """(record, Container) of an instance of a run that is over, if it still is what its record says, and wanted."""
        try:
            with open(os.path.join(self._instances, ident, 'record.json')) as file:
                record = json.load(file)
            if record['listener'] is None or record['pid'] is None or not wanted(record):
                return None
            pidfd = os.pidfd_open(record['pid'])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if shell.start_time(record['pid']) != record['start_time']:
            os.close(pidfd)
            return None
        base, _ = record['ids']
        self._slots.add((base - self._id_base) // ID_RANGE)
        return record, Container(ident, record['pid'], pidfd, base)

    @staticmethod
    def output_of(container):
        """The reader (owned) of what an instance of a run that is over prints; None if it has taken that elsewhere."""
        with contextlib.suppress(OSError):
            fd = os.open(f'/proc/{container.pid}/fd/2', os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        return None

    def listener_of(self, record, container):
        """The listening socket (owned) that an instance of a run that is over serves; None if it has lost it."""
        for where in self._cgroups():
            with contextlib.suppress(OSError), open(os.path.join(where, container.ident, 'cgroup.procs')) as file:
                for pid in map(int, file.read().split()):
                    for fd in map(int, os.listdir(f'/proc/{pid}/fd')):
                        with contextlib.suppress(OSError):
                            sock = injection.socket_of(pid, fd)
                            if injection.cookie(sock) == record['listener']:
                                return sock
                            sock.close()
        return None

    def start(self, name, revision, spec, tree, output, channel=None, cookie=None):
        """A running Container for a revision of function `name`: its image.Spec and the folder `tree`, or its layers.

        Borrows the log's writing end, and the runtime's channel or, for what serves in a way of its own, none: then
        `cookie` is that of the listener it will get. Raises ContainerError; nothing is left then.
        """
        ident = f'{self.prefix}-{secrets.token_hex(4)}'
        with self._lock:
            slot = next((slot for slot in range(1, ID_SLOTS) if slot not in self._slots), None)
            if slot is None:
                raise ContainerError(f'{ID_SLOTS - 1} instances run already')
            self._slots.add(slot)
        bundle = os.path.join(self._instances, ident)
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self._delete, ident)
                os.mkdir(bundle, 0o700)
                base = self._id_base + slot * ID_RANGE
                record = {
                    'function': name,
                    'revision': revision,
                    'ids': [base, ID_RANGE if spec.layers else 1],
                    'protocol': protocol.VERSION,
                    'pid': None,
                    'start_time': None,
                    'stop_signal': spec.stop_signal,
                    'listener': cookie,
                }
                self._write(bundle, 'record.json', record)
                control = notifier = None
                if channel is None:
                    os.mkdir(os.path.join(bundle, 'control'))
                    control = undo.enter_context(listening(os.path.join(bundle, 'control', 'control.sock'), 0o666))
                    notifier = undo.enter_context(listening(os.path.join(bundle, 'notify.sock'), 0o600))
                run = [ident, name, spec, tree, bundle, base, {1: output, 2: output}]
                if channel is not None:
                    run[-1][protocol.CHANNEL_FD] = channel
                if spec.layers:
                    rootfs.apart(lambda: self._run(*run))
                else:
                    self._run(*run)
                with open(os.path.join(bundle, 'pid')) as file:
                    pid = int(file.read())
                self._write(bundle, 'record.json', record | {'pid': pid, 'start_time': shell.start_time(pid)})
                container = Container(ident, pid, os.pidfd_open(pid), base, control, notifier)
                undo.pop_all()
                return container
        except BaseException as error:
            with self._lock:
                self._slots.discard(slot)
            if isinstance(error, (OSError, shell.CommandError, rootfs.Unfit)):
                raise ContainerError(str(error)) from error
            raise

    def _run(self, ident, name, spec, tree, bundle, base, fds):
        """Have the OCI runtime start the container with the descriptors `fds`."""
        config = self._config(ident, name, spec, bundle, base)
        if spec.layers:
            self._add_image(config, spec, tree, base)
        else:
            self._add_folder(config, spec, tree)
        if protocol.CHANNEL_FD not in fds:
            self._add_ways_to_serve(config, spec, bundle)
        # Its own, so that it can open /dev/stdout: that is where images have their log files lead.
        user = config['process']['user']
        os.fchown(fds[1], base + user['uid'], base + user['gid'])
        self._write(bundle, 'config.json', config)
        pid_file, errors = os.path.join(bundle, 'pid'), os.path.join(bundle, 'runtime.log')
        # No session keyring: a host that is itself a container may refuse one, and keyctl is refused to functions.
        run = ['run', '--detach', '--no-new-keyring', '--bundle', bundle, '--pid-file', pid_file]
        run += ['--preserve-fds', '1'] if protocol.CHANNEL_FD in fds else []
        code = shell.run_with_fds([*self._runtime, '--log', errors, *run, ident], fds)
        if code:
            raise ContainerError(self._runtime_said(errors) or f'{self._runtime[0]} ended with exit code {code}')

    def _mapping(self, base):
        """The user namespace that maps the owners of layers to the range from `base`; made once, and kept."""
        with self._lock:
            if base not in self._mappings:
                self._mappings[base] = shell.user_namespace(f'{self._layers_base} {base} {ID_RANGE}')
            return self._mappings[base]

    def remove(self, container):
        """Remove what is left of a container whose first process has ended; return why it ended, as a line."""
        code = container.reap()
        signals = {128 + number: number.name for number in signal.Signals}
        reason = f'ended by {signals[code]}' if code in signals else f'ended with exit code {code}'
        if code in (137, 143) and self._out_of_memory(container.ident):
            reason = f'ran out of memory (its limit is {self.limits.memory >> 20} MiB)'
        self._delete(container.ident)
        with self._lock:
            self._slots.discard((container.base - self._id_base) // ID_RANGE)
        return reason

    def close(self):
        """Take away what `prepare` made; every container is removed before, or left to a next run."""
        for fd in self._mappings.values():
            os.close(fd)
        if self._slots:
            return
        self._remove_cgroups()
        for folder in (self._rootfs, self._image, self._instances, *self._roots.values()):
            shutil.rmtree(folder, ignore_errors=True)

    def _delete(self, ident):
        for runtime, root in self._roots.items():  # a killed run may have had the other one
            if os.path.isdir(root):
                with contextlib.suppress(shell.CommandError):  # the folder goes, even if the runtime has gone
                    shell.run([runtime, '--root', root, 'delete', '--force', ident], ok=range(256))
        shutil.rmtree(os.path.join(self._instances, ident), ignore_errors=True)

    @staticmethod
    def _write(bundle, name, content):
        with open(os.path.join(bundle, name), 'w') as file:
            json.dump(content, file)

    @staticmethod
    def _runtime_said(path):
        """Why the runtime failed, from its log: the first fatal line, since what follows is only its consequences."""
        with contextlib.suppress(OSError), open(path) as file:
            lines = file.read().strip().splitlines()
            fatal = [line for line in lines if 'level=fatal' in line] or lines[-1:]
            said = [re.sub(r'\\+"', '"', line.partition('msg=')[2].strip('"') or line) for line in fatal]
            return re.sub(r'^nsexec-\d\[\d+\]: ', '', said[0]) if said else None

    def _cgroups(self):
        """The folders of this server's cgroup in each hierarchy: one on cgroup v2, one for each controller on v1."""
        root = '/sys/fs/cgroup'
        with contextlib.suppress(OSError):
            for where in [root] + [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]:
                if os.path.isdir(where + self._cgroup):
                    yield where + self._cgroup

    def _remove_cgroups(self):
        for where in self._cgroups():
            with contextlib.suppress(OSError):
                for entry in os.scandir(where):
                    if entry.is_dir(follow_symlinks=False):
                        os.rmdir(entry.path)
                os.rmdir(where)

    def _out_of_memory(self, ident):
        for where in self._cgroups():
            for name in ('memory.oom_control', 'memory.events'):
                with contextlib.suppress(OSError), open(os.path.join(where, ident, name)) as file:
                    if any(line.startswith('oom_kill ') and line.split()[1] != '0' for line in file):
                        return True
        return False

    def _config(self, ident, name, spec, bundle, base):
        """What the OCI runtime configurations of all instances share (config.md of the OCI specification, 1.0.2)."""
        memory, pids, cpus = self.limits
        files = min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # the container may not raise ours
        resources = {
            'memory': {'limit': memory},
            'pids': {'limit': pids},
            'cpu': {'quota': int(cpus * 100_000), 'period': 100_000},
            'devices': [{'allow': False, 'access': 'rwm'}],
        }
        if os.path.exists('/sys/fs/cgroup/cgroup.controllers') or os.path.exists(
            '/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes'
        ):
            resources['memory']['swap'] = memory  # memory and swap together: none of it is swap
        ids = [{'containerID': 0, 'hostID': base, 'size': ID_RANGE if spec.layers else 1}]
        return {
            'ociVersion': '1.0.2',
            'process': {
                'terminal': False,
                'user': {'uid': 0, 'gid': 0},
                'cwd': spec.cwd,
                'args': list(spec.args),
                'capabilities': capabilities(),
                'noNewPrivileges': True,
                'oomScoreAdj': 500,
                'rlimits': [
                    {'type': 'RLIMIT_NOFILE', 'hard': files, 'soft': files},
                    {'type': 'RLIMIT_CORE', 'hard': 0, 'soft': 0},
                ],
            },
            'hostname': name,
            'mounts': [
                {'destination': '/proc', 'type': 'proc', 'source': 'proc', 'options': ['nosuid', 'nodev', 'noexec']},
                {
                    'destination': '/dev',
                    'type': 'tmpfs',
                    'source': 'tmpfs',
                    'options': ['nosuid', 'noexec', 'mode=755', 'size=64k'],
                },
                tmpfs('/dev/shm', '64m' if spec.layers else '16m', '1777'),
            ],
            'linux': {
                'namespaces': [{'type': kind} for kind in ('pid', 'mount', 'ipc', 'uts', 'network', 'user', 'cgroup')],
                'uidMappings': ids,
                'gidMappings': ids,
                'cgroupsPath': f'{self._cgroup}/{ident}',
                'resources': resources,
                'seccomp': seccomp.IMAGE if spec.layers else seccomp.FOLDER,
                'maskedPaths': [
                    '/proc/acpi',
                    '/proc/asound',
                    '/proc/interrupts',
                    '/proc/kcore',
                    '/proc/keys',
                    '/proc/latency_stats',
                    '/proc/sched_debug',
                    '/proc/scsi',
                    '/proc/timer_list',
                    '/proc/timer_stats',
                ],
                'readonlyPaths': ['/proc/bus', '/proc/fs', '/proc/irq', '/proc/sys', '/proc/sysrq-trigger'],
            },
        }

    def _add_folder(self, config, spec, tree):
        """The sandbox of a folder: the host's /usr, read-only, one id and no capability."""
        process = config['process']
        if spec.kind == 'handler':
            process |= {'cwd': '/function', 'args': ['/usr/bin/python3', '-I', '-S', '-u', RUNTIME]}
        environment = {'PATH': '/usr/local/bin:/usr/bin:/bin', 'HOME': '/tmp', 'LANG': 'C.UTF-8'}
        process['env'] = in_lines(environment | {'FAAS_FUNCTION': config['hostname']} | spec.env)
        config['root'] = {'path': self._rootfs, 'readonly': True}
        config['mounts'] += [
            tmpfs('/run', '1m', '755'),
            tmpfs('/tmp', '64m', '1777'),
            host('/usr', '/usr'),
            host('/function', tree),
        ]
        if spec.kind != 'handler':
            config['mounts'].append(tmpfs('/sys', '64k', '755', 'ro'))  # for its cgroup

    def _add_image(self, config, spec, tree, base):
        """The sandbox of an image: its layers, ids of its own, and of root's capabilities those that stay inside."""
        layers = [os.path.join(tree, layer) for layer in spec.layers]
        root = rootfs.mount(self._image, layers, self._mapping(base), self.limits.memory // 2, base)
        user, home = rootfs.find_user(root, spec.user)
        environment = {
            'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
            'HOSTNAME': config['hostname'],
            'HOME': home,
            'FAAS_FUNCTION': config['hostname'],
        }
        config['process'] |= {
            'user': user,
            'env': in_lines(environment | spec.env),
            'capabilities': capabilities(*IMAGE_CAPABILITIES),
        }
        config['root'] = {'path': root, 'readonly': False}
        config['linux']['maskedPaths'] += ['/sys/firmware', '/sys/devices/virtual/powercap']
        config['mounts'] += [
            {
                'destination': '/dev/pts',
                'type': 'devpts',
                'source': 'devpts',
                'options': ['nosuid', 'noexec', 'newinstance', 'ptmxmode=0666', 'mode=0620', 'gid=5'],
            },
            {
                'destination': '/dev/mqueue',
                'type': 'mqueue',
                'source': 'mqueue',
                'options': ['nosuid', 'noexec', 'nodev'],
            },
            {'destination': '/sys', 'type': 'sysfs', 'source': 'sysfs', 'options': ['nosuid', 'noexec', 'nodev', 'ro']},
            host('/etc/hosts', os.path.join(self._rootfs, 'etc/hosts')),
        ]

    @staticmethod
    def _add_ways_to_serve(config, spec, bundle):
        """The two of a program that is not under runtime.py: /control.sock, and listen(), also below port 1024."""
        environment = config['process']['env']
        if not any(line.startswith('PORT=') for line in environment):
            environment.append(f'PORT={injection.candidates(spec)[0]}')
        config['mounts'] += [
            host('/run/faas', os.path.join(bundle, 'control')),
            # Where a JVM and others see their limits; without, they take the host's memory for theirs.
            {
                'destination': '/sys/fs/cgroup',
                'type': 'cgroup',
                'source': 'cgroup',
                'options': ['nosuid', 'noexec', 'nodev', 'relatime', 'ro'],
            },
        ]
        linux = config['linux']
        linux['readonlyPaths'] = [*linux['readonlyPaths'], '/sys/fs/cgroup']  # runc leaves that itself writable
        linux['sysctl'] = {'net.ipv4.ip_unprivileged_port_start': '0'}
        linux['seccomp'] = seccomp.notifying(linux['seccomp'], os.path.join(bundle, 'notify.sock'), '')


# Within its own user namespace alone. KILL: a master that is root, such as gunicorn's, ends its workers that are not.
IMAGE_CAPABILITIES = ('CAP_CHOWN', 'CAP_SETUID', 'CAP_SETGID', 'CAP_DAC_OVERRIDE', 'CAP_KILL')


def capabilities(*names):
    return {
        kind: list(names) if kind in ('bounding', 'effective', 'permitted') else []
        for kind in ('bounding', 'effective', 'inheritable', 'permitted', 'ambient')
    }


def in_lines(environment):
    return [f'{name}={value}' for name, value in environment.items()]


def tmpfs(where, size, mode, *more):
    return {
        'destination': where,
        'type': 'tmpfs',
        'source': 'tmpfs',
        'options': ['nosuid', 'nodev', 'noexec', f'mode={mode}', f'size={size}', *more],
    }


def host(where, source):
    """A bind mount of the host's `source` and of what is mounted below it, read-only."""
    return {
        'destination': where,
        'type': 'bind',
        'source': source,
        'options': ['rbind', 'rro', 'rnosuid', 'rnodev'],
    }


def listening(path, mode):
    """A unix socket that listens at `path`, which may be longer than an address of 108 bytes, for whom `mode` lets."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.bind(f'/proc/self/fd/{folder}/{os.path.basename(path)}')
        os.chmod(path, mode)
        sock.listen(128)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(folder)


class Container(NamedTuple):
    """A running container: the runtime's id, its first process as pid and pidfd (owned), the first of its ids.

    Without a channel it has two sockets that listen (owned): /control.sock, and where its notification descriptor
    comes.
    """

    ident: str
    pid: int
    pidfd: int
    base: int
    control: socket.socket | None = None
    notifier: socket.socket | None = None

    def kill(self, number=signal.SIGKILL):
        """Signal the first process; with SIGKILL everything in the container goes with it."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def catches(self, number):
        """True if the first process has a handler for a signal; without one the kernel keeps it from that process."""
        with contextlib.suppress(OSError), open(f'/proc/{self.pid}/status') as file:
            return bool(int(re.search(r'SigCgt:\s*([0-9a-f]+)', file.read())[1], 16) >> number - 1 & 1)
        return False

    def reap(self):
        """Wait for the end and close the pidfd; the exit code, 128 + N for signal N."""
        try:
            ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
        except ChildProcessError:  # not ours to wait for: this process is no subreaper
            return 0
        finally:
            os.close(self.pidfd)


class Log:
    """The output of a function's instances, in a file of bounded size."""

    def __init__(self, path):
        self.path = path
        self._lock = threading.Lock()

    def append(self, data):
        """Write as the instance did; what the disk refuses is lost, not the instance."""
        with self._lock, contextlib.suppress(OSError):
            with open(self.path, 'ab') as file:
                file.write(data)
                full = file.tell() >= LOG_LIMIT
            if full:
                os.replace(self.path, f'{self.path}.1')

    def last(self, lines):
        """The last `lines` lines as bytes."""
        data = b''
        for path in (f'{self.path}.1', self.path):
            with contextlib.suppress(OSError), open(path, 'rb') as file:
                data += file.read(2 * LOG_LIMIT)
        return b''.join(data.splitlines(keepends=True)[-lines:]) if lines else b''


class LogPipe:
    """One instance's stdout and stderr on their way into a Log."""

    def __init__(self, log, reader=None):
        """A new pipe, or the `reader` (consumed) of one whose instance was started by a faasd that is no more."""
        self._log, self._lines, self._rest = log, collections.deque(maxlen=TAIL_LINES), b''
        self._ended = threading.Event()
        self.reader, self.writer = reader, None
        if reader is None:
            self.reader, writer = os.pipe2(os.O_CLOEXEC)
            # The instance gets an end for both: should faasd die, it has a reader all the same, and no write fails.
            self.writer = os.open(f'/proc/self/fd/{writer}', os.O_RDWR | os.O_CLOEXEC)
            os.close(writer)
        os.set_blocking(self.reader, False)

    def close_writer(self):
        """Let go of our copy of the writing end: the instance has its own."""
        os.close(self.writer)

    def copy(self):
        """Move what is there; False at the end."""
        try:
            data = os.read(self.reader, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._log.append(data)
        *lines, self._rest = (self._rest + data).split(b'\n')
        self._lines.extend(line[:LINE_LIMIT] for line in lines)
        self._rest = self._rest[-LINE_LIMIT:]
        return True

    def close(self):
        os.close(self.reader)
        self._ended.set()

    def wait(self):
        """Return when all was copied that an instance wrote before its end; a second at most."""
        self._ended.wait(timeout=1)

    def tail(self):
        """The instance's last lines as text."""
        lines = [*self._lines, self._rest] if self._rest else list(self._lines)
        return [line.decode(errors='replace') for line in lines]


class LogCopier:
    """One thread that copies every instance's output, so that a busy accept loop never waits for a disk."""

    def __init__(self):
        self._epoll, self._pipes = select.epoll(), {}
        threading.Thread(target=self._run, name='logs', daemon=True).start()

    def add(self, pipe):
        self._pipes[pipe.reader] = pipe
        self._epoll.register(pipe.reader, select.EPOLLIN)

    def _run(self):
        while True:
            time.sleep(PAUSE_S)
            for fd, _ in self._epoll.poll():
                if not self._pipes[fd].copy():
                    # Before it is closed: a child of ours may hold a copy between fork and exec, and epoll would go on.
                    self._epoll.unregister(fd)
                    self._pipes.pop(fd).close()
