"""`make bench`: how fast it is, each row as a ratio against a named peer that ran in turns with it.

    python3 -m tests.bench [--json FILE] [--size full|tiny] [ROW…]

All of it happens in a host of its own with a real faasd; a row's bound is what was promised. A benchmark is no test: a
bound that is missed is said, and the exit status stays 0.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import NamedTuple

from tests import bench_builds, bench_egress, bench_volumes, images, lab, packages, serving

GATEWAY = 'fd00:faa5:0:100::1'
STATE = '/var/lib/faasd'
DISK, DISK_SIZE = '/var/tmp', 16 << 30  # what is written there needs a fifth of it
DIRECT, PROXY = 9000, 9001  # ports of the peers, on the gateway's address: on wg0 as the functions are
CONNECTIONS = 32
CACHE = packages.CACHE.parent / 'go'
PATH = f'{os.environ.get("PATH", os.defpath)}:/usr/local/go/bin'  # where the machine has a Go

SERVER = """\
package main

import (
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "Hello!\\n") })
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}
"""

NGINX = """\
worker_processes auto;
pid /tmp/nginx.pid;
error_log stderr warn;
events { worker_connections 8192; multi_accept on; }
http {
    access_log off;
    tcp_nodelay on;
    keepalive_requests 100000000;
    upstream server {
        server [%(gateway)s]:%(direct)d;
        keepalive 256;
        keepalive_requests 100000000;
    }
    server {
        listen [%(gateway)s]:%(proxy)d reuseport backlog=4096;
        location / {
            proxy_pass http://server;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering on;
        }
    }
}
"""

OPEN_TREE, MOVE_MOUNT = 428, 429
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, AT_FDCWD, MS_PRIVATE = 1, 4, -100, 1 << 18
ATTACH = f"""\
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
tree, target = int(sys.argv[1]), sys.argv[2].encode()
for done in (
    libc.syscall({MOVE_MOUNT}, tree, b'', {AT_FDCWD}, target, {MOVE_MOUNT_F_EMPTY_PATH}),
    libc.mount(None, target, None, {MS_PRIVATE}, None),
):
    if done:
        sys.exit(os.strerror(ctypes.get_errno()))
