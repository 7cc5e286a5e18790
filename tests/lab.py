"""Whole hosts on one machine, each with its own network, files, processes and name. See Host and pair().

A host's files are an overlay over this machine's; what it writes stays in memory and goes with it. Its PID 1
is a `cat` that reads from a keeper, and the keeper reads from us: however we end, the host ends with us.
"""
import contextlib
import ctypes
import glob
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import unittest

REPO = pathlib.Path(__file__).resolve().parent.parent
NAMESERVER = '192.0.2.53'                           # nobody answers there: TEST-NET-1, RFC 5737
SERVER = ('203.0.113.10/24', '2001:db8::10/64')
LAPTOP = ('203.0.113.20/24', '2001:db8::20/64')
CLONE_NEWPID = 0x20000000
CLOSE_TIMEOUT_S = 30
YOUNG_S = 0.5                                       # a process has joined an older cgroup, or never will

# PID 1 of a host. $1 its name, $2 a folder to build on, then the folders that an overlay of / does not show.
# /sys is not mounted afresh: that would hide the cgroups, and runc needs them. An ignored SIGCHLD survives
# exec, so orphans are reaped.
BOOT = r'''
set -eu
name=$1 work=$2; shift 2
read -r pid rest </proc/self/stat                   # still the machine's /proc, so the machine's number
mount --make-rprivate /
mount -t tmpfs -o mode=755 lab "$work"
new=$work/root; mkdir "$new"
layer=0
cover() {                                           # show the folder $1 at $new$1
    layer=$((layer + 1)); upper=$work/$layer/upper
    mkdir -p "$new$1" "$upper" "$work/$layer/work"
    chmod --reference="$1" "$upper"; chown --reference="$1" "$upper"
    options=lowerdir=$1,upperdir=$upper,workdir=$work/$layer/work
    mount -t overlay -o "$options" overlay "$new$1" 2>"$work/why"
}
cover / || { cat "$work/why" >&2; exit 1; }
mount -t proc proc "$new/proc"
for folder in /sys /dev; do mount --rbind "$folder" "$new$folder"; done
mount -t tmpfs -o mode=755 run "$new/run"
mount -t tmpfs -o mode=1777 tmp "$new/tmp"
mkdir -m 1777 "$new/run/lock"
for folder; do
    cover "$folder" || { mount --bind "$folder" "$new$folder"; mount -o remount,bind,ro "$new$folder"; }
done
cd "$new"
rm -rf etc/resolv.conf etc/hosts etc/wireguard etc/coredns etc/faasd var/lib/faasd \
    root/.config/faas home/*/.config/faas
mkdir -m 700 etc/wireguard
mkdir "$work/state" var/lib/faasd                  # of the tmpfs itself: an overlay cannot map ids
mount --bind "$work/state" var/lib/faasd
echo "nameserver $NAMESERVER" >etc/resolv.conf
printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n' "$name" >etc/hosts
echo "$name" >etc/hostname
pivot_root . .
umount -l .
echo "$name" >/proc/sys/kernel/hostname
ip link set lo up
echo "$pid"
exec env --ignore-signal=CHLD cat >/dev/null 2>&1   # `trap '' CHLD` is nothing to dash
'''


