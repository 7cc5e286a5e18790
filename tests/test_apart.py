"""What a function can make wait: it waits in threads of its own, and another function is served meanwhile."""

import ast
import contextlib
import os
import pathlib
import re
import socket
import struct
import sys
import threading
import time
import unittest

from handlers.serving import apart
from host import process
from tests import lab, serving

# Pairs of connected sockets of its own, one with SO_LINGER and unsent data: its close() waits.
LINGERING = """
import socket, struct, threading, time

def lingering():
    listener = socket.create_server(('::1', 0), family=socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock = socket.create_connection(listener.getsockname()[:2])
    kept.append((listener, listener.accept()[0]))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 3600))
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        return sock

kept = []
"""
BY_CHANNEL = LINGERING + """
def handle(connection, address):
    connection.recv(4096)
    channel = socket.socket(fileno=3)
    with lingering() as sock:
        socket.send_fds(channel, [b'?'], [sock.fileno()])
    time.sleep(60)
"""
# It asks for one connection, and before that sends a descriptor that nobody has asked for.
BY_CONTROL = LINGERING + """
for _ in range(20):
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect('/control.sock')
        with lingering() as sock:
            socket.send_fds(asking, [b'?'], [sock.fileno()])
        _, (fd,), _, _ = socket.recv_fds(asking, 16, 1)
        with socket.socket(fileno=fd) as connection:
            connection.recv(4096)
            connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nkept')
            connection.shutdown(socket.SHUT_WR)
"""
# While one thread calls listen() on such a socket, another closes it: the duplicate of faasd is the last.
BY_LISTEN = LINGERING + """
import os
def handle(connection, address):
    connection.recv(4096)
    for _ in range(50):
        fd = lingering().detach()
        threading.Thread(target=os.close, args=(fd,)).start()
        try:
            socket.socket(fileno=os.dup(fd)).listen()
        except OSError:
            pass
    connection.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\ndone')
"""
# It listens for IPv4, answers a byte a second for ever, and takes an hour to be ready.
DRIPS = """
import socket, time
listener = socket.create_server(('0.0.0.0', 80))
while True:
    connection, _ = listener.accept()
    try:
        while True:
            connection.sendall(b'x')
            time.sleep(1)
    except OSError:
        pass
"""
NEVER = 'import time\ntime.sleep(3600)\n'


class Calls(unittest.TestCase):
    def setUp(self):
        self.apart, self.go = apart.Apart(), threading.Event()
        self.addCleanup(self.go.set)

    def test_what_waits_does_not_hold_up_another_function(self):
        for _ in range(apart.EACH_MAX):
            self.assertTrue(self.apart.call('stuck', self.go.wait))
        self.assertFalse(self.apart.call('stuck', self.go.wait))
        reader, writer = os.pipe()
        self.assertFalse(self.apart.close('stuck', reader))
        other, other_writer = os.pipe()
        self.assertTrue(self.apart.close('other', other))
        lab.wait_until(lambda: self.closed(other_writer), 5, 'the closing for the other')
        self.assertFalse(self.closed(writer))
        self.go.set()
        lab.wait_until(lambda: self.apart.check() or self.closed(writer), 5, 'the closing for the first')

    def closed(self, writer):
        """True when nobody can read any more what goes into that pipe; it is closed then."""
        try:
            os.write(writer, b'x')
        except BrokenPipeError:
            os.close(writer)
            return True
        return False

    def test_a_call_that_takes_long_is_told(self):
        self.apart.call('stuck', self.go.wait)
        self.apart.check()
        self.apart._running = {key: (name, since - apart.STUCK_S) for key, (name, since) in self.apart._running.items()}
        with self.assertRaisesRegex(apart.Stuck, 'faasd waits for stuck'):
            self.apart.check()
        self.go.set()
        lab.wait_until(lambda: not self.apart._running, 5, 'its end')
        self.apart.check()

    def test_a_program_that_starts_meanwhile_has_no_last_copy(self):
        """It would wait at its start, and faasd with it."""
        ours, theirs = socket.socketpair()
        with socket.create_server(('::1', 0), family=socket.AF_INET6) as listener:
            lingering = socket.create_connection(listener.getsockname()[:2])
            with listener.accept()[0]:
                lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 10))
                lingering.setblocking(False)
                with self.assertRaises(BlockingIOError):
                    while True:
                        lingering.send(bytes(1 << 20))
                socket.send_fds(theirs, [b'x'], [lingering.fileno()])
                lingering.close()
                self.assertFalse(apart.is_empty(ours))
                started = time.monotonic()
                self.apart.close('stuck', ours)
                while ours.fileno() >= 0:
                    process.run([sys.executable, '-c', ''])
                process.run([sys.executable, '-c', ''])
                self.assertLess(time.monotonic() - started, 5)
                self.assertEqual(1, len(self.apart._running))
        theirs.close()

    def test_a_queue_with_nothing_in_it_is_told(self):
        for sent, wanted in ((b'', True), (b'x', False)):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.sendall(sent)
                self.assertEqual(wanted, apart.is_empty(ours))
                with self.assertRaises(BrokenPipeError):
                    theirs.send(b'more')


