"""Throws wrong input at everything that reads what others send, for a time: `python3 -m tests.fuzz [SECONDS] [SEED]`.

Every target makes valid inputs by a grammar, and changes them. No input may make a traceback, an HTTP status of 500, a
wait of more than five seconds, or a change that a valid request would not make. The seed is printed: the same seed
makes the same inputs for each target. What it has found becomes a test beside the module.
"""

import array
import base64
import contextlib
import hashlib
import hmac
import io
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from unittest import mock

import dns_manager
import registry
import vpn_manager
from control import settings
from handlers.containers import protocol
from handlers.images import folder, spec
from handlers.images.archive import ImageError
from host.errors import FaasError
from tests import images, inside, lab, serving, staged
from tests.test_faas import CONFIG, faas, token

ANSWER_MAX_S = 5
TEXTS = [
    '',
    'a',
    'laptop',
    'x' * 63,
    'x' * 64,
    '../../etc/passwd',
    'a\nb',
    'ä',
    '\ud800',
    '\0',
    '-x',
    '%00',
    "'; --",
    '[',
    '{}',
]
NUMBERS = [0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1e308, float('inf'), float('nan'), 0.5, True]


class Found(Exception):
    """An input that must not do what it did."""


class Maker(random.Random):
    """Makes inputs, and changes them."""

    def value(self, depth=2):
        """Any JSON value."""
        kind = self.randrange(6 if depth else 4)
        if kind < 4:
            return self.choice(
                [None, self.choice(TEXTS), self.choice(NUMBERS), self.choice(['/', 'fd00:faa5::1', '80'])]
            )
        if kind == 4:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        return {self.choice(TEXTS): self.value(depth - 1) for _ in range(self.randrange(4))}

    def fields(self, valid):
        """The dict, with some of its fields changed, gone or added."""
        made = dict(valid)
        for key in list(made):
            if self.random() < 0.3:
                made[key] = self.value()
            elif self.random() < 0.1:
                del made[key]
        if self.random() < 0.1:
            made[self.choice(TEXTS)] = self.value()
        return made

    def bytes(self, valid):
        """The bytes, with some changed, doubled, moved, gone or added; or as they are."""
        made = bytearray(valid)
        for _ in range(self.choice([0, 1, 1, 2, 5])):
            at, size = self.randrange(len(made) + 1), self.choice([1, 1, 2, 8, 64, 600])
            match self.randrange(6):
                case 0 if made:
                    made[at % len(made)] ^= 1 << self.randrange(8)
                case 1:
                    del made[at : at + size]
                case 2:
                    made[at:at] = self.randbytes(size)
                case 3:
                    made[at:at] = made[at : at + size]
                case 4:
                    made[at:at] = self.choice([b'\n', b'\r\n', b'\0', b'"', b'9' * 30, b'\xff', b'[' * 2000, b'='])
                case 5:
                    del made[at:]
        return bytes(made)

    def text(self, valid):
        return self.bytes(valid.encode(errors='surrogatepass')).decode(errors='replace')


# Targets: generators. Each step is one input; it raises Found, or what it should not.


def files(make):
    """What people write into files that faasd reads: settings, peers, zone, faas.toml, Procfile, spec.json."""
    toml = 'command = ["node", "server.js"]\nport = 80\nstart_timeout = 3\nconcurrency = 5\n[env]\nA = "b"\n'
    peer = f'[Peer]\nPublicKey = {CONFIG["public_key"]}\nAllowedIPs = fd00:faa5:0:100::a/128\n'
    valid_spec = json.loads(spec.Spec('image', ('/x',), {'A': 'b'}, layers=('a' * 64,), ports=(80,)).to_json())
    serials = iter(range(1, 1 << 62))
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        paths = f'{place}/zone/faas.db', f'{place}/Corefile'
        dns = dns_manager.DNSZoneManager(lambda seen: next(serials), lambda *_, **__: None, '::1', '::2', *paths)
        dns.project({'a': 'fd00:faa5:1::a'})
        zone = open(paths[0]).read()
        while True:
            with contextlib.suppress(ImageError):
                write('faas.toml', make.bytes(toml.encode()))
                folder.faas_toml()
            with contextlib.suppress(ImageError):
                write('Procfile', make.bytes(b'web: python3 server.py --port $PORT\nworker: x\n'))
                folder.procfile()
            with contextlib.suppress(ValueError):
                spec.Spec.from_json(make.text(json.dumps(make.fields(valid_spec))))
            with contextlib.suppress(vpn_manager.VPNError):
                vpn_manager.parse_peer(make.text(peer))
            with contextlib.suppress(vpn_manager.VPNError):
                vpn_manager.split_endpoint(make.text('[fd00::1]:51820'), 1)
            with contextlib.suppress(settings.BadSettings):
                lines = b'FAAS_MEMORY=1G\n# x\nFAAS_ENROLL_BIND=[::]:5\nFAAS_CPUS=0.5\nFAAS_MOUNTS=/srv/a:rw /mnt/b\n'
                write('env', make.bytes(lines))
                settings.read_settings({}, 'env')
            write('resolv.conf', make.bytes(b'nameserver 192.0.2.1\noptions edns0\nnameserver fe80::1%eth0\n'))
            with mock.patch.object(dns_manager, 'query', side_effect=TimeoutError):
                dns_manager.default_forwarders('resolv.conf')
            write(paths[0], make.bytes(zone.encode()))
            wanted = {make.choice('ab'): 'fd00:faa5:1::a'}
            dns.project(wanted)
            if not dns.is_current(wanted):
                raise Found('the zone file does not hold what it should')
            yield