class Host:
    """A machine of its own: network, mounts, processes, hostname. Needs root. A context manager.

    Commands run as root with HOME=/root, without the caller's proxies and FAAS_*, XDG_*, SUDO_* settings.
    Raises RuntimeError when this machine cannot make one.
    """

    def __init__(self, name):
        self.name = name
        self._started, self._links = [], itertools.count()
        self._keeper = subprocess.Popen([sys.executable, '-I', '-S', __file__, 'keep', name, *layout()],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, start_new_session=True)
        answer = self._keeper.stdout.readline()
        if not answer:
            why = self._keeper.communicate()[1].strip()
            raise RuntimeError(f'no host could be made here: {why}')
        self.pid = int(answer)
        self._pid_namespace = os.open(f'/proc/{self.pid}/ns/pid', os.O_RDONLY | os.O_CLOEXEC)

    def __repr__(self):
        return f'<Host {self.name}>'

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def popen(self, argv, *, env=None, cwd=REPO, **options):
        """Start argv in the host; options as for subprocess.Popen, env is added to the host's.

        It is a child of this process and the pid is argv's own: signals reach it.
        """
        if self._pid_namespace is None:
            raise RuntimeError(f'{self.name} is closed')
        enter = ['nsenter', f'--target={self.pid}', '--mount', '--net', '--uts', '--ipc',
                 'env', '-C', str(cwd)]
        # Entering a pid namespace counts for children only, and for the calling thread alone. `nsenter --pid`
        # would stay as a parent in between and keep the signals to itself.
        setns(self._pid_namespace)
        try:
            process = subprocess.Popen([*enter, *map(str, argv)], env=environment(env), **options)
        finally:
            with open('/proc/self/ns/pid') as own:
                setns(own.fileno())
        self._started = [each for each in self._started if each.poll() is None] + [process]
        return process

    def run(self, argv, *, input=None, ok=(0,), timeout_s=60, env=None, cwd=REPO):
        """Run argv in the host to its end: CompletedProcess with text.

        Raises AssertionError when the exit code is not in ok (None: any will do), TimeoutExpired.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        with self.popen(argv, env=env, cwd=cwd, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        text=True, errors='replace') as process:
            try:
                out, err = process.communicate(input, timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        if ok is not None and process.returncode not in ok:
            command = ' '.join(map(str, argv))
            raise AssertionError(f'{self.name}: {command}: exit code {process.returncode}\n{out}{err}')
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def sh(self, command, **options):
        """The stdout of a command line."""
        return self.run(['sh', '-c', command], **options).stdout

    def path(self, name):
        """The host's file `name`, as a path from outside. Absolute symlinks lead out of the host."""
        return pathlib.Path(f'/proc/{self.pid}/root', str(name).lstrip('/'))

    def close(self):
        """End every process of the host; its mounts, networks and cgroups go too. May be called again."""
        if self._pid_namespace is None:
            return
        os.close(self._pid_namespace)
        self._pid_namespace = None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        # PID 1 is not gone before the last of them is reaped, and those that we started are ours to reap.
        everybody = [*self._started, self._keeper]
        wait_until(lambda: not any(each.poll() is None for each in everybody),
                   CLOSE_TIMEOUT_S, f'the end of {self.name}')
        self._keeper.stdout.close()
        self._keeper.stderr.close()


@contextlib.contextmanager
def pair():
    """(server, laptop) on one LAN, with the addresses SERVER and LAPTOP."""
    with Host('server') as server, Host('laptop') as laptop:
        join(server, laptop, SERVER, LAPTOP)
        yield server, laptop


def join(a, b, a_addresses, b_addresses):
    """Lay a cable between two hosts: the next free ethN in each, up, with these addresses."""
    ends = (a, f'eth{next(a._links)}', a_addresses), (b, f'eth{next(b._links)}', b_addresses)
    # Made in a's network straight away; entering only that, since b's pid is this machine's number.
    subprocess.run(['nsenter', f'--net=/proc/{a.pid}/ns/net', 'ip', 'link', 'add', ends[0][1], 'type', 'veth',
                    'peer', 'name', ends[1][1], 'netns', str(b.pid)], check=True)
    for host, link, addresses in ends:
        batch = [f'address add {address} dev {link} {"nodad" if ":" in address else ""}'
                 for address in addresses]
        host.run(['ip', '-batch', '-'], input='\n'.join([*batch, f'link set {link} up', '']))


def add_wireguard(host, interface):
    """Make a WireGuard interface: the kernel's, else wireguard-go's. True if it is the kernel's."""
    if host.run(['ip', 'link', 'add', interface, 'type', 'wireguard'], ok=None).returncode == 0:
        return True
    host.run(['wireguard-go', interface])
    return False


def wait_until(condition, timeout_s, what):
    """Poll until condition() is true; returns its value. Raises TimeoutError that names `what`."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f'waited {timeout_s} s in vain for {what}')
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.1)
    return value


def not_in_check(tests):
    """Mark tests that need an installed program or take seconds: `make check` leaves them out."""
    tests.in_check = False
    return tests


def needs_root(tests):
    """Mark tests that need root for hosts of their own. `make check` leaves them out; run alone they are skipped."""
    as_root = unittest.skipUnless(os.geteuid() == 0, 'needs root for hosts of its own (make test runs it so)')
    return not_in_check(as_root(tests))


def environment(more=None):
    """What a command of a host sees: ours, less what leads out of the host or to its caller's settings."""
    mine = re.compile(r'(FAAS|XDG|SUDO|WG|LISTEN|NOTIFY)_.*|.*_proxy|MAKE.*|MFLAGS', re.IGNORECASE)
    kept = {key: value for key, value in os.environ.items() if not mine.fullmatch(key)}
    path = ':'.join(filter(None, (kept.get('PATH'), '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin')))
    return {**kept, 'HOME': '/root', 'USER': 'root', 'LOGNAME': 'root', 'PATH': path, **(more or {})}