class Rule(unittest.TestCase):
    def test_every_call_that_could_wait_is_in_the_list(self):
        root = pathlib.Path(__file__).parent.parent
        text = (root / 'docs/ARCHITECTURE.md').read_text()
        rows = re.findall(r'^\| `(\w+\.py)` \| ([^|]*) \|', text.partition('Exceptions, each')[2], re.MULTILINE)
        listed = {
            (module, name.strip('`').rpartition('.')[2]) for module, names in rows for name in names.split(', ')
        }
        found = set()
        for path in (root / 'handlers/serving').glob('*.py'):
            if path.name != 'apart.py':
                for function in ast.walk(ast.parse(path.read_text())):
                    if isinstance(function, ast.FunctionDef):
                        found |= {(path.name, function.name) for node in own_nodes(function) if waits(node)}
        self.assertEqual(sorted(listed), sorted(found))


def own_nodes(function):
    """What is in a function, and not in one that it defines."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef):
            yield from own_nodes(node)


def waits(node):
    """True of a call of close() or accept(), but for those of pools and of Inside, which are our own."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    ours = 'pool.close', 'inside.close', 'watched.inside.close', 'self._around.apart.close'
    return node.func.attr in ('close', 'accept') and ast.unparse(node.func) not in ours


@lab.needs_root
class Attacks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host, _ = cls.enterClassContext(lab.pair())
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_START_TIMEOUT='20'))
        cls.honest = cls.server.deploy('honest', serving.saying('honest')).json['ipv6']

    def setUp(self):
        self.addCleanup(self.server.api, 'DELETE', '/api/remove/hostile')

    def attack(self, source, requests=1, answers=(0, 28, 52, 56)):
        files = source if isinstance(source, dict) else {'handler.py': source}
        deployed = self.server.deploy('hostile', files)
        self.assertEqual(200, deployed.status, deployed.body)
        for _ in range(requests):
            self.server.get(deployed.json['ipv6'], ok=answers, timeout_s=2)
            self.assert_others_are_served()

    def assert_others_are_served(self):
        self.assertEqual('honest', self.server.get(self.honest, timeout_s=2))
        self.server.deploy('next', serving.saying('next'))
        self.assertEqual(200, self.server.api('DELETE', '/api/remove/next').status)

    def test_a_descriptor_that_comes_by_the_channel(self):
        self.attack(BY_CHANNEL)

    def test_descriptors_that_come_by_control_sock(self):
        command = {'server.py': BY_CONTROL, 'faas.toml': 'command = ["python3", "server.py"]\n'}
        self.attack(command, requests=4)

    def test_a_listen_on_a_connection_of_its_own(self):
        self.attack(BY_LISTEN)

    def upload_slowly(self):
        """Send an archive, one byte a second."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.host.path('/run/faasd/faasd.sock')))
            client.sendall(b'POST /api/new?name=slow HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n')
            while True:
                client.send(b'x')
                time.sleep(1)

    def test_servers_that_drip_and_starts_that_take_an_hour(self):
        """Four at once hold up no other deploy, and no restart of faasd."""
        slow = 'command = ["python3", "server.py"]\nstart_timeout = 3600\n'
        threads = [
            threading.Thread(target=self.server.deploy, args=(f'slow{number}', {'server.py': each, 'faas.toml': slow}))
            for number, each in enumerate([DRIPS] * 4 + [NEVER] * 4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)
        started = time.monotonic()
        self.assert_others_are_served()
        self.assertLess(time.monotonic() - started, 5)
        for thread in threads[:4]:
            thread.join(20)
            self.assertFalse(thread.is_alive(), 'a probe has an end')
        upload = threading.Thread(target=self.upload_slowly)
        upload.start()
        started = time.monotonic()
        self.server.restart()
        self.assertLess(time.monotonic() - started, 15)
        self.assert_others_are_served()
        for thread in (*threads, upload):
            thread.join(20)
            self.assertFalse(thread.is_alive())
        for number in range(4):
            self.server.api('DELETE', f'/api/remove/slow{number}')