def write(path, data):
    with open(path, 'wb') as file:
        file.write(data)


def wire(make):
    """The channel between faasd and the runtime, each side against the other."""
    before = len(os.listdir('/proc/self/fd'))
    while True:
        ours, theirs = protocol.pair()
        with ours, theirs:
            theirs.setblocking(False)
            for sender, receive in ((theirs, protocol.hear), (ours, protocol.receive)):
                receiver = ours if sender is theirs else theirs
                fds = array.array('i', [0] * make.choice([0, 0, 1, 2, 30]))
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
                valid = make.choice([b'H\1', b'Rhandle', b'Fno', b'D' + bytes(8), b'C' + bytes(8), b'S' + bytes(8)])
                sender.sendmsg([make.bytes(valid)[:9000]], ancillary)
                with contextlib.suppress(protocol.ProtocolError):
                    got = receive(receiver)
                    message, fd = got if isinstance(got, tuple) else (got, None)
                    if fd is not None:
                        os.close(fd)
                    protocol.number_of(message)
        if len(os.listdir('/proc/self/fd')) != before:
            raise Found('a descriptor was left open')
        yield


def client(make):
    """The client: its saved configs, invites, and what a server answers."""
    answers = {
        'list': [
            {'name': 'a', 'ipv6': 'fd00:faa5:1:0::a', 'status': 'idle', 'reason': None, 'revision': 1, 'created': 'x'}
        ],
        'vpn list --peers': [
            {'name': 'a', 'ipv6': 'fd00:faa5:0:100::a', 'role': 'peer', 'endpoint': None, 'handshake': 0}
        ],
        'ip a': {'ipv6': 'fd00:faa5:1:0::a'},
        'logs a': 'line',
        'vpn invite': {'token': token(), 'name': None, 'expires': '2026-01-01T00:00:00Z', 'api': 'x:1'},
    }
    with tempfile.TemporaryDirectory() as home, Answering(f'{home}/sock') as server:
        environ = {'HOME': home, 'PATH': os.environ['PATH'], 'FAAS_SOCKET': f'{home}/sock', 'NO_COLOR': '1'}
        saved = f'{home}/.config/faas/vpn/default.json'
        os.makedirs(os.path.dirname(saved), 0o700)
        changed = mock.patch.dict(os.environ, environ, clear=True), mock.patch.object(faas, 'RUN_FOLDER', f'{home}/run')
        with changed[0], changed[1]:
            while True:
                write(saved, make.bytes(json.dumps(make.fields({**CONFIG, 'version': 1})).encode()))
                os.chmod(saved, 0o600)
                run_client('vpn', 'list')
                command, valid = make.choice(list(answers.items()))
                body = json.dumps(make.fields(valid) if isinstance(valid, dict) else make.choice([valid, make.value()]))
                if isinstance(valid, list) and make.random() < 0.8:
                    body = json.dumps([make.fields(valid[0])])
                head = f'HTTP/1.1 {make.choice([200, 200, 200, 403, 500, 99])} x\r\nContent-Length: {len(body)}\r\n\r\n'
                server.answer = make.bytes((head + body).encode()) if make.random() < 0.5 else (head + body).encode()
                run_client(*command.split())
                try:
                    faas.Invite(make.text(token(**make.fields({'e': 'a:1', 'n': 'x'}))))
                except (faas.Failure, SystemExit):
                    pass
                yield