def setns(namespace):
    """Put the calling thread's next children into a pid namespace. Borrows the FD `namespace`."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), 'setns: ' + os.strerror(ctypes.get_errno()))


def layout():
    """[a folder to build on, *folders that hosts need and an overlay of / does not show]."""
    with open('/proc/self/mountinfo') as file:
        points = {line.split()[4] for line in file}         # spaces and such in octal, proc(5)
    mounts = {re.sub(r'\\[0-7]{3}', lambda octal: chr(int(octal[0][1:], 8)), point) for point in points}
    wanted = [REPO, os.path.expanduser('~'), sys.prefix, sys.base_prefix,
              os.path.dirname(os.path.realpath(sys.executable)), *os.environ.get('PATH', '').split(':'),
              '/usr/local', '/etc', '/var/lib', '/opt', '/root', '/home']
    wanted = {os.path.realpath(folder) for folder in wanted if folder and os.path.isdir(folder)}
    shown = set()
    for folder in wanted:
        if folder.startswith(('/tmp/', '/run/')):
            shown.add(folder)
        elif not folder.startswith(('/proc/', '/sys/', '/dev/')):
            shown |= {str(each) for each in pathlib.Path(folder, '.', 'x').parents} & mounts - {'/'}
    work = next(folder for folder in ('/mnt', '/media', '/srv', '/boot', '/opt')
                if os.path.isdir(folder) and not any(each.startswith(folder) for each in shown))
    return [work, *sorted(shown)]


def keep(name, *folders):
    """The keeper's life: boot the host, print its PID 1, at the end of stdin end it and remove its cgroups.

    It is outside the host and of a session of its own, so it outlives whoever asked for the host.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    others = faas_cgroups()
    boot = subprocess.Popen(['unshare', '--net', '--mount', '--uts', '--ipc', '--pid', '--fork',
                             '--kill-child', 'sh', '-c', 'eval "$BOOT"', 'host', name, *folders], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env={**os.environ, 'BOOT': BOOT, 'NAMESERVER': NAMESERVER})
    pid = boot.stdout.readline().strip()
    if not pid:
        sys.exit(boot.wait() or 1)
    run = os.open(f'/proc/{pid}/root/run', os.O_PATH)       # readable when the host is gone: runc's records
    print(pid, flush=True)
    sys.stdin.read()
    boot.stdin.close()
    boot.wait()                                     # the kernel kills all others before PID 1 is gone
    remove_cgroups(f'/proc/self/fd/{run}', others)
    for tree in glob.glob(f'/sys/fs/cgroup/{cgroup(pid)}*') + glob.glob(f'/sys/fs/cgroup/*/{cgroup(pid)}*'):
        remove_tree(tree)


def cgroup(pid, name=''):
    """What a cgroup is named that ends with the host whose PID 1 is `pid`."""
    return f'lab-{pid}-{name}'


def faas_cgroups():
    """The topmost cgroups named faas*, in every hierarchy of a version 1, 2 or mixed tree."""
    return {*glob.glob('/sys/fs/cgroup/faas*/'), *glob.glob('/sys/fs/cgroup/*/faas*/')}


def remove_cgroups(run, others):
    """Remove the cgroups that runc's state files below the folder `run` name, and what they left empty.

    `others` were there before. What other hosts made since is in use, or empty and their runc makes it again; but for
    that of listeners, which is empty until a process joins it.
    """
    cgroups = set()
    for folder, _, _ in os.walk(f'{run}/'):        # not glob's **: that follows links, out into this machine
        with contextlib.suppress(OSError, ValueError, AttributeError), open(f'{folder}/state.json') as file:
            cgroups.update(json.load(file).get('cgroup_paths', {}).values())
    for each in cgroups:
        remove_tree(each)
    for each in faas_cgroups() - others:
        with contextlib.suppress(OSError):
            if 'listeners' in each:
                time.sleep(max(0, YOUNG_S - (time.time() - os.stat(each).st_mtime)))
            os.rmdir(each)


def remove_tree(cgroup):
    for _ in range(50):                             # a killed process leaves its cgroup a moment late
        try:
            for folder, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(folder)
            break
        except OSError:
            time.sleep(0.02)


if __name__ == '__main__':
    keep(*sys.argv[2:])