"""


# Starts a program in a cgroup of its own, as services and containers are: the scheduler gives each group its share.
GROUPED = r'''
name=$1 cores=$2; shift 2
for tree in /sys/fs/cgroup/cpu /sys/fs/cgroup/memory /sys/fs/cgroup; do
    [ -d "$tree" ] && [ -e "$tree/cgroup.procs" ] || continue
    mkdir -p "$tree/$name"
    if [ -e "$tree/$name/cpu.cfs_quota_us" ]; then echo $((cores * 100000)) >"$tree/$name/cpu.cfs_quota_us"; fi
    if [ -e "$tree/$name/cpu.max" ]; then echo "$((cores * 100000)) 100000" >"$tree/$name/cpu.max"; fi
    echo 0 >"$tree/$name/cgroup.procs"
done
exec "$@"
'''


class BenchFailed(Exception):
    """Something did not serve, so there is nothing to compare."""


class Size(NamedTuple):
    """How big each thing is: bytes and files of the image, times to deploy it, rounds of load and seconds of each."""

    bytes: int
    files: int
    deploys: int
    rounds: int
    seconds: float


SIZES = {'full': Size(500_000_000, 10_000, 5, 9, 3), 'tiny': Size(1_000_000, 60, 1, 1, 0.3)}


# What is measured


class Row(NamedTuple):
    """One comparison. `ratio` is the median of those of each round, `peer` against `ours`, and so of each in others.

    samples: {what: [of each round]}; the bound is the most or, if better is 'more', the least that was promised.
    """

    row: str
    what: str
    unit: str
    better: str
    ours: float
    peer: float
    peer_is: str
    ratio: float
    bound: float
    others: dict
    samples: dict
    parts: dict = {}

    @property
    def met(self):
        return self.ratio >= self.bound if self.better == 'more' else self.ratio <= self.bound

    def to_json(self):
        return {**self._asdict(), 'met': self.met}


def compared(row, what, samples, *, unit, better, bound, parts=None, **more):
    """A Row of the samples {name: [values]}, the first ours, the second its peer's, then the others'."""
    (_, ours), (peer_is, peer), *others = samples.items()

    def ratio(mine, its):
        return statistics.median(a / b for a, b in zip(mine, its, strict=True))

    return Row(
        row,
        what,
        unit,
        better,
        statistics.median(ours),
        statistics.median(peer),
        peer_is,
        ratio(ours, peer),
        bound,
        # How we do against a tar that syncs, and how a proxy does against the server: what is read as one is asked.
        {
            name: {
                'median': statistics.median(its),
                'ratio': ratio(its, peer) if better == 'more' else ratio(ours, its),
            }
            for name, its in others
        },
        {**samples, **more},
        parts or {},
    )


# Parts


def go_server(folder):
    """Build SERVER as a static program; its path."""
    source, program = pathlib.Path(folder, 'server.go'), pathlib.Path(folder, 'server')
    source.write_text(SERVER)
    CACHE.mkdir(parents=True, exist_ok=True)
    environ = {
        **os.environ,
        **{'CGO_ENABLED': '0', 'GOCACHE': str(CACHE), 'GOFLAGS': '', 'GO111MODULE': 'off', 'GOTOOLCHAIN': 'local'},
        'PATH': PATH,
    }
    command = ['env', 'go', 'build', '-ldflags=-s -w', '-o', str(program), str(source)]
    if not shutil.which('go', path=PATH):
        raise BenchFailed('there is no go to build the server with')
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise BenchFailed(f'the server cannot be built: {done.stderr.strip()}')
    return program


def program_layer(program):
    data = program.read_bytes()
    return images.layer(('server', data, {'mode': 0o755}), ('etc/', None), ('etc/passwd', b'root:x:0:0::/:/server\n'))


def file_sizes(dice, files, total):
    """`files` sizes with that sum, spread as in real images: most are a few kB, a few hold most of the bytes."""
    raw = [dice.lognormvariate(0, 2) for _ in range(files)]
    return [int(each * total / math.fsum(raw)) for each in raw]


def files_layer(seed, files, total):
    """A layer, as images has it, of files in folders of about twelve; every second one's content can be compressed."""

    def write(out):
        dice = random.Random(seed)
        noise = dice.randbytes(1 << 20)
        words = b' '.join(dice.choice([b'the', b'and', b'return', b'self', b'import', b'0x1f']) for _ in range(200_000))
        with tarfile.open(fileobj=out, mode='w|', format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
            made = set()
            for number, size in enumerate(file_sizes(dice, files, total)):
                folder = f'usr/lib/{seed}/{number // 144:03}/{number // 12 % 12:02}'
                for each in reversed([folder, *map(str, pathlib.PurePath(folder).parents)][:-1]):
                    if each not in made:
                        made.add(each)
                        tar.addfile(images.member(f'{each}/', None, mtime=1_700_000_000)[0])
                info, _ = images.member(f'{folder}/{number:06}', mtime=1_700_000_000 + number)
                info.size, info.mode = size, 0o755 if number % 10 == 0 else 0o644
                tar.addfile(info, images._Repeated(noise if number % 2 else words, dice.randrange(1 << 19)))

    return write


def make_image(folder, program, size):
    """image.tar in `folder`, as docker saves it, and its layers beside it: (path, [paths])."""
    path = str(pathlib.Path(folder, 'image.tar'))
    shares = (0.15, 0.35, 0.4, 0.1)  # a distribution, a language, its packages, the application
    layers = [files_layer(n, int(size.files * s), int(size.bytes * s)) for n, s in enumerate(shares)]
    images.image([*layers, program_layer(program)], {'Cmd': ['/server', '[::]:80']}, path=path)
    with tarfile.open(path) as archive:
        names = json.load(archive.extractfile('manifest.json'))[0]['Layers']
    subprocess.run(['tar', '-C', folder, '-xf', path, *names], check=True)
    return path, [str(pathlib.Path(folder, name)) for name in names]


def show(host, folder, target):
    """Let the host see this machine's `folder` at `target`, which it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    tree = libc.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(folder), OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        raise OSError(ctypes.get_errno(), f'open_tree: {os.strerror(ctypes.get_errno())}')
    try:
        process = host.popen([sys.executable, '-I', '-S', '-c', ATTACH, str(tree), target], pass_fds=[tree])
        if process.wait(30):
            raise BenchFailed(f'{folder} cannot be shown in the host at {target}')
    finally:
        os.close(tree)


class Timed(serving.Server):
    """A Server that knows when it said what."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.said = []  # (when, line)

    def _read(self, stream):
        with stream:
            for line in stream:
                self.said.append((time.monotonic(), line))
                self.lines.append(line)

    def when(self, text, since):
        """When it first said that after `since`; None if it did not."""
        return next((when for when, line in list(self.said) if when >= since and text in line), None)


@contextlib.contextmanager
def running(host):
    """A standalone faasd whose limits do not hold an instance back, where its peer has none."""
    settings = {'FAAS_CPUS': str(os.cpu_count()), 'FAAS_MEMORY': '2G', 'FAAS_PIDS': '4096', 'FAAS_STOP_TIMEOUT': '1'}
    server = Timed(host, '--standalone', **settings).start()
    try:
        yield server
    finally:
        server.stop()


def check(reply, what):
    if reply.status != 200:
        raise BenchFailed(f'{what}: {reply.status} {reply.body.decode(errors="replace")}')
    return reply


class Bench:
    """What the rows share: a folder on the disk, the program, the image, and who is told how far it is."""

    def __init__(self, size, stack, tell):
        self.size, self.tell = SIZES[size], tell
        self.folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='faasd-bench-', dir=DISK))
        self.wireguard = None
        self.program = go_server(self.folder)
        self._image = None

    def image(self):
        if self._image is None:
            self.tell(f'making an image of {self.size.bytes / 1e6:.0f} MB in {self.size.files} files')
            self._image = make_image(self.folder, self.program, self.size)
        return self._image

    @contextlib.contextmanager
    def faasd(self, on_disk=False, in_folder=False):
        """(host, server); with its state on a new filesystem on the machine's disk if that is wanted, else in memory.

        `in_folder`: in a folder of the machine's disk, without a filesystem of its own.

        New, because ext4 takes its time to make files where many were removed in the last minutes.
        """
        with contextlib.ExitStack() as stack:
            host = stack.enter_context(lab.Host('bench'))
            if on_disk:
                disk = os.path.join(self.folder, 'disk')
                stack.callback(os.unlink, disk)
                with open(disk, 'wb') as file:
                    file.truncate(DISK_SIZE)
                subprocess.run(['/usr/sbin/mkfs.ext4', '-q', disk], check=True)
                host.run(['mkdir', '/bench'])
                show(host, self.folder, '/bench')
                host.run(['mount', '-o', 'loop,noinit_itable', '/bench/disk', STATE])  # it goes with the host
            elif in_folder:
                state = stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder))
                show(host, state, STATE)
            server = stack.enter_context(running(host))
            self.wireguard = 'wireguard-go' if server.printed('(wireguard-go)') else 'in the kernel'
            yield host, server