def run_client(*words):
    out, err = io.TextIOWrapper(io.BytesIO(), 'utf-8'), io.TextIOWrapper(io.BytesIO(), 'utf-8')
    started = time.monotonic()
    with mock.patch.multiple(sys, stdout=out, stderr=err, stdin=io.TextIOWrapper(io.BytesIO())):
        faas.main(list(words))
        out.flush(), err.flush()
    if time.monotonic() - started > ANSWER_MAX_S:
        raise Found(f'{words} took {time.monotonic() - started:.0f} s')
    if b'Traceback' in err.buffer.getvalue():
        raise Found(err.buffer.getvalue().decode())


class Answering:
    """A server on a unix socket that says `answer` to everybody, and ends."""

    def __init__(self, path):
        self.answer, self._listener = b'', socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(1)
                    connection.recv(65536)
                    connection.sendall(self.answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Staging(staged.Staged):
    """Takes archives as a deploy does."""

    def runTest(self):
        """unittest wants one."""

    def begin(self):
        self.stack = contextlib.ExitStack()
        self.disk()
        return self.stack

    def take(self, data):
        started = time.monotonic()
        with contextlib.suppress(FaasError), self.staging() as staging:
            staging.receive(io.BytesIO(data).read, len(data))
        if time.monotonic() - started > ANSWER_MAX_S:
            raise Found(f'an archive of {len(data)} bytes took {time.monotonic() - started:.1f} s')
        if left := os.listdir(self.functions):
            raise Found(f'an archive that was not kept has left {left}')


def archives(make):
    """Uploads: folders and images."""
    base = images.layer(
        ('bin/', None), ('bin/x', b'#!/bin/sh\n', {'mode': 0o755}), ('bin/y', 'x'), ('z', images.Hard('bin/x'))
    )
    config = {'Cmd': ['/bin/x'], 'Env': ['A=b'], 'ExposedPorts': {'80/tcp': {}}, 'User': '1', 'WorkingDir': '/'}
    folders = serving.archive(
        {'handler.py': 'def handle(connection, address):\n    pass\n', 'faas.toml': 'port = 80\n'}
    )
    take = Staging()
    with take.begin():
        while True:
            match make.randrange(4):
                case 0:
                    take.take(make.bytes(folders))
                case 1:
                    form, pack = make.choice([('docker', None), ('oci', None), ('oci', 'gzip')])
                    take.take(make.bytes(images.image([base], make.fields(config), form=form, pack=pack)))
                case 2:
                    take.take(images.image([make.bytes(base)], config, form=make.choice(['docker', 'oci'])))
                case 3:
                    take.take(images.image([base], make.fields({**config, 'Cmd': make.value(), 'Env': make.value()})))
            yield


class Api:
    """A real faasd, asked as everybody who may ask."""

    PEER = 'fd00:faa5:0:100::a'

    def __init__(self, server, sockets):
        self.server, self.sockets = server, sockets
        key = CONFIG['public_key']
        self.expect(server.api('POST', '/api/vpn/create', {'name': 'peer', 'public_key': key}), 200)
        self.expect(server.deploy('kept', serving.saying('kept')), 200)
        self.invite = server.api('POST', '/api/vpn/invite', {}).json['token']
        self.before = self.state()

    @staticmethod
    def expect(reply, status):
        if reply.status != status:
            raise Found(f'HTTP {reply.status}: {reply.body!r}')

    def state(self):
        functions = [(each['name'], each['ipv6']) for each in self.server.api('GET', '/api/list').json]
        return functions, [(each['name'], each['ipv6']) for each in self.server.api('GET', '/api/vpn/list').json]

    def check(self, changed):
        if not changed and self.state() != self.before:
            raise Found(f'requests that were refused have changed {self.before} to {self.state()}')
        self.before = self.state()
        if any('Traceback' in line or 'a fault of faasd' in line for line in self.server.lines):
            raise Found(''.join(self.server.lines[-40:]))

    def request(self, make):
        """The bytes of a request, most often with something wrong in it."""
        names = ['kept', 'peer', 'a', 'A', 'x' * 64, '..', '%2e%2e%2f', 'ns', 'a b', 'ä', '']
        method = make.choice(['GET', 'POST', 'DELETE', 'PUT', 'HEAD', 'OPTIONS', 'BREW', ''])
        path = make.choice([
            '/api/list', '/api/health?pad=' + 'x' * make.choice([0, 2000, 70000]), f'/api/ip/{make.choice(names)}',
            f'/api/logs/{make.choice(names)}?lines={make.choice(["1", "-1", "9" * 9, "²"])}',
            f'/api/remove/{make.choice(names[2:])}', f'/api/vpn/remove/{make.choice(names[2:])}',
            '/api/vpn/create', '/api/vpn/invite', '/api/vpn/list', '/', '*',
            f'/api/new?name={make.choice(names)}&from=x', '/api/secret', f'/api/secret/{make.choice(names)}',
            f'/api/config/{make.choice(names)}', f'/api/describe/{make.choice(names)}',
        ])  # fmt: skip
        body = json.dumps(make.fields(make.choice([
            {'name': make.choice(TEXTS), 'public_key': make.choice([CONFIG['public_key'], 'x'])},
            {'name': None, 'expires': 3600, 'admin': False},
        ]))).encode()  # fmt: skip
        if path.startswith('/api/new'):
            body = make.bytes(serving.archive({'faas.toml': 'x', 'other.py': 'x'}))
        headers = {'Host': 'ns.faas', 'Content-Length': str(len(body))}
        if make.random() < 0.2:
            headers = make.fields(headers | {'Transfer-Encoding': 'chunked', 'Expect': '100-continue', 'Origin': 'x'})
        if make.random() < 0.3:
            headers |= self.proof(make, body)
        lines = ''.join(f'{key}: {value}\r\n' for key, value in headers.items())
        sent = f'{method} {path} HTTP/1.1\r\n{lines}\r\n'.encode(errors='replace') + body
        return make.bytes(sent) if make.random() < 0.5 else sent

    def proof(self, make, body):
        """The headers of somebody who redeems the invite, mostly wrong ones."""
        fields = json.loads(base64.urlsafe_b64decode(self.invite[6:].partition('.')[0] + '=='))
        secret, nonce = base64.urlsafe_b64decode(fields['s'] + '=='), 'n' * 16
        text = f'faas1 request\n{fields["i"]}\n{nonce}\n{hashlib.sha256(body).hexdigest()}\n'
        right = {
            'Faas-Invite': fields['i'], 'Faas-Nonce': nonce,
            'Faas-Proof': hmac.new(secret + b'?', text.encode(), 'sha256').hexdigest(),
        }  # fmt: skip
        return make.fields(right)

    def ask(self, make):
        """Send one request; True if an answer says that something was done."""
        sent = self.request(make)
        with self.sockets.connect(make.choice(['local', 'peer', 'newcomer'])) as connection:
            connection.settimeout(ANSWER_MAX_S)
            answered = b''
            try:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    answered += data
            except TimeoutError:
                raise Found(f'no answer in {ANSWER_MAX_S} s to {sent[:2000]!r}') from None
            except ConnectionError:
                pass
        statuses = re.findall(rb'^HTTP/1\.1 (\d+)', answered, re.MULTILINE)
        if b'500' in statuses:
            raise Found(f'HTTP 500 to {sent[:2000]!r}: {answered[:500]!r}')
        return any(status.startswith(b'2') for status in statuses) and not sent.startswith((b'GET', b'HEAD'))


class Sockets:
    """Connects from within a host: a thread lives in its network namespace."""

    def __init__(self, host):
        self._host, self._ready = host, threading.Event()
        self._wanted, self._made = [], []
        self._asked, self._answered = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        inside.enter(f'/proc/{self._host.pid}/ns/net', inside.CLONE_NEWNET)
        while True:
            self._asked.acquire()
            self._made.append(socket.socket(socket.AF_INET6))
            self._answered.release()

    def connect(self, who):
        if who == 'local':
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(self._host.path('/run/faasd/faasd.sock')))
            return sock
        self._asked.release()
        self._answered.acquire()
        sock = self._made.pop()
        sock.settimeout(ANSWER_MAX_S)
        if who == 'peer':
            sock.bind((Api.PEER, 0))
        sock.connect((registry.GATEWAY, 8080) if who == 'peer' else ('::1', 51820))
        return sock


