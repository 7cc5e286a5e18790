"""Whole machines: a Debian 12 tree booted by systemd-nspawn, systemd as PID 1, on a bridge in a host of the lab.

The tree is made once by debootstrap and kept in CACHE; a machine writes into an overlay in memory.
"""

import fcntl
import hashlib
import pathlib
import re
import shutil
import subprocess

from tests import lab

CACHE = pathlib.Path('/var/cache/faasd-test')
MIRROR = 'http://deb.debian.org/debian'
PACKAGES = [
    *('systemd', 'systemd-sysv', 'systemd-resolved', 'dbus', 'sudo', 'git', 'make', 'python3', 'ca-certificates'),
    *('iproute2', 'iputils-ping', 'curl', 'wireguard-tools', 'wireguard-go', 'runc', 'nftables', 'procps'),
    *('bind9-dnsutils', 'traceroute', 'zstd'),
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
# Runs "$@" in cgroups of its own, named $0, in each hierarchy; the keeper of the lab's host removes them.
IN_CGROUPS = '''
[ -e /sys/fs/cgroup/cgroup.controllers ] && tops=/sys/fs/cgroup || tops=$(echo /sys/fs/cgroup/*/)
for top in $tops; do
    mkdir -p "$top/$0"
    for each in cpuset.cpus cpuset.mems; do [ ! -e "$top/$0/$each" ] || cat "$top/$each" >"$top/$0/$each"; done
    echo 0 >"$top/$0/cgroup.procs"
done
exec "$@"
'''
SERVER_NAME = 'faas.example.com'
SERVER, LAPTOP = '203.0.113.10', '203.0.113.20'


def tree():
    """The path of the tree, which is made if need be. Raises RuntimeError when no Debian can be had."""
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
    debootstrap = ['debootstrap', '--variant=minbase', f'--include={",".join(PACKAGES)}', 'bookworm', where, MIRROR]
    done = subprocess.run(debootstrap, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode:
        raise RuntimeError('no Debian tree can be made here: ' + done.stdout.strip().splitlines()[-1])
    for name, text in FILES.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    for command in (
        'useradd --create-home --shell=/bin/bash joe',
        'systemctl --quiet enable writable-cgroups systemd-networkd',
        'systemctl --quiet mask console-getty getty@tty1 apt-daily.timer apt-daily-upgrade.timer',
    ):
        subprocess.run(['chroot', where, *command.split()], check=True)
    shutil.copy(shutil.which('coredns'), where / 'usr/local/bin/coredns')
    (where / 'etc/machine-id').write_text('')


class Machine:
    """A booted tree on the bridge lan0 of `lan`, a lab.Host; see lan(). Ends with it."""

    def __init__(self, lan, name, address, files=()):
        self.lan, self.name, self.root = lan, name, f'/run/{name}'
        lan.run(['mkdir', '-p', f'{self.root}.work/upper', f'{self.root}.work/work', self.root])
        layers = f'lowerdir={tree()},upperdir={self.root}.work/upper,workdir={self.root}.work/work'
        lan.run(['mount', '-t', 'overlay', 'overlay', '-o', layers, self.root])
        self.write('/etc/hostname', f'{name}\n')
        self.write('/etc/hosts', f'127.0.0.1 localhost\n127.0.1.1 {name}\n{SERVER} {SERVER_NAME}\n')
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
        self._log = self.lan.path(f'{self.root}.log')
        with open(self._log, 'w') as log:
            self._nspawn = self.lan.popen(
                ['sh', '-c', IN_CGROUPS, lab.cgroup(self.lan.pid, self.name),
                 'systemd-nspawn', '--quiet', '--register=no', '--keep-unit', '--boot', '--network-bridge=lan0',
                 f'--machine={self.name}', f'--directory={self.root}', '--capability=all', '--bind=/dev/net/tun',
                 '--kill-signal=SIGRTMIN+3', '--resolv-conf=off', '--timezone=off', '--console=passive',
                 '--system-call-filter=pidfd_getfd bpf'],   # its own list lacks what listeners and the guard need
                cwd='/', stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.state = lab.wait_until(self._booted, 60, f'systemd of {self.name}')

    def _booted(self):
        """systemd's own word once all jobs are done."""
        if self._nspawn.poll() is not None:
            raise AssertionError(f'{self.name} does not boot: {self._log.read_text()}')
        # Its first children are not yet what becomes PID 1.
        nspawn = self.lan.run(['pgrep', '-f', f'^systemd-nspawn .*--machine={self.name} '], ok=(0, 1)).stdout.split()
        children = nspawn and self.lan.run(['pgrep', '-P', nspawn[0], '-x', 'systemd'], ok=(0, 1)).stdout.split()
        if not children:
            return None
        self._leader = children[0]
        state = self.run(['systemctl', 'is-system-running'], ok=None).stdout.strip()
        return state if state in ('running', 'degraded') else None

    def copy(self, source, folder):
        """Put a file, or a checkout's files, into joe's home as `folder`."""
        there = f'{self.root}/home/joe/{folder}'
        if source.is_file():
            self.lan.run(['install', '-D', '-m', '755', source, there])
        else:
            left_out = [f'--exclude=./{name}' for name in ('.git', '.cache', '.venv-lint', '.ruff_cache')]
            self.lan.run(['mkdir', '-p', there])
            self.lan.run(['bash', '-c', 'tar -c --exclude=__pycache__ "${@:2}" -C "$1" . | tar -x -C "$0"',
                          there, source, *left_out])
        self.run(['chown', '-R', 'joe:joe', '/home/joe'])

    def run(self, argv, **options):
        """As Host.run, in the machine, as root."""
        enter = ['nsenter', f'--target={self._leader}', '--mount', '--net', '--uts', '--ipc', '--pid', '--cgroup',
                 'env', '-i', '-C', '/root', 'HOME=/root', 'TERM=dumb', 'LANG=C.UTF-8',
                 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin']
        return self.lan.run([*enter, *argv], cwd='/', **options)

    def sh(self, command, **options):
        """The stdout of a command line of root's."""
        return self.run(['sh', '-c', command], **options).stdout

    def type(self, command, folder='.', **options):
        """(exit code, output) of a command line that joe types on a terminal, in a folder of his home."""
        terminal = ['script', '--quiet', '--echo=never', '--return', '--command', command, '/dev/null']
        joe = ['runuser', '--user=joe', '--', 'env', f'--chdir=/home/joe/{folder}',
               'HOME=/home/joe', 'USER=joe', 'SHELL=/bin/sh', 'TERM=xterm']
        done = self.run([*joe, *terminal], ok=None, **options)
        shown = re.sub('[^\n]*\n\033\\[K', '', done.stdout)  # what was wiped; \r has become \n on its way
        return done.returncode, re.sub('\r|\033\\[[\\d;]*m', '', shown)

    def reboot(self):
        """From a new PID 1 on, in new namespaces."""
        self.run(['systemctl', 'reboot'], ok=None)
        code = self._nspawn.wait(60)
        if code != REBOOTS:
            raise AssertionError(f'{self.name} does not reboot: {code} {self._log.read_text()}')
        self.boot()


def lan():
    """A lab.Host with a bridge for machines."""
    host = lab.Host('lan')
    host.run(['ip', 'link', 'add', 'lan0', 'type', 'bridge'])
    host.run(['ip', 'link', 'set', 'lan0', 'up'])
    return host
