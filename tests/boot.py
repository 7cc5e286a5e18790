"""Whole machines: a Debian 12 tree booted by systemd-nspawn, systemd as PID 1, on a bridge in a host of the lab.

The tree is made once by debootstrap and kept in CACHE; a machine writes into an overlay in memory.
"""

import fcntl
import hashlib
import pathlib
import shutil
import subprocess
import unittest

from tests import lab

CACHE = pathlib.Path('/var/cache/faasd-test')
MIRROR = 'http://deb.debian.org/debian'
PACKAGES = [
    *('systemd', 'systemd-sysv', 'systemd-resolved', 'dbus', 'sudo', 'git', 'make', 'python3', 'ca-certificates', 'curl'),
    *('iproute2', 'iputils-ping', 'wireguard-tools', 'wireguard-go', 'runc', 'nftables', 'procps'),
    *('bind9-dnsutils', 'traceroute'),
]
# What a machine needs beside its packages. nspawn shows cgroups of version 1 read-only, and runc writes there.
FILES = {
    'etc/systemd/system/writable-cgroups.service': '''
[Unit]
DefaultDependencies=no
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'for each in /sys/fs/cgroup/*/; do mount -o remount,bind,rw $each; done'
[Install]
WantedBy=sysinit.target
''',
    'etc/sudoers.d/joe': 'joe ALL=(ALL) NOPASSWD: ALL\n',
    'etc/systemd/system.conf.d/quick.conf': '[Manager]\nDefaultTimeoutStopSec=20s\n',
}
REBOOTS = 133  # nspawn's exit code asks for that
SERVER, LAPTOP = '203.0.113.10', '203.0.113.20'


def tree():
    """The path of the tree, which is made if need be. Raises SkipTest when no Debian can be had."""
    recipe = hashlib.sha256(repr((PACKAGES, FILES)).encode()).hexdigest()[:12]
    made = CACHE / f'debian12-{recipe}'
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(CACHE / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it made
        if not made.exists():
            for old in CACHE.glob('debian12-*'):
                shutil.rmtree(old)
            _make(CACHE / 'debian12-new')
            (CACHE / 'debian12-new').rename(made)
    return made


def _make(where):
    print('making a Debian 12 tree, once, which takes a minute or two', flush=True)
    done = subprocess.run(
        ['debootstrap', '--variant=minbase', f'--include={",".join(PACKAGES)}', 'bookworm', where, MIRROR],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise unittest.SkipTest('no Debian tree can be made here: ' + done.stdout.strip().splitlines()[-1])
    for name, text in FILES.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    chroot = ['chroot', where]
    subprocess.run([*chroot, 'useradd', '--create-home', '--shell=/bin/bash', 'joe'], check=True)
    subprocess.run([*chroot, 'systemctl', 'enable', '--quiet', 'writable-cgroups', 'systemd-networkd'], check=True)
    subprocess.run(
        [
            *chroot,
            'systemctl',
            'mask',
            '--quiet',
            'console-getty',
            'getty@tty1',
            'apt-daily.timer',
            'apt-daily-upgrade.timer',
        ],
        check=True,
    )
    shutil.copy(shutil.which('coredns'), where / 'usr/local/bin/coredns')
    (where / 'etc/machine-id').write_text('')


class Machine:
    """A booted tree on the bridge lan0 of `lan`, a lab.Host; see lan(). Ends with it."""

    def __init__(self, lan, name, address, files=()):
        self.lan, self.name, self.root = lan, name, f'/run/{name}'
        lan.run(['mkdir', '-p', f'{self.root}.work/upper', f'{self.root}.work/work', self.root])
        lan.run(
            [
                'mount',
                '-t',
                'overlay',
                'overlay',
                '-o',
                f'lowerdir={tree()},upperdir={self.root}.work/upper,workdir={self.root}.work/work',
                self.root,
            ]
        )
        self.write('/etc/hostname', f'{name}\n')
        self.write(
            '/etc/systemd/network/10-host0.network',
            f'[Match]\nName=host0\n[Network]\nAddress={address}/24\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n',
        )
        for path, text in dict(files).items():
            self.write(path, text)
        self.boot()

    def write(self, path, text):
        """Put a file into it, also while it is off."""
        file = self.lan.path(self.root + path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)

    def boot(self):
        """Start it and wait until systemd says that it is up."""
        self._nspawn = self.lan.popen(
            [
                'systemd-nspawn',
                '--quiet',
                '--register=no',
                '--keep-unit',
                '--network-bridge=lan0',
                '--boot',
                f'--directory={self.root}',
                f'--machine={self.name}',
                '--capability=all',
                '--bind=/dev/net/tun',
                '--kill-signal=SIGRTMIN+3',
                '--resolv-conf=off',
                '--timezone=off',
                '--console=passive',
            ],
            cwd='/',
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._wait_up()

    def _wait_up(self):
        self._leader = lab.wait_until(self._find_leader, 20, f'{self.name} to boot')
        self.state = lab.wait_until(self._booted, 60, f'systemd of {self.name}')

    def _find_leader(self):
        children = self.lan.run(['pgrep', '-n', '-P', str(self._nspawn_pid())], ok=(0, 1)).stdout.split()
        if self._nspawn.poll() is not None:
            raise AssertionError(f'{self.name} does not boot: {self._nspawn.stdout.read()}')
        return children and children[0]

    def _nspawn_pid(self):
        return self.lan.run(['pgrep', '-f', f'^systemd-nspawn .*--machine={self.name} ']).stdout.split()[0]

    def _booted(self):
        state = self.run(['systemctl', 'is-system-running'], ok=None).stdout.strip()
        return state if state in ('running', 'degraded') else None

    def run(self, argv, user=None, **options):
        """As Host.run; as root, or as `user` with a login's environment."""
        if user:
            argv = ['su', '-', user, '-c', ' '.join(argv) if len(argv) > 1 else argv[0]]
        enter = [
            'nsenter',
            f'--target={self._leader}',
            '--mount',
            '--net',
            '--uts',
            '--ipc',
            '--pid',
            '--cgroup',
            'env',
            '-i',
            '-C',
            '/root',
            'HOME=/root',
            'TERM=dumb',
            'LANG=C.UTF-8',
            'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
        ]
        return self.lan.run([*enter, *argv], cwd='/', **options)

    def sh(self, command, **options):
        """The stdout of a command line."""
        return self.run(['sh', '-c', command], **options).stdout

    def reboot(self):
        """From a new PID 1 on, in new namespaces."""
        self.run(['systemctl', 'reboot'], ok=None)
        code = self._nspawn.wait(60)
        if code != REBOOTS:
            raise AssertionError(f'{self.name} does not reboot: {code} {self._nspawn.stdout.read()}')
        self.boot()


def lan():
    """A lab.Host with a bridge for machines."""
    host = lab.Host('lan')
    host.run(['ip', 'link', 'add', 'lan0', 'type', 'bridge'])
    host.run(['ip', 'link', 'set', 'lan0', 'up'])
    return host
