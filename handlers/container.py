"""Containers by runc or crun: the OCI bundle of an instance, its ids and limits, and the log of its output."""

import collections
import contextlib
import json
import os
import platform
import re
import resource
import secrets
import select
import shutil
import signal
import threading
import time
from typing import NamedTuple

import shell
from handlers import protocol

RUNTIME = '/opt/faas/runtime.py'
LOG_LIMIT = 1 << 20  # bytes; one older file of that size is kept
TAIL_LINES = 20
LINE_LIMIT = 4096
PAUSE_S = 0.01  # between two turns of the copier: a function that floods its log gets a pipe's worth for each

# Every instance has a range of its own, so that no two can signal, trace or read each other, and nothing in the host's
# tree is theirs. From above what systemd gives to containers (UIDS-GIDS.md: 524288 to 1879048191) up to 2^31, where
# programs begin to fail.
ID_RANGE = 65536
ID_SLOTS = 4096

# A passed socket is of the host's network, and its ioctl requests 0x8900 to 0x89ff list and change interfaces. The
# kernel compares 64 bits but the request is the low 32: MASKED_EQ looks at those alone. The rest is what containers are
# commonly refused: ways to more kernel.
# fmt: off
REFUSED_SYSCALLS = (
    'acct', 'add_key', 'bpf', 'clock_adjtime', 'clock_settime', 'create_module', 'delete_module', 'finit_module',
    'fsconfig', 'fsmount', 'fsopen', 'fspick', 'get_mempolicy', 'init_module', 'io_uring_enter',
    'io_uring_register', 'io_uring_setup', 'ioperm', 'iopl', 'kcmp', 'kexec_file_load', 'kexec_load', 'keyctl',
    'lookup_dcookie', 'mbind', 'migrate_pages', 'mount', 'mount_setattr', 'move_mount', 'move_pages',
    'name_to_handle_at', 'nfsservctl', 'open_by_handle_at', 'open_tree', 'perf_event_open', 'pivot_root',
    'process_vm_readv', 'process_vm_writev', 'ptrace', 'query_module', 'quotactl', 'reboot', 'request_key',
    'set_mempolicy', 'setns', 'settimeofday', 'stime', 'swapoff', 'swapon', 'syslog', 'sysfs', 'umount', 'umount2',
    'unshare', 'uselib', 'userfaultfd', 'ustat', 'vhangup', 'vm86', 'vm86old',
)
# fmt: on
CLONE_NEW = 0x7E020000  # CLONE_NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97
# The network namespace does not confine each family (AF_VSOCK leads to a hypervisor). The upper half of the register,
# which the kernel ignores, is above the greatest good one.
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
REFUSED_FAMILIES = [
    ('SCMP_CMP_GT', AF_NETLINK),
    *(('SCMP_CMP_EQ', family) for family in range(AF_NETLINK) if family not in (AF_UNIX, AF_INET, AF_INET6)),
]


def refuse(*names, errno=EPERM, **argument):
    rule = {'names': names, 'action': 'SCMP_ACT_ERRNO', 'errnoRet': errno}
    return rule | ({'args': [argument]} if argument else {})


SECCOMP = {
    'defaultAction': 'SCMP_ACT_ALLOW',
    'architectures': [
        {'x86_64': 'SCMP_ARCH_X86_64', 'aarch64': 'SCMP_ARCH_AARCH64'}.get(platform.machine(), 'SCMP_ARCH_NATIVE')
    ],
    'syscalls': [
        refuse('ioctl', index=1, value=0xFFFFFF00, valueTwo=0x8900, op='SCMP_CMP_MASKED_EQ'),
        *(refuse('socket', errno=EAFNOSUPPORT, index=0, value=family, op=op) for op, family in REFUSED_FAMILIES),
        *(
            refuse('clone', index=0, value=1 << bit, valueTwo=1 << bit, op='SCMP_CMP_MASKED_EQ')
            for bit in range(32)
            if CLONE_NEW >> bit & 1
        ),
        refuse('clone3', errno=ENOSYS),  # its flags are behind a pointer; libc falls back to clone
        refuse(*REFUSED_SYSCALLS),
    ],
}