# Rows: deploying an image


def deploy(server, name, path):
    """Deploy the archive at `path`: {phase: seconds}, 'whole' among them."""
    connection = serving.UnixConnection(str(server.host.path('/run/faasd/faasd.sock')))
    connection.timeout, connection.blocksize = 600, 256 << 10  # as the client has it
    with contextlib.closing(connection), open(path, 'rb') as file:
        began = time.monotonic()
        length = {'Content-Length': str(os.path.getsize(path))}
        connection.request('POST', f'/api/new?name={name}', file, length)
        uploaded = time.monotonic()
        reply = check(serving.Reply(connection.getresponse()), f'deploying {name}')
        answered = time.monotonic()
    if reply.json['warning']:
        raise BenchFailed(f'deploying {name}: {reply.json["warning"]}')
    serves = server.get(reply.json['ipv6'])
    if serves != 'Hello!\n':
        raise BenchFailed(f'{name} says {serves!r}')
    deployed = server.when(f'Deployed {name} at', began) or answered
    unpacked = server.when(f'Listening on [{reply.json["ipv6"]}]', began)
    ends = {'upload': uploaded, 'unpack': unpacked, 'start': deployed, 'answer': answered}
    if unpacked is None:  # there is a listener already
        ends = {'upload': uploaded, 'unpack and start': deployed, 'answer': answered}
    phases, before = {}, began
    for phase, end in ends.items():
        phases[phase], before = end - before, end
    return {**phases, 'whole': answered - began}


