"""The OCI configuration of an instance (config.md of the OCI runtime specification, 1.0.2)."""

import os
import re
import resource
from typing import NamedTuple

from handlers.containers import rootfs, seccomp
from handlers.containers.limits import Bounds
from handlers.images.spec import Spec, candidates
from host import apparmor

RUNTIME = '/opt/faas/runtime.py'
MOST_FILES = 8192  # that a process of an instance may have open
# Every instance has its own range of ids, so that no instance can signal, trace or read another, and none owns a file
# of the host. The first range owns the layers of images on the host; when layers are mounted, it is mapped to the range
# of the instance. The ranges lie above those that systemd gives to containers (UIDS-GIDS.md: 524288 to 1879048191) and
# below 2^31, where programs begin to fail.
ID_RANGE = 65536


class Configurations(NamedTuple):
    """Makes the configurations of one server's instances. All folders share the root file system `rootfs`."""

    bounds: Bounds
    cgroup: str
    rootfs: str

    def shared(self, ident: str, name: str, spec: Spec, base: int, users: int, notifier: str) -> dict:
        """The part that is alike for folders and images. `base` is the first host id, `users` the user namespace.

        Whoever listens at the unix socket `notifier` is asked for each listen().
        """
        memory, pids, cpus, _ = self.bounds.of(spec)
        resources = {
            'memory': {'limit': memory},
            'pids': {'limit': pids},
            'cpu': {'quota': int(cpus * 100_000), 'period': 100_000},
            'devices': [{'allow': False, 'access': 'rwm'}],
        }
        if os.path.exists('/sys/fs/cgroup/cgroup.controllers') or os.path.exists(
            '/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes'
        ):
            resources['memory']['swap'] = memory  # the sum of both: so there is no swap
        ids = [{'containerID': 0, 'hostID': base, 'size': ID_RANGE if spec.layers else 1}]
        profile = apparmor.loaded()  # asked each time: without it a runtime refuses to start the container
        return {
            'ociVersion': '1.0.2',
            'process': {
                'terminal': False,
                'user': {'uid': 0, 'gid': 0},
                'cwd': spec.cwd,
                'args': list(spec.args),
                'capabilities': capabilities(),
                'noNewPrivileges': True,
                **({'apparmorProfile': profile} if profile else {}),
                'oomScoreAdj': 500,  # root's to lower: the runtime sets it with CAP_SYS_RESOURCE
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
                'namespaces': [
                    *({'type': kind} for kind in ('pid', 'mount', 'ipc', 'uts', 'network', 'cgroup')),
                    {'type': 'user', 'path': f'/proc/{os.getpid()}/fd/{users}'},
                ],
                'uidMappings': ids,
                'gidMappings': ids,
                'cgroupsPath': f'{self.cgroup}/{ident}',
                'resources': resources,
                'seccomp': seccomp.notifying(seccomp.IMAGE if spec.layers else seccomp.FOLDER, notifier),
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

    def add_folder(self, config: dict, spec: Spec, tree: str) -> None:
        """Add the sandbox of a folder: the host's /usr, read-only; one id; no capability."""
        process = config['process']
        if spec.kind == 'handler':
            process |= {'cwd': '/function', 'args': ['/usr/bin/python3', '-I', '-S', '-u', RUNTIME]}
        environment = {'PATH': '/usr/local/bin:/usr/bin:/bin', 'HOME': '/tmp', 'LANG': 'C.UTF-8'}
        process['env'] = in_lines(environment | {'FAAS_FUNCTION': config['hostname']} | spec.env)
        config['root'] = {'path': self.rootfs, 'readonly': True}
        programs = ['exec'] if spec.settings.get('exec_tmp') else []  # the last option counts
        config['mounts'] += [
            tmpfs('/run', '1m', '755'),
            tmpfs('/tmp', str(self.bounds.of(spec).writable), '755', *programs),
            host('/usr', '/usr'),
            host('/function', tree),
            *(host(path, path) for path in rootfs.settings_shown(self.rootfs)),
        ]
        if spec.kind != 'handler':
            config['mounts'].append(tmpfs('/sys', '64k', '755', 'ro'))  # for its cgroup

    def add_image(self, config: dict, spec: Spec, root: str, user: dict, home: str) -> None:
        """Add the sandbox of an image: the mounted layers, and the capabilities that stay inside."""
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
        ]

    @staticmethod
    def add_ways_to_serve(config: dict, spec: Spec, bundle: str) -> None:
        """Add the two ways to serve without runtime.py: /control.sock, and listen(), also below port 1024."""
        environment = config['process']['env']
        port = next((line[5:] for line in environment if line.startswith('PORT=')), None)
        if port is None:
            port = str(candidates(spec)[0])
            environment.append(f'PORT={port}')
        if spec.kind == 'command':  # a Procfile is written for a shell
            words = config['process']['args']
            config['process']['args'] = [re.sub(r'\$PORT\b|\$\{PORT\}', port, word) for word in words]
        config['mounts'] += [
            host('/run/faas', os.path.join(bundle, 'control')),
            # A JVM and others read their limits here. Without it they plan with the memory of the host.
            {
                'destination': '/sys/fs/cgroup',
                'type': 'cgroup',
                'source': 'cgroup',
                'options': ['nosuid', 'noexec', 'nodev', 'relatime', 'ro'],
            },
        ]
        linux = config['linux']
        linux['readonlyPaths'] = [*linux['readonlyPaths'], '/sys/fs/cgroup']  # runc leaves the top folder writable
        linux['sysctl'] = {'net.ipv4.ip_unprivileged_port_start': '0'}


def add_egress(config: dict, namespace: int, resolv_conf: str) -> None:
    """Have the instance in a network that was made for it (a descriptor), with this file in /etc."""
    linux = config['linux']
    others = [each for each in linux['namespaces'] if each['type'] != 'network']
    linux['namespaces'] = [*others, {'type': 'network', 'path': f'/proc/{os.getpid()}/fd/{namespace}'}]
    config['mounts'].append(host('/etc/resolv.conf', resolv_conf))


# Valid only in the instance's user namespace. KILL: a master that is root, such as gunicorn's, ends its workers.
IMAGE_CAPABILITIES = (
    *('CAP_CHOWN', 'CAP_SETUID', 'CAP_SETGID', 'CAP_DAC_OVERRIDE', 'CAP_FOWNER', 'CAP_KILL', 'CAP_SYS_CHROOT'),
)


def limited() -> list[str]:
    """How to run the OCI runtime so that the instance has its limits (setrlimit(2)).

    The runtime cannot set them: root has no power over a user namespace of another user where a container or a unit
    keeps CAP_SYS_RESOURCE from it.
    """
    files = min(MOST_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])  # a container cannot have more than we do
    return ['prlimit', f'--nofile={files}:{files}', '--core=0:0']


def capabilities(*names: str) -> dict:
    """The capabilities of a process that has exactly these."""
    return {
        kind: list(names) if kind in ('bounding', 'effective', 'permitted') else []
        for kind in ('bounding', 'effective', 'inheritable', 'permitted', 'ambient')
    }


def in_lines(environment: dict[str, str]) -> list[str]:
    """An environment as NAME=VALUE texts."""
    return [f'{name}={value}' for name, value in environment.items()]


def tmpfs(where: str, size: str, mode: str, *more: str) -> dict:
    """A mount of a new file system in memory."""
    return {
        'destination': where,
        'type': 'tmpfs',
        'source': 'tmpfs',
        'options': ['nosuid', 'nodev', 'noexec', f'mode={mode}', f'size={size}', *more],
    }


def host(where: str, source: str, how: str = 'ro') -> dict:
    """A bind mount of the host's folder `source`, 'ro' or 'rw', and of what is mounted below it."""
    return {
        'destination': where,
        'type': 'bind',
        'source': source,
        'options': ['rbind', f'r{how}', 'rnosuid', 'rnodev'],
    }
