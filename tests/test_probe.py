"""A question has an end, whatever the server does."""

import contextlib
import socket
import threading
import time
import unittest

from handlers.serving import probe


class Probe(unittest.TestCase):
    def ask(self, serve, within_s=1):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            threading.Thread(target=serve, args=(theirs,), daemon=True).start()
            began = time.monotonic()
            heard = probe.ask(ours, 'test', within_s)
            self.assertLess(time.monotonic() - began, within_s + 1)
        return heard

    def test_a_server_that_drips_is_left_in_time(self):
        def drip(sock):
            with contextlib.suppress(OSError):
                while True:
                    sock.send(b'x')
                    time.sleep(0.1)

        self.assertEqual(b'x', self.ask(drip))

    def test_what_it_says_is_told_apart(self):
        self.assertIsNone(self.ask(lambda sock: None, 0.2))
        self.assertEqual(b'', self.ask(lambda sock: (sock.recv(999), sock.shutdown(socket.SHUT_RDWR))))
        self.assertEqual(b'hi', self.ask(lambda sock: (sock.send(b'hi'), sock.recv(999), sock.shutdown(1))))

    def test_an_answer_without_end_has_a_size(self):
        def flood(sock):
            with contextlib.suppress(OSError):
                while True:
                    sock.send(bytes(65536))

        began = time.monotonic()
        self.assertTrue(self.ask(flood, 20))
        self.assertLess(time.monotonic() - began, 5)