def untar(host, layers, synced):
    """Seconds that tar takes to unpack the layers into a fresh folder, where faasd has its own."""
    target = host.run(['mktemp', '-d', f'{STATE}/peer-XXXX']).stdout.strip()
    began = time.monotonic()
    for layer in layers:
        with open(layer, 'rb') as file:
            if host.popen(['tar', '-C', target, '-x'], stdin=file).wait(600):
                raise BenchFailed(f'tar cannot unpack {layer}')
    if synced:
        host.run(['sync', '-f', target])
    return time.monotonic() - began


def put_away(host, server):
    """Remove the function whose layers are to be stored anew, but not their files: see Bench.faasd."""
    host.sh(f'mkdir {STATE}/away && mv {STATE}/layers/* {STATE}/away')
    check(server.api('DELETE', '/api/remove/big'), 'removing it')


def deploy_round(bench, on_disk, samples, kinds):
    path, layers = bench.image()
    peers = ('tar -x', 'tar -x and sync -f')
    with bench.faasd(on_disk) as (host, server):

        def settled(kind, measure, *args):
            host.run(['sync', '-f', STATE])
            samples[kind].append(measure(*args))

        for kind, peer in zip(kinds, peers, strict=True):
            settled(peer, untar, host, layers, peer != 'tar -x')
            if kind == 'again':
                check(server.deploy('big', serving.example('hello')), 'deploying a folder')
            settled(kind, deploy, server, 'big', path)
            if kind == kinds[0]:
                put_away(host, server)


def deploy_rows(bench, suffix, on_disk):
    """A new name, whose answer waits until CoreDNS has it, and an old one, in turns with tar."""
    samples = {name: [] for name in ('new', 'again', 'tar -x', 'tar -x and sync -f')}
    for number in range(bench.size.deploys):
        bench.tell(f'deploy-500MB{suffix}: round {number + 1} of {bench.size.deploys}')
        deploy_round(bench, on_disk, samples, ('again', 'new') if number % 2 else ('new', 'again'))
    peers = {name: samples[name] for name in ('tar -x', 'tar -x and sync -f')}
    where = 'on the disk' if on_disk else 'in memory'
    for row, kind, what in (
        (f'deploy-500MB{suffix}', 'new', f'an image under a new name, {where}'),
        (f'redeploy-500MB{suffix}', 'again', f'an image under a name that is there, {where}'),
    ):
        phases = {phase: statistics.median(each[phase] for each in samples[kind]) for phase in samples[kind][0]}
        ours = {'faasd': [each['whole'] for each in samples[kind]]}
        yield compared(row, what, ours | peers, unit='s', better='less', bound=2.5, parts=phases, phases=samples[kind])


# Rows: serving requests


def grouped(host, name, command):
    """The command in a cgroup that ends with the host, with as many cores as the function may have."""
    return ['sh', '-ec', GROUPED, 'sh', lab.cgroup(host.pid, name), str(os.cpu_count()), *command]


