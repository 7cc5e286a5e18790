"""Containers by runc or crun: starts and removes them, and takes over those that a former faasd left."""

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handlers.containers import bundle, protocol, rootfs, volumes
from handlers.containers.bundle import ID_RANGE
from handlers.containers.cgroup import Cgroup
from handlers.containers.execution import execute
from handlers.containers.limits import Bounds, Limits, hits, usage
from handlers.containers.private import Private
from handlers.images.spec import Spec
from host import process, sock_diag
from host.egress import Egress
from host.errors import EXPECTED, FaasError

ID_SLOTS = 4096
OUT_OF_MEMORY = 'ran out of memory'  # how the reason of such an end begins
AT_LIMIT = ', after it came up against its'
NOTIFIER = 'notify.sock'  # where the OCI runtime brings the descriptor that asks for each listen()
LEFTOVERS_END_S = 10  # how long killed containers of a former run may take to end


class ContainerError(FaasError):
    """The OCI runtime could not start a container."""


class Containers:
    """Makes and removes the containers of one server. Other servers on the same kernel have another `prefix`."""

    def __init__(
        self,
        prefix: str,
        limits: Limits,
        run_dir: str = '/run/faasd',
        id_base: int = 0x70000000,
        cgroup: str = '',
        runtime: str = 'runc',
        layers_base: int | None = None,
        most: Limits | None = None,
        private: Private | None = None,
        volume_store: volumes.VolumeStore | None = None,
        egress: Egress | None = None,
    ) -> None:
        self.prefix, self._id_base, self._egress = prefix, id_base, egress
        self.bounds, self.private = Bounds(limits, most or limits), private or Private(f'{run_dir}/private')
        self._volume_store, self.volume_holders = volume_store, volumes.Holders()
        self._layers_base = layers_base or id_base  # the first of the ids that own the files of layers
        self._cgroup = Cgroup(f'{cgroup}/{prefix}')
        self._rootfs, self._instances = os.path.join(run_dir, 'rootfs'), os.path.join(run_dir, 'instances')
        self._image = os.path.join(run_dir, 'image')  # where each instance of an image sees its own root file system
        self._roots = {each: os.path.join(run_dir, each) for each in ('runc', 'crun')}
        self._runtime = (runtime, '--root', self._roots[runtime])
        self._slots, self._lock = set(), threading.Lock()
        self._configurations = bundle.Configurations(self.bounds, self._cgroup.path, self._rootfs)
        self._leftovers: dict[str, Container | None] = {}  # id → its ended container, if that had a process
        self._remover, self._closing = None, False
        self._mappings = {}  # (first inner id, first id, how many) → the user namespace that maps them

    def prepare(self, wanted: Callable[[dict], bool] = lambda record: False) -> list[tuple[dict, 'Container']]:
        """End the instances that a former run left, and lay out the root file system that all folders share.

        Kept are those that run, serve a listener of their own, and are wanted(record). Returns [(record, Container)] of
        them. What is left of the others is for remove_leftovers(): it takes long, and functions shall be served first.
        """
        kept = self._end_leftovers(wanted)
        self._cgroup.remove()
        if not kept:  # else it may be in use: then it is only updated
            shutil.rmtree(self._rootfs, ignore_errors=True)
        os.makedirs(self._instances, mode=0o700, exist_ok=True)
        os.makedirs(os.path.join(self._image, 'root'), exist_ok=True)  # `runc exec` goes there, and sees nothing of it
        os.makedirs(self.private.where, mode=0o700, exist_ok=True)
        rootfs.lay_out(self._rootfs)
        return kept

    def _end_leftovers(self, wanted):
        kept, records = [], {}
        folders = [folder for folder in (self._instances, *self._roots.values()) if os.path.isdir(folder)]
        for ident in {ident for folder in folders for ident in os.listdir(folder)}:
            record, container = self._left(ident)
            records[ident] = record
            if container and record['listener'] is not None and wanted(record):
                kept.append((record, container))
                if self._egress and 'egress' in record:
                    self._egress.adopt(ident, record['egress'])
            elif container or record:
                self._leftovers[ident] = container
            else:  # nobody knows what it is, but the runtime
                self._delete(ident)
        living = select.poll()
        running = {container.pidfd for container in self._leftovers.values() if container}
        for container in filter(None, self._leftovers.values()):
            container.kill()
            living.register(container.pidfd, select.POLLIN)
        deadline = time.monotonic() + LEFTOVERS_END_S  # they may hold listeners that the next ones would share
        while running and time.monotonic() < deadline:
            for fd, _ in living.poll(100):
                living.unregister(fd)
                running.discard(fd)
        leftovers = [container for container in self._leftovers.values() if container and container.pidfd in running]
        for container in (*leftovers, *(container for _, container in kept)):
            record = records[container.ident]
            self.volume_holders.take(container.ident, record['function'], record.get('volumes', {}), sure=True)
        return kept

    def _left(self, ident):
        """(record, Container) of an instance of a former run. None: there is no record, or the process has ended."""
        try:
            with open(os.path.join(self._instances, ident, 'record.json')) as file:
                record = json.load(file)
            pid, started, (base, _) = record['pid'], record['start_time'], record['ids']
            if pid is None:
                return None, None
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return record, None
        except (OSError, ValueError, KeyError, TypeError):
            return None, None
        if process.start_time(pid) != started:
            os.close(pidfd)
            return record, None
        self._slots.add((base - self._id_base) // ID_RANGE)
        return record, Container(ident, pid, pidfd, base, record.get('memory', self.bounds.default.memory))

    def remove_leftovers(self) -> None:
        """Begin to remove what prepare() has ended, in a thread of its own. close() ends that thread."""
        self._remover = threading.Thread(target=self._remove_leftovers, name='leftovers')
        self._remover.start()

    def _remove_leftovers(self):
        for ident in list(self._leftovers):
            if self._closing:  # the next run does the rest
                return
            container = self._leftovers[ident]
            self._delete(ident)
            if container:
                os.close(container.pidfd)
                with self._lock:
                    self._slots.discard((container.base - self._id_base) // ID_RANGE)
            del self._leftovers[ident]

    @staticmethod
    def output_of(container: 'Container') -> int | None:
        """The reading end (owned) of the output of an instance of a former run. None: its stderr is not our pipe."""
        with contextlib.suppress(OSError):
            fd = os.open(f'/proc/{container.pid}/fd/2', os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        return None

    def listener_of(self, record: dict, container: 'Container') -> socket.socket | None:
        """The listening socket (owned) that an instance of a former run serves. None if it has closed the socket."""
        ours = sock_diag.listening_inodes(80)  # no copy of other sockets: their close() could wait
        for where in self._cgroup.folders(container.ident):
            with contextlib.suppress(OSError), open(os.path.join(where, 'cgroup.procs')) as file:
                for pid in map(int, file.read().split()):
                    for fd in map(int, os.listdir(f'/proc/{pid}/fd')):
                        with contextlib.suppress(OSError):
                            if os.readlink(f'/proc/{pid}/fd/{fd}') not in ours:
                                continue
                            sock = process.socket_of(pid, fd)
                            if sock_diag.cookie(sock) == record['listener']:
                                return sock
                            sock.close()
        return None

    def start(
        self,
        name: str,
        revision: int,
        spec: Spec,
        tree: str,
        output: int,
        channel: int | None = None,
        cookie: int | None = None,
        more: Callable[[dict, int], None] | None = None,
    ) -> 'Container':
        """A running Container for a revision of function `name`. `tree` is the folder of its files, or of all layers.

        Borrows `output`, the writing end of the log, and `channel`, the end of the runtime. A program that does not run
        under runtime.py has no channel: `cookie` is that of the listener it will get. more(configuration, user
        namespace) may change what the runtime gets. Raises ContainerError; nothing is left then.
        """
        ident = f'{self.prefix}-{secrets.token_hex(4)}'
        with self._lock:
            slot = next((slot for slot in range(1, ID_SLOTS) if slot not in self._slots), None)
            if slot is None:
                raise ContainerError(f'{ID_SLOTS - 1} instances run already', 'remove functions that nobody uses')
            self._slots.add(slot)
        bundle_dir = os.path.join(self._instances, ident)
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self._delete, ident)
                wanted = dict.fromkeys(spec.settings.get('volumes', ()), spec.overlaps)
                self.volume_holders.take(ident, name, wanted)
                if self._egress:
                    undo.callback(self._egress.detach, ident)
                os.mkdir(bundle_dir, 0o700)
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
                    'memory': self.bounds.of(spec).memory,
                    'volumes': wanted,
                }
                self._write(bundle_dir, 'record.json', record)
                notifier = undo.enter_context(listening(os.path.join(bundle_dir, NOTIFIER), 0o600))
                control = None
                if channel is None:
                    os.mkdir(os.path.join(bundle_dir, 'control'))
                    control = undo.enter_context(listening(os.path.join(bundle_dir, 'control', 'control.sock'), 0o666))
                run = [ident, name, spec, tree, bundle_dir, base, {1: output, 2: output}, more]
                if channel is not None:
                    run[-2][protocol.CHANNEL_FD] = channel
                if spec.layers or wanted or self.private.is_wanted(spec):
                    rootfs.apart(lambda: self._run(*run))
                else:
                    self._run(*run)
                with open(os.path.join(bundle_dir, 'pid')) as file:
                    pid = int(file.read())
                record |= {'pid': pid, 'start_time': process.start_time(pid)}
                if texts := spec.settings.get('egress'):
                    record['egress'] = self._egress.record(ident, texts)
                self._write(bundle_dir, 'record.json', record)
                container = Container(ident, pid, os.pidfd_open(pid), base, record['memory'], control, notifier)
                undo.pop_all()
                return container
        except BaseException as error:
            with self._lock:
                self._slots.discard(slot)
            if isinstance(error, EXPECTED):
                raise ContainerError(str(error), getattr(error, 'hint', None)) from error
            raise

    def _run(self, ident, name, spec, tree, bundle_dir, base, fds, more):
        """Let the OCI runtime start the container with the descriptors `fds`."""
        make, limits = self._configurations, self.bounds.of(spec)
        users = self._mapping(0, base, ID_RANGE if spec.layers else 1)
        config = make.shared(ident, name, spec, base, users, os.path.join(bundle_dir, NOTIFIER))
        if spec.layers:
            layers = [os.path.join(tree, layer) for layer in spec.layers]
            owners = self._mapping(self._layers_base, base, ID_RANGE)
            root = rootfs.mount(self._image, layers, owners, limits.writable, base)
            make.add_image(config, spec, root, *rootfs.find_user(root, spec.user))
        else:
            make.add_folder(config, spec, tree)
        if protocol.CHANNEL_FD not in fds:
            make.add_ways_to_serve(config, spec, bundle_dir)
        if spec.settings.get('volumes'):
            ids = users if spec.layers else self._mapping(volumes.FOLDER_ID, base, 1)
            volumes.add(config, spec, self._image, self._volume_store, ids, base)
        # The instance must own its output to open /dev/stdout, where the log files of many images lead.
        user = config['process']['user']
        os.fchown(fds[1], base + user['uid'], base + user['gid'])
        if spec.healthcheck:
            self._write(bundle_dir, 'process.json', config['process'])  # without secrets
        config_dir = self.private.add(config, spec, base) if self.private.is_wanted(spec) else bundle_dir
        hosts = os.path.join(bundle_dir, 'hosts')
        with open(hosts, 'w') as file:
            file.write(rootfs.hosts_of(name))
        os.chmod(hosts, 0o644)
        config['mounts'].append(bundle.host('/etc/hosts', hosts))
        if texts := spec.settings.get('egress'):
            link = self._egress.attach(ident, name, texts, users, hosts)
            resolv = os.path.join(bundle_dir, 'resolv.conf')
            with open(resolv, 'w') as file:
                file.write(self._egress.resolv_conf(link))
            os.chmod(resolv, 0o644)
            bundle.add_egress(config, link.namespace, resolv)
        if more:
            more(config, users)
        self._write(config_dir, 'config.json', config)
        self._cgroup.bound_sockets(ident, limits.memory)
        pid_file, errors = os.path.join(bundle_dir, 'pid'), os.path.join(bundle_dir, 'runtime.log')
        # No session keyring: a host that is itself a container may refuse one, and keyctl is refused to functions.
        run = ['run', '--detach', '--no-new-keyring', '--bundle', config_dir, '--pid-file', pid_file]
        run += ['--preserve-fds', '1'] if protocol.CHANNEL_FD in fds else []
        code = process.run_with_fds([*bundle.limited(), *self._runtime, '--log', errors, *run, ident], fds)
        if config_dir != bundle_dir:
            os.unlink(os.path.join(config_dir, 'config.json'))  # the runtime has read it, and it may hold secrets
            if os.path.exists(os.path.join(kept := os.path.join(self._roots['crun'], ident), 'config.json')):
                self._write(kept, 'config.json', config | {'process': config['process'] | {'env': []}})
        if code:
            said = runtime_said(errors) or f'{self._runtime[0]} ended with exit code {code}'
            raise ContainerError(*program_missing(said, spec) or (said,))

    def execute(self, container: 'Container', args: Sequence[str], timeout_s: float) -> str | None:
        """Run a program to its end in the container of an image with a HEALTHCHECK: see execution.execute()."""
        return execute(self._runtime, os.path.join(self._instances, container.ident), args, timeout_s)

    def _mapping(self, inner, base, size):
        """The user namespace that maps `size` ids from `inner` to those from `base`. It is made once and kept.

        Its owner is `base`: what instances use up of the kernel's counts for each user, they use up for themselves.
        """
        with self._lock:
            if (inner, base, size) not in self._mappings:
                self._mappings[inner, base, size] = process.user_namespace(f'{inner} {base} {size}', owner=base)
            return self._mappings[inner, base, size]

    def remove(self, container: 'Container') -> str:
        """Remove what is left of a container whose first process has ended. Returns why it ended, as a line."""
        code = container.reap()
        signals = {128 + number: number.name for number in signal.Signals}
        reason = f'ended by {signals[code]}' if code in signals else f'ended with exit code {code}'
        found = self.hits(container.ident)
        if code in (137, 143) and found['memory']:
            reason = f'ran out of memory (the limit is {container.memory >> 20} MiB)'
        elif any(found.values()):
            reason += f'{AT_LIMIT} {" and ".join(key for key in found if found[key])}'
        if self._egress:
            self._egress.detach(container.ident)
        self._delete(container.ident)
        with self._lock:
            self._slots.discard((container.base - self._id_base) // ID_RANGE)
        return reason

    def close(self) -> None:
        """Remove what prepare() made, unless containers are left for the next faasd."""
        self._closing = True
        if self._remover:
            self._remover.join()
        for fd in self._mappings.values():
            os.close(fd)
        if self._slots or self._leftovers:
            return
        self._cgroup.remove()
        for folder in (self._rootfs, self._image, self.private.where, self._instances, *self._roots.values()):
            shutil.rmtree(folder, ignore_errors=True)

    def _delete(self, ident):
        for runtime, root in self._roots.items():  # a former run may have used the other one
            if os.path.isdir(root):
                with contextlib.suppress(process.CommandError):  # the runtime may be uninstalled by now
                    process.run([runtime, '--root', root, 'delete', '--force', ident], ok=range(256))
        self._cgroup.remove_container(ident)
        shutil.rmtree(os.path.join(self._instances, ident), ignore_errors=True)
        self.volume_holders.release(ident)

    @staticmethod
    def _write(bundle_dir: str, name: str, content: dict) -> None:
        path = os.path.join(bundle_dir, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 'w') as file:
            json.dump(content, file)

    def usage(self, container: 'Container') -> dict[str, float | str]:
        """What the container uses: see limits.usage(). `egress` is the address by which others see it."""
        used, address = usage(self._cgroup.folders(container.ident)), self.egress_address(container)
        return used | ({'egress': address} if address else {})

    def egress_address(self, container: 'Container') -> str | None:
        """The address by which others see the container, None without egress."""
        return self._egress and self._egress.address_of(container.ident)

    def hits(self, ident: str) -> dict[str, int]:
        """How often the container came up against a limit: see limits.hits()."""
        return hits(self._cgroup.folders(ident))


def runtime_said(path: str) -> str | None:
    """Why the runtime failed, from its log: the first fatal line. Later lines are consequences of that."""
    with contextlib.suppress(OSError), open(path) as file:
        lines = file.read().strip().splitlines()
        fatal = [line for line in lines if 'level=fatal' in line] or lines[-1:]
        said = [re.sub(r'\\+"', '"', line.partition('msg=')[2].strip('"') or line) for line in fatal]
        return re.sub(r'^nsexec-\d\[\d+\]: ', '', said[0]) if said else None


def program_missing(said: str, spec: Spec) -> tuple[str, str] | None:
    """(error, hint) when the runtime says that it found no such program on the PATH; else None."""
    if not re.search(r'executable file .*not found in \$PATH', said):
        return None
    program = spec.args[0]
    if spec.layers:
        return f'there is no program {program!r} in the image', 'build the program into the image'
    hint = 'install it there, in /usr/bin or /usr/local/bin, or put the program into the folder and start ./'
    return f'the program {program!r} is not installed on the server', f'{hint}{os.path.basename(program)}'


def listening(path: str, mode: int) -> socket.socket:
    """A unix socket that listens at `path` and has that mode. The path may be longer than 108 bytes."""
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
    """A running container: the id for the runtime, the first process as pid and pidfd (owned), the first host id.

    `memory` is its limit in bytes.

    `notifier` (owned) is where runc brings the seccomp notification descriptor; None after an adoption. A program
    without a channel has `control`, too: /control.sock, which is the instance's to close.
    """

    ident: str
    pid: int
    pidfd: int
    base: int
    memory: int
    control: socket.socket | None = None
    notifier: socket.socket | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the first process. SIGKILL ends everything in the container."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def catches(self, number: int) -> bool:
        """True if the first process has a handler for the signal. The kernel drops signals to PID 1 without one."""
        with contextlib.suppress(OSError), open(f'/proc/{self.pid}/status') as file:
            return bool(int(re.search(r'SigCgt:\s*([0-9a-f]+)', file.read())[1], 16) >> number - 1 & 1)
        return False

    def reap(self) -> int:
        """Wait for the end and close what is owned. Returns the exit code, 128 + N for signal N."""
        try:
            ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status
        except ChildProcessError:  # it is not our child: this process is not a subreaper
            return 0
        finally:
            self.close()

    def close(self) -> None:
        """Close what is owned."""
        os.close(self.pidfd)
        if self.notifier:
            self.notifier.close()
