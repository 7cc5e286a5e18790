"""What a function may use of things that all functions, faasd and the machine share; each bound is attacked here."""

import contextlib
import ctypes
import json
import os
import re
import socket
import stat
import threading
import time
import unittest

from host import sock_diag
from tests import images, inside, lab, programs, serving

OOM_FUNCTIONS, OOM_OWN = 500, -500
ATTACKER = """
import ctypes, errno, json, os, signal, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def oom_score():
    told = []
    with open('/proc/self/oom_score_adj') as file:
        told.append(int(file.read()))
    for wanted in ('400', '-500', '1000', '500'):
        try:
            with open('/proc/self/oom_score_adj', 'w') as file:
                file.write(wanted)
            told.append('set')
        except OSError as error:
            told.append(errno.errorcode[error.errno])
    return told

def inotify():
    count = 0
    while (fd := libc.inotify_init1(0)) >= 0 and count < 4000:
        kept.append(fd)
        count += 1
    return [count, errno.errorcode[ctypes.get_errno()]]

def signals():
    'That nobody takes.'
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    count, me = 0, ctypes.c_ulong(threading.get_ident())
    while count < 20000 and libc.pthread_sigqueue(me, signal.SIGRTMIN, ctypes.c_void_p(0)) == 0:
        count += 1
    return count

def flood(connection):
    'What the client does not read waits in the kernel.'
    kept.append(connection.dup())
    connection.setblocking(False)
    size = 0
    while True:
        try:
            size += connection.send(bytes(1 << 20))
        except BlockingIOError:
            return size

def own_tcp():
    'Between sockets of its own, which no watch of the host sees.'
    with socket.create_server(('::1', 0), family=socket.AF_INET6, backlog=128) as listener:
        for _ in range(60):
            pair = socket.create_connection(listener.getsockname()[:2]), listener.accept()[0]
            kept.extend(pair)
            for each in pair:
                each.setblocking(False)
                quiet = 0
                while quiet < 3:
                    try:
                        each.send(bytes(1 << 20))
                    except BlockingIOError:
                        quiet += 1
                        time.sleep(0.001)

def own_udp():
    for _ in range(60):
        taker = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        taker.bind(('::1', 0))
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
        kept.append(taker)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            for _ in range(2000):
                try:
                    sender.sendto(bytes(4000), taker.getsockname())
                except OSError:  # no buffer space
                    return

def handle(connection, address):
    what = connection.recv(4096).split()[1][1:].decode()
    if what == 'flood':
        return flood(connection)
    answer = globals()[what]()
    connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\n' + json.dumps(answer).encode())
"""
POSTED = """
import contextlib, sys
from http.server import BaseHTTPRequestHandler
with contextlib.suppress(AttributeError):
    sys.modules['__main__'].pace.GRACE_S = 2  # for the test
class Posted(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.do_GET()
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(1000 if self.path == '/long' else 1):
            self.wfile.write(bytes(65536))
"""
CONTROL = """
import socket
while True:
    with socket.socket(socket.AF_UNIX) as control:
        control.connect('/control.sock')
        _, fds, _, _ = socket.recv_fds(control, 1, 1)
    for fd in fds:
        with socket.socket(fileno=fd) as connection:
            connection.recv(4096)
            connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\ncontrol')
"""


def image():
    """An image with a folder that everybody in it may write, and a program of root's that anybody runs as root."""
    busybox = programs.Files().put('/usr/bin/busybox', programs.static_busybox().read_bytes(), 0o4755)
    busybox.folder('/tmp', '/var/shared', mode=0o1777).put('/www/index.html', 'image')
    command = ['/usr/bin/busybox', 'httpd', '-f', '-p', '[::]:80', '-h', '/www']
    return images.image([busybox.layer()], {'Cmd': command})