def wrk(host, address, port, seconds, close):
    """(requests a second, requests) that an address answers. Raises BenchFailed if one of them went wrong."""
    command = ['wrk', '-t1', f'-c{CONNECTIONS}', f'-d{max(1, round(seconds))}s', '--timeout', '10s']
    command += [*(['-H', 'Connection: close'] if close else []), f'http://[{address}]:{port}/']
    said = host.run(grouped(host, 'load', command)).stdout
    count, took = re.search(r'(\d+) requests in ([\d.]+)s', said).groups()
    if 'Socket errors' in said or 'Non-2xx' in said or not int(count):
        raise BenchFailed(f'port {port} did not answer every request:\n{said}')
    return float(re.search(r'Requests/sec:\s+([\d.]+)', said)[1]), int(count)


@contextlib.contextmanager
def peers(bench, host):
    """The same program as a plain process of the host, and nginx as a proxy before it."""
    for program in ('wrk', 'nginx'):
        if host.run(['sh', '-c', f'command -v {program}'], ok=None).returncode:
            packages.put(host, program)
    host.path('/tmp/nginx.conf').write_text(NGINX % {'gateway': GATEWAY, 'direct': DIRECT, 'proxy': PROXY})
    shutil.copy(bench.program, host.path('/tmp/server'))
    direct = grouped(host, 'direct', ['/tmp/server', f'[{GATEWAY}]:{DIRECT}'])
    nginx = grouped(host, 'nginx', ['nginx', '-c', '/tmp/nginx.conf', '-g', 'daemon off;'])
    with contextlib.ExitStack() as stack:
        for name, command, port in (('the server', direct, DIRECT), ('nginx', nginx, PROXY)):
            process = stack.enter_context(host.popen(command))
            stack.callback(process.terminate)
            lab.wait_until(lambda port=port: asked(host, port) or process.poll() is not None, 10, name)  # noqa: B023
            if process.poll() is not None:
                raise BenchFailed(f'{name} ended with {process.returncode}')
        yield


def asked(host, port):
    return host.run(['curl', '-sfg', f'http://[{GATEWAY}]:{port}/'], ok=None).stdout == 'Hello!\n'


def serve_rows(bench, wanted):
    with bench.faasd() as (host, server):
        for key, value in (('ip_local_port_range', '10000 65535'), ('tcp_tw_reuse', '1')):  # or new connections run out
            host.path(f'/proc/sys/net/ipv4/{key}').write_text(value)
        archive = images.image([program_layer(bench.program)], {'Cmd': ['/server', '[::]:80']})
        reply = check(server.deploy('bench', archive), 'deploying the server').json
        if reply['warning']:
            raise BenchFailed(f'deploying the server: {reply["warning"]}')
        targets = {'injected': (reply['ipv6'], 80), 'direct': (GATEWAY, DIRECT), 'nginx': (GATEWAY, PROXY)}
        with peers(bench, host):
            for row, close, bound in (('go-keepalive', False, 0.97), ('go-new-connections', True, 0.95)):
                if row in wanted:
                    yield serve_row(bench, host, row, close, bound, targets)


def serve_row(bench, host, row, close, bound, targets):
    samples, requests = {name: [] for name in targets}, dict.fromkeys(targets, 0)
    for address, port in targets.values():
        wrk(host, address, port, 1, close)
    for number in range(bench.size.rounds):
        bench.tell(f'{row}: round {number + 1} of {bench.size.rounds}')
        for name, (address, port) in targets.items():
            rate, count = wrk(host, address, port, bench.size.seconds, close)
            samples[name].append(rate)
            requests[name] += count
    what = f'{CONNECTIONS} connections, {"a new one for each request" if close else "kept alive"}'
    return compared(row, what, samples, unit='requests/s', better='more', bound=bound, requests=requests)


# The table

ROWS = {  # the row that is asked for: what else comes with it
    'deploy-500MB': 'redeploy-500MB',
    'deploy-500MB-memory': 'redeploy-500MB-memory',
    'go-keepalive': None,
    'go-new-connections': None,
    bench_builds.ROW: None,
    **dict.fromkeys(bench_egress.BOUNDS),
    **dict.fromkeys(bench_volumes.BOUNDS),
}


