"""control/server.py on a unix socket: bounds, and what happens without descriptors."""

import contextlib
import json
import os
import resource
import socket
import tempfile
import time
import unittest
from unittest import mock

from control.access import Caller
from control.events import Refusals
from control.server import ControlServer, Limits, Verbs, source
from tests import lab


class Served(unittest.TestCase):
    def setUp(self):
        self.path = f'{self.enterContext(tempfile.TemporaryDirectory())}/api.sock'
        self.told = []
        self.refusals = Refusals(lambda area, text: self.told.append(text))

    def serve(self, **limits):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(self.path)
        limits = Limits(**{'threads': 4, 'idle_s': 5, **limits})
        verbs = Verbs(None, None, None, None, None, self.refusals)
        server = ControlServer(sock, lambda address: Caller('local'), limits, verbs, 'api')
        self.addCleanup(server.close)
        return server

    def connect(self):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(self.path)
        return client

    def ask(self, path='/api/nothing'):
        with self.connect() as client:
            client.sendall(f'GET {path} HTTP/1.0\r\nHost: faasd\r\n\r\n'.encode())
            answer = b''.join(iter(lambda: client.recv(65536), b''))
        head, _, body = answer.partition(b'\r\n\r\n')
        return int(head.split()[1]), json.loads(body)

    def test_what_there_is_not_is_one_json_error(self):
        self.serve()
        self.assertEqual(
            (404, {'error': 'there is no /api/nothing', 'hint': 'docs/API.md lists what there is'}), self.ask()
        )

    def test_no_more_connections_than_threads_and_more_wait(self):
        self.serve(threads=1, idle_s=0.5)
        with self.connect() as silent:
            self.assertEqual(404, self.ask()[0])  # after the silent one was closed
            self.assertEqual(b'', silent.recv(1))

    def test_refusals_are_one_line_with_counts_whoever_asks(self):
        self.serve(each_max=0)
        for _ in range(30):
            self.connect().close()
        lab.wait_until(lambda: self.refusals._counts.total() == 30, 5, 'the refusals')
        for number in range(100):
            self.refusals.add(f'peer p{number}', 'Forbidden', ('::1', 1))
        self.refusals.tell()
        self.refusals.tell()
        self.assertEqual(1, len(self.told))
        self.assertRegex(self.told[0], r'^Refused 130 requests: api: more than 0 connections at a time × 30; peer p0: ')
        self.assertTrue(self.told[0].endswith('; 93 other kinds; the last from ::1'), self.told[0])

    def test_one_that_drips_is_closed_after_its_whole_time(self):
        self.serve(whole_s=0.3)
        with self.connect() as client, contextlib.suppress(OSError):
            began = time.monotonic()
            while time.monotonic() < began + 5:
                client.send(b'G')
                time.sleep(0.02)
            self.fail('it was let go on')

    def test_without_descriptors_it_waits_and_does_not_spin(self):
        server, accepts = self.serve(), []
        real = socket.socket.accept
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = [os.open('/dev/null', os.O_RDONLY)]

        def accept(sock):
            if sock is server.socket:
                accepts.append(time.monotonic())
            return real(sock)

        with mock.patch.object(socket.socket, 'accept', accept), contextlib.ExitStack() as undo:
            before = len(os.listdir('/proc/self/fd'))
            with self.connect() as client:
                client.sendall(b'GET /api/nothing HTTP/1.0\r\nHost: x\r\n\r\n')
                client.recv(65536)
            # What the server closes later would be a descriptor for the next connection.
            lab.wait_until(lambda: len(os.listdir('/proc/self/fd')) == before, 5, 'the end of the connection')
            accepts.clear()
            waiting = undo.enter_context(socket.socket(socket.AF_UNIX))
            undo.callback(lambda: [os.close(fd) for fd in held])
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 8, limits[1]))
            undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open('/dev/null', os.O_RDONLY))
            waiting.connect(self.path)
            waiting.sendall(b'GET /api/nothing HTTP/1.0\r\nHost: x\r\n\r\n')
            lab.wait_until(lambda: len(accepts) >= 3, 5, 'three tries')
            self.assertGreater(accepts[2] - accepts[0], 0.15)
            while held:
                os.close(held.pop())
            waiting.settimeout(5)
            self.assertIn(b'404', waiting.recv(65536))


class Sources(unittest.TestCase):
    def test_ipv6_counts_by_its_network_and_peers_by_their_address(self):
        self.assertIsNone(source(()))
        self.assertEqual(source(('2001:db8::1',)), source(('2001:db8::2',)))
        self.assertNotEqual(source(('2001:db8::1',)), source(('2001:db8:0:1::1',)))
        self.assertNotEqual(source(('fd00:faa5:0:100::a',)), source(('fd00:faa5:0:100::b',)))
        self.assertEqual(source(('::ffff:192.0.2.1',)), source(('192.0.2.1',)))


if __name__ == '__main__':
    unittest.main()