class Limits(NamedTuple):
    """What one instance may use: bytes of memory, processes and threads, cores."""

    memory: int
    pids: int
    cpus: float


class ContainerError(Exception):
    """The OCI runtime could not start a container."""


class Containers:
    """Makes and removes the containers of one server; `prefix` tells them from another server's on the same kernel."""

    def __init__(self, prefix, limits, run_dir='/run/faasd', id_base=0x70000000, cgroup='', runtime='runc'):
        self.prefix, self.limits, self._id_base = prefix, limits, id_base
        self._cgroup = f'{cgroup}/{prefix}'
        self._rootfs, self._instances = os.path.join(run_dir, 'rootfs'), os.path.join(run_dir, 'instances')
        self._roots = {each: os.path.join(run_dir, each) for each in ('runc', 'crun')}
        self._runtime = (runtime, '--root', self._roots[runtime])
        self._slots, self._lock = set(), threading.Lock()

    def prepare(self):
        """Remove what a killed run left of its instances, and lay out the root file system that all instances share."""
        for folder in (self._instances, *self._roots.values()):
            if os.path.isdir(folder):
                for ident in os.listdir(folder):
                    self._delete(ident)
        self._remove_cgroups()
        shutil.rmtree(self._rootfs, ignore_errors=True)
        os.makedirs(self._instances, mode=0o700, exist_ok=True)
        # With a user namespace every mount point must exist before, and a tmpfs takes the mode of its mount point (runc
        # 1.1).
        for folder in ('dev', 'etc', 'function', 'opt/faas', 'proc', 'run', 'sys', 'tmp', 'usr', 'var'):
            os.makedirs(os.path.join(self._rootfs, folder))
        os.chmod(os.path.join(self._rootfs, 'tmp'), 0o1777)
        for name in ('bin', 'sbin', 'lib', 'lib32', 'lib64', 'libx32'):
            if os.path.islink(f'/{name}'):
                os.symlink(os.readlink(f'/{name}'), os.path.join(self._rootfs, name))
        os.symlink('run/control.sock', os.path.join(self._rootfs, 'control.sock'))
        os.symlink('/tmp', os.path.join(self._rootfs, 'var/tmp'))
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

    def start(self, name, revision, folder, channel, output):
        """A running Container for revision `folder` of function `name`.

        Borrows the runtime's channel and the log's writing end. Raises ContainerError; nothing is left then.
        """
        ident = f'{self.prefix}-{secrets.token_hex(4)}'
        with self._lock:
            slot = next((slot for slot in range(ID_SLOTS) if slot not in self._slots), None)
            if slot is None:
                raise ContainerError(f'{ID_SLOTS} instances run already')
            self._slots.add(slot)
        bundle = os.path.join(self._instances, ident)
        try:
            os.mkdir(bundle, 0o700)
            base = self._id_base + slot * ID_RANGE
            record = {
                'function': name,
                'revision': revision,
                'ids': [base, 1],
                'protocol': protocol.VERSION,
                'pid': None,
                'start_time': None,
                'descriptors': {'channel': protocol.CHANNEL_FD},
            }
            self._write(bundle, 'record.json', record)
            self._write(bundle, 'config.json', self._config(ident, name, folder, base))
            pid_file, errors = os.path.join(bundle, 'pid'), os.path.join(bundle, 'runtime.log')
            # No session keyring: a host that is itself a container may refuse one, and keyctl is refused to functions.
            run = ['run', '--detach', '--no-new-keyring', '--preserve-fds', '1', '--bundle', bundle]
            code = shell.run_with_fds(
                [*self._runtime, '--log', errors, *run, '--pid-file', pid_file, ident],
                {1: output, 2: output, protocol.CHANNEL_FD: channel},
            )
            if code:
                raise ContainerError(self._runtime_said(errors) or f'{self._runtime[0]} ended with exit code {code}')
            with open(pid_file) as file:
                pid = int(file.read())
            self._write(bundle, 'record.json', record | {'pid': pid, 'start_time': shell.start_time(pid)})
            return Container(ident, pid, os.pidfd_open(pid), slot)
        except BaseException as error:
            self._delete(ident)
            with self._lock:
                self._slots.discard(slot)
            if isinstance(error, (OSError, shell.CommandError)):
                raise ContainerError(str(error)) from error
            raise

    def remove(self, container):
        """Remove what is left of a container whose first process has ended; return why it ended, as a line."""
        code = container.reap()
        signals = {128 + number: number.name for number in signal.Signals}
        reason = f'ended by {signals[code]}' if code in signals else f'ended with exit code {code}'
        if code in (137, 143) and self._out_of_memory(container.ident):
            reason = f'ran out of memory (its limit is {self.limits.memory >> 20} MiB)'
        self._delete(container.ident)
        with self._lock:
            self._slots.discard(container.slot)
        return reason

    def close(self):
        """Take away what `prepare` made; every container is removed before."""
        self._remove_cgroups()
        for folder in (self._rootfs, self._instances, *self._roots.values()):
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
            said = [line.partition('msg=')[2].strip('"') or line for line in fatal]
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

    def _config(self, ident, name, folder, base):
        """The OCI runtime configuration (config.md of the OCI runtime specification, 1.0.2)."""

        def tmpfs(where, size, mode):
            return {
                'destination': where,
                'type': 'tmpfs',
                'source': 'tmpfs',
                'options': ['nosuid', 'nodev', 'noexec', f'mode={mode}', f'size={size}'],
            }

        def host(where, source):
            return {
                'destination': where,
                'type': 'bind',
                'source': source,
                'options': ['rbind', 'rro', 'rnosuid', 'rnodev'],  # what is mounted below it, too
            }

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
        ids = [{'containerID': 0, 'hostID': base, 'size': 1}]
        none = {kind: [] for kind in ('bounding', 'effective', 'inheritable', 'permitted', 'ambient')}
        return {
            'ociVersion': '1.0.2',
            'process': {
                'terminal': False,
                'user': {'uid': 0, 'gid': 0},
                'cwd': '/function',
                'args': ['/usr/bin/python3', '-I', '-S', '-u', RUNTIME],
                'env': ['PATH=/usr/local/bin:/usr/bin:/bin', 'HOME=/tmp', 'LANG=C.UTF-8', f'FAAS_FUNCTION={name}'],
                'capabilities': none,
                'noNewPrivileges': True,
                'oomScoreAdj': 500,
                'rlimits': [
                    {'type': 'RLIMIT_NOFILE', 'hard': files, 'soft': files},
                    {'type': 'RLIMIT_CORE', 'hard': 0, 'soft': 0},
                ],
            },
            'root': {'path': self._rootfs, 'readonly': True},
            'hostname': name,
            'mounts': [
                {'destination': '/proc', 'type': 'proc', 'source': 'proc', 'options': ['nosuid', 'nodev', 'noexec']},
                {
                    'destination': '/dev',
                    'type': 'tmpfs',
                    'source': 'tmpfs',
                    'options': ['nosuid', 'noexec', 'mode=755', 'size=64k'],
                },
                tmpfs('/dev/shm', '16m', '1777'),
                tmpfs('/run', '1m', '755'),
                tmpfs('/tmp', '64m', '1777'),
                host('/usr', '/usr'),
                host('/function', folder),
            ],
            'linux': {
                'namespaces': [{'type': kind} for kind in ('pid', 'mount', 'ipc', 'uts', 'network', 'user', 'cgroup')],
                'uidMappings': ids,
                'gidMappings': ids,
                'cgroupsPath': f'{self._cgroup}/{ident}',
                'resources': resources,
                'seccomp': SECCOMP,
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


class Container(NamedTuple):
    """A running container: the runtime's id, its first process as pid and pidfd (owned), its slot in the id ranges."""

    ident: str
    pid: int
    pidfd: int
    slot: int

    def kill(self):
        """SIGKILL the first process; with it everything in the container goes."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

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

    def __init__(self, log):
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.reader, False)
        self._log, self._lines, self._rest = log, collections.deque(maxlen=TAIL_LINES), b''
        self._ended = threading.Event()

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