def measure(bench, wanted):
    """A Row after the other."""
    for suffix, on_disk in (('', True), ('-memory', False)):
        if f'deploy-500MB{suffix}' in wanted:
            yield from deploy_rows(bench, suffix, on_disk)
    if not wanted.isdisjoint(('go-keepalive', 'go-new-connections')):
        yield from serve_rows(bench, wanted)
    yield from bench_builds.rows(bench, wanted, check, compared)
    if not wanted.isdisjoint(bench_volumes.BOUNDS):
        yield from bench_volumes.rows(bench, wanted, check, compared)
    if not wanted.isdisjoint(bench_egress.BOUNDS):
        yield from bench_egress.rows(bench, wanted, check, compared, grouped)


def machine(bench, load):
    with open('/proc/cpuinfo') as file:
        model = re.search(r'model name\s*: (.*)', file.read())
    return {
        'cores': os.cpu_count(),
        'processor': model[1] if model else platform.machine(),
        'kernel': platform.release(),
        'wireguard': bench.wireguard,
        'python': platform.python_version(),
        'load_before': round(load, 2),  # what else ran: /proc/loadavg, one minute
    }


def in_unit(value, unit):
    if unit == 'requests/s':
        return f'{value:,.0f}/s'
    return f'{value:.2f} s' if unit == 's' else f'{value:,.1f} {unit}'


def table(rows):
    """Lines of a plain table."""
    cells = [('row', 'ours', 'peer', 'ratio', 'bound', '', 'beside it')]
    for row in rows:
        cells.append(
            (
                row.row,
                in_unit(row.ours, row.unit),
                f'{row.peer_is} {in_unit(row.peer, row.unit)}',
                f'{row.ratio:.3f}',
                f'{"≥" if row.better == "more" else "≤"} {row.bound:g}',
                'met' if row.met else 'missed',
                ', '.join(
                    f'{name} {in_unit(its["median"], row.unit)} ({its["ratio"]:.3f})'
                    for name, its in row.others.items()
                ),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for row in rows:
        parts = ', '.join(f'{name} {in_unit(part, row.unit)}' for name, part in row.parts.items())
        yield f'{row.row}: {row.what}{f": {parts}" if parts else ""}'


def write_json(path, value):
    """Replace the file whole, or leave it."""
    with tempfile.NamedTemporaryFile('w', dir=os.path.dirname(path) or '.', delete=False) as file:
        try:
            json.dump(value, file, indent=1)
            file.write('\n')
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def main(argv):
    parser = argparse.ArgumentParser(prog='python3 -m tests.bench', description=__doc__.splitlines()[0])
    parser.add_argument('rows', nargs='*', metavar='ROW', choices=[[], *ROWS], help=f'of {", ".join(ROWS)}; else all')
    parser.add_argument('--json', metavar='FILE', help='write it there as JSON, too, with every sample')
    parser.add_argument('--size', choices=SIZES, default='full', help='tiny: only to see that it works')
    arguments = parser.parse_args(argv)
    wanted, load, rows = set(arguments.rows) or set(ROWS), os.getloadavg()[0], []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # what is in files and hosts goes by that
    try:
        with contextlib.ExitStack() as stack:
            bench = Bench(arguments.size, stack, lambda text: print(f'  {text}', file=sys.stderr, flush=True))
            for row in measure(bench, wanted):
                rows.append(row)
            about = machine(bench, load)
    except KeyboardInterrupt:
        return 130
    except (BenchFailed, RuntimeError, TimeoutError, AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f'bench: {error}', file=sys.stderr)
        return 1
    print(*table(rows), sep='\n')
    print(', '.join(f'{key.replace("_", " ")} {value}' for key, value in about.items()))
    if arguments.json:
        write_json(arguments.json, {'machine': about, 'size': arguments.size, 'rows': [row.to_json() for row in rows]})
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