def writable_by_others(top):
    """The files and folders below `top` that any user of the machine can reach and write, or run as another user."""
    found = []
    if not os.lstat(top).st_mode & stat.S_IXOTH:
        return found
    with os.scandir(top) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                mode = entry.stat(follow_symlinks=False).st_mode
                if not stat.S_ISLNK(mode) and mode & (stat.S_IWOTH | stat.S_ISUID):
                    found.append(f'{stat.filemode(mode)} {entry.path}')
                if stat.S_ISDIR(mode):
                    found += writable_by_others(entry.path)
    return found


@lab.needs_root
class Bounds(unittest.TestCase):
    """One faasd, with a function of each kind."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))
        cls.addresses = {}
        for name, source in (
            ('folder', {'handler.py': ATTACKER}),
            ('image', image()),
            ('control', {'faas.toml': 'command = ["python3", "serve.py"]', 'serve.py': CONTROL}),
        ):
            cls.deploy(name, source)

    @classmethod
    def deploy(cls, name, source):
        reply = cls.server.deploy(name, source)
        assert reply.status == 200, reply.body
        cls.addresses[name] = reply.json['ipv6']
        return reply.json

    def get(self, name, path='/', **options):
        return self.server.get(self.addresses[name], path, **options)

    def attack(self, what, name='folder'):
        """What the function says of an attack."""
        return json.loads(self.get(name, f'/{what}'))

    def processes(self, *names):
        """{name: pid} of the host's processes with these names."""
        lines = self.host.sh('ps -eo pid=,comm=').splitlines()
        return {name: pid for pid, name in map(str.split, lines) if name in names}

    def test_no_user_of_the_host_writes_where_instances_live(self):
        self.assertEqual('image', self.get('image').strip())
        self.assertEqual('control', self.get('control'))
        found = [
            each
            for top in ('/run/faasd', '/var/lib/faasd', '/etc/wireguard', '/etc/coredns')
            for each in writable_by_others(str(self.host.path(top)))
        ]
        self.assertEqual([], found)

    def test_functions_are_ended_before_what_serves_them(self):
        before, *attempts = self.attack('oom_score')
        self.assertEqual(OOM_FUNCTIONS, before)
        faasd = self.host.run(['pgrep', '-of', 'faasd.py']).stdout.strip()
        helpers = self.processes('coredns', 'wireguard-go')
        self.assertIn('coredns', helpers)
        if may_lower_oom_score():
            self.assertEqual(['EACCES', 'EACCES', 'set', 'set'], attempts)
            for pid in (faasd, *helpers.values()):
                self.assertEqual(OOM_OWN, int(self.host.sh(f'cat /proc/{pid}/oom_score_adj')), pid)

    def test_what_the_kernel_counts_for_each_user_is_the_functions_own(self):
        count, error = self.attack('inotify')
        self.assertEqual('EMFILE', error)
        self.assertLessEqual(count, 4000)
        self.assertGreaterEqual(inside.call(self.host, inotify), 0, f'root has none after {count} of a function')
        before = pending_signals()
        count = self.attack('signals')
        self.assertGreater(count, 1000)
        self.assertLess(pending_signals(), before + count // 2)
        self.server.deploy('folder', {'handler.py': ATTACKER})  # without those signals

    def test_no_function_gets_all_connections_that_it_asks_for(self):
        told = self.deploy('greedy', {'handler.py': ATTACKER, 'faas.toml': 'concurrency = 100000'})
        self.assertRegex(
            told['warning'], '^concurrency is [0-9]+: an instance may not have 100000 connections on this server$'
        )
        told = self.deploy('greedy', {'handler.py': ATTACKER, 'faas.toml': 'concurrency = 2000'})
        self.assertIsNone(told['warning'])

    def test_what_clients_do_not_read_is_bounded(self):
        def flood(address):
            """How much the kernel has for the function, at most and in the end."""
            clients = []
            for _ in range(120):
                clients.append(socket.create_connection((address, 80)))
                clients[-1].sendall(b'GET /flood')
            taken, deadline = [], time.monotonic() + 8
            while time.monotonic() < deadline and not (taken and taken[-1] <= 256 << 20 < max(taken)):
                time.sleep(0.05)
                taken.append(sock_diag.open_connections(f'{address}/128', 80).memory.total())
            answer = max(taken) >> 20, taken[-1] >> 20, sum(is_open(each) for each in clients)
            for each in clients:
                each.close()
            return answer

        most, last, left = inside.call(self.host, flood, self.addresses['folder'])
        self.assertGreater(most, 256, 'the attack itself does not work')
        self.assertLessEqual(last, 256)
        self.assertGreater(left, 40, 'more than the heaviest were ended')
        line = "folder: its connections take .* MiB of the kernel's memory, and 256 MiB are allowed: ended"
        lab.wait_until(lambda: re.search(line, ''.join(self.server.lines)), 5, 'the line in the log')
        self.assertEqual('control', self.get('control'))
        self.server.deploy('folder', {'handler.py': ATTACKER})

    def test_what_a_function_sends_to_itself_is_bounded(self):
        for attack, kind in (('own_tcp', 'TCP'), ('own_udp', 'UDP')):
            before = socket_memory(kind)
            self.attack(attack)
            self.assertLess(socket_memory(kind) - before, 300 << 20, attack)
            self.server.deploy('folder', {'handler.py': ATTACKER})

    def test_slow_clients_do_not_hold_the_threads_of_a_handler(self):
        self.deploy('posted', {'handler.py': POSTED})
        for request, wanted in (
            (b'POST / HTTP/1.0\r\nContent-Length: 1000\r\n\r\n', b'408'),
            (b'GET /', b'408'),
            (b'GET /long HTTP/1.0\r\n\r\n', b'200'),
        ):
            took, answers = inside.call(self.host, slowly, request, self.addresses['posted'], self.addresses['control'])
            self.assertLess(took, 2, f'another client waits behind {request}')
            self.assertEqual(wanted, answers, request)

    def test_the_units_say_the_same(self):
        for unit in ('faasd.service', 'faas-coredns.service', 'wg-quick@.conf'):
            self.assertIn(f'OOMScoreAdjust={OOM_OWN}\n', (lab.REPO / 'systemd' / unit).read_text(), unit)
        # Without that runc cannot keep a function from setting its own to that of faasd.
        self.assertIn('CAP_SYS_RESOURCE', (lab.REPO / 'systemd/faasd.service').read_text())


def socket_memory(kind):
    """The kernel's memory for all sockets of a kind: 'TCP' or 'UDP'."""
    with open('/proc/net/sockstat') as file:
        return int(re.search(rf'{kind}:.* mem (\d+)', file.read())[1]) * os.sysconf('SC_PAGE_SIZE')


def slowly(request, address, source):
    """How long another client waits beside forty slow ones (s), and the status that the slow ones get."""
    slow = []
    for _ in range(40):
        slow.append(socket.create_connection((address, 80), timeout=20))
        slow[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow[-1].sendall(request)
    over = threading.Event()

    def drip():
        while not over.wait(0.3):
            for each in slow:
                with contextlib.suppress(OSError):
                    each.send(b'x')

    thread = threading.Thread(target=drip)
    if b'/long' not in request:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    with socket.create_connection((address, 80), 5, (source, 0)) as client:
        client.sendall(b'GET / HTTP/1.0\r\n\r\n')
        client.recv(100)
    took = time.monotonic() - began
    answers = set()
    for each in slow:
        with each, contextlib.suppress(ConnectionResetError):
            answers.add(each.recv(12)[9:])
    over.set()
    return took, b' '.join(sorted(answers))


def is_open(client):
    """False if the other end has reset the connection."""
    try:
        client.send(b'x')
        return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    except OSError:
        return False


def inotify():
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.inotify_init1(os.O_CLOEXEC)


def pending_signals():
    """How many signals wait for processes of this user."""
    with open('/proc/self/status') as file:
        return int(re.search(r'SigQ:\s*(\d+)', file.read())[1])


def may_lower_oom_score():
    """True if root of this machine has CAP_SYS_RESOURCE, as it has unless the machine is a container."""
    with open('/proc/self/status') as file:
        return int(re.search(r'CapEff:\s*(\w+)', file.read())[1], 16) >> 24 & 1


if __name__ == '__main__':
    unittest.main()