def api(make):
    """The control API of a real faasd: over its socket, from a peer, and at the enroll port with an invite open."""
    with lab.pair() as (host, _), serving.standalone(host) as server:
        host.run(['ip', '-6', 'address', 'add', f'{Api.PEER}/128', 'dev', 'lo', 'nodad'])
        target, descriptors = Api(server, Sockets(host)), server.descriptors()
        while True:
            changed = False
            for _ in range(20):
                changed |= target.ask(make)
                yield
            target.check(changed)
            lab.wait_until(lambda: server.descriptors() <= descriptors + 8, 10, 'descriptors to be closed')


HOSTILE = """
import array, os, random, socket, sys, time
make = random.Random({seed})
def message():
    kind = make.choice([b'H', b'R', b'F', b'D', b'C', b'S', b'?', b''])
    return kind + make.choice([b'', b'\\1', bytes(8), make.randbytes(8), make.randbytes(4095), b'\\n\\0x'])
def descriptors():
    count = make.choice([0, 0, 0, 1, 5, 250])
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1] * count))] if count else []
"""
BY_CHANNEL = (
    HOSTILE
    + """
def handle(connection, address):
    pass
channel = socket.socket(fileno=os.dup(3))
for _ in range(make.choice([1, 3, 50])):
    channel.sendmsg([message()], descriptors())
"""
)
BY_CONTROL = (
    HOSTILE
    + """
for _ in range(make.choice([1, 20, 300])):
    asking = socket.socket(socket.AF_UNIX)
    asking.setblocking(False)
    try:
        asking.connect('/control.sock')
        asking.sendmsg([message() or b'x'], descriptors())
    except OSError:
        pass
    if make.random() < 0.5:
        asking.detach()
    else:
        asking.close()
time.sleep(make.choice([0, 60]))
"""
)


def functions(make):
    """Functions that send faasd anything: by the channel of runtime.py, and by /control.sock."""
    with lab.pair() as (host, _), serving.standalone(host, FAAS_START_TIMEOUT='0.5', FAAS_STOP_TIMEOUT='0.5') as server:
        honest = server.deploy('honest', serving.saying('honest')).json['ipv6']
        descriptors = server.descriptors()
        while True:
            source = make.choice([BY_CHANNEL, BY_CONTROL]).format(seed=make.randrange(1 << 32))
            named = {'handler.py': source} if source.startswith(BY_CHANNEL[:9]) and 'channel' in source else {
                'server.py': source, 'faas.toml': 'command = ["python3", "server.py"]\n'}  # fmt: skip
            reply = server.deploy('hostile', named)
            if reply.status == 200:
                server.get(reply.json['ipv6'], ok=(0, 28, 52, 56), timeout_s=1)
            if reply.status not in (200, 422, 503):
                raise Found(f'HTTP {reply.status}: {reply.body!r}')
            if server.get(honest, timeout_s=ANSWER_MAX_S) != 'honest':
                raise Found('another function has no answer')
            if reply.status == 200:
                server.api('DELETE', '/api/remove/hostile')
            if any('Traceback' in line for line in server.lines):
                raise Found(''.join(server.lines[-40:]))
            lab.wait_until(lambda: server.descriptors() <= descriptors + 8, 15, 'descriptors to be closed')
            yield


TARGETS = {target.__name__: target for target in (files, wire, client, archives, api, functions)}
IN_A_HOST = (archives,)


def run(target, seed, seconds):
    """How many inputs one target had in that time. Raises whatever it found."""
    make, count, deadline = Maker(f'{seed} {target.__name__}'), 0, time.monotonic() + seconds
    with contextlib.closing(target(make)) as inputs:
        for _ in inputs:
            count += 1
            if time.monotonic() > deadline:
                return count


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = sys.argv[2] if len(sys.argv) > 2 else str(random.randrange(1 << 32))
    wanted = sys.argv[3:] or list(TARGETS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(f'seed {seed}, {seconds:g} s', flush=True)
    failed = 0
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(lab.pair())[0]] if {'archives'} & set(wanted) else []
        for name in wanted:
            target = TARGETS[name]
            try:
                each = seconds / len(wanted)
                if target in IN_A_HOST:
                    count = inside.call(hosts[0], run, target, seed, each, timeout_s=each + 60)
                else:
                    count = run(target, seed, each)
            except Exception:
                traceback.print_exc()
                failed += 1
                print(f'{name:<10} FAILED; again: python3 -m tests.fuzz {seconds:g} {seed} {name}', flush=True)
            else:
                print(f'{name:<10} {count:>8} inputs', flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
