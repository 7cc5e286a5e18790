"""Inputs that once made a traceback, a wait, or an answer without a status. `make fuzz` found them."""

import contextlib
import os
import pathlib
import signal
import socket
import tempfile
import threading
import time
import unittest
from unittest import mock

import dns_manager
from control import settings
from control.api import ControlAPI
from control.events import printable
from handlers.images import folder, spec
from handlers.images.streams import ImageError
from tests.test_faas import faas


class Files(unittest.TestCase):
    def setUp(self):
        self.place = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(contextlib.chdir(self.place))

    def test_a_key_of_many_parts_takes_tomllib_long(self):
        (self.place / 'faas.toml').write_text('a' + '.a' * 8000 + ' = 1\n')
        began = time.monotonic()
        with self.assertRaises(ImageError):
            folder.faas_toml()
        self.assertLess(time.monotonic() - began, 5)
        (self.place / 'faas.toml').write_text('a' + '.a' * 32000 + ' = 1\n')
        with self.assertRaisesRegex(ImageError, 'more than 16384 bytes'):
            folder.faas_toml()

    def test_signals_that_do_not_exist(self):
        for name in ('SIGRTMAX+1', 'SIGHUP+99', 'SIGHUP-1', 'SIGRTMIN-99', 'SIGTERM+64'):
            with self.subTest(name), self.assertRaises(ValueError):
                spec.signal_number(name)
        self.assertEqual(37, spec.signal_number('SIGRTMIN+3'))

    def test_a_port_of_many_digits(self):
        for text in ('9' * 5000, '0' * 5000 + '1', '²', ''):
            self.assertEqual((80,), spec.candidates(spec.Spec('handler', env={'PORT': text})))

    def test_settings_that_a_terminal_would_obey(self):
        (self.place / 'env').write_text('FAAS_\x1b[2J=1\n')
        with self.assertRaises(settings.BadSettings) as raised:
            settings.read_settings({}, 'env')
        self.assertTrue(str(raised.exception).isprintable())

    def test_a_line_of_resolv_conf_that_is_no_address(self):
        (self.place / 'resolv.conf').write_text('nameserver nonsense\nnameserver ::1%a/b\nnameserver 192.0.2.9\n')
        with mock.patch.object(dns_manager, 'query', side_effect=TimeoutError):
            self.assertEqual(['192.0.2.9'], dns_manager.default_forwarders('resolv.conf'))


class Lines(unittest.TestCase):
    def test_what_a_stranger_names_is_one_printable_line(self):
        self.assertEqual('a?b??', printable('a\nb\x1b\udcff'))


class Wire(unittest.TestCase):
    def setUp(self):
        for number in faas.SIGNALS:             # the client ignores them at its end
            self.addCleanup(signal.signal, number, signal.getsignal(number))

    def test_what_is_no_request_is_answered_with_a_status(self):
        ours, theirs = socket.socketpair()
        server = mock.Mock(limits=mock.Mock(idle_s=5, whole_s=None))
        thread = threading.Thread(target=ControlAPI, args=(theirs, None, server))
        with ours, theirs:
            thread.start()
            ours.sendall(b'nonsense\r\n')
            ours.shutdown(socket.SHUT_WR)
            with ours.makefile('rb') as file:
                thread.join(5)
                theirs.close()
                self.assertRegex(file.read(), rb'^HTTP/1\.[01] 400 ')

    def test_the_client_and_a_chunk_of_less_than_nothing(self):
        with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f'{place}/sock')
            listener.listen()

            def answer():
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n')

            threading.Thread(target=answer, daemon=True).start()
            environ = {'FAAS_SOCKET': f'{place}/sock', 'HOME': place, 'PATH': os.environ['PATH']}
            with mock.patch.dict(os.environ, environ, clear=True):
                self.assertEqual(1, faas.main(['list']))


if __name__ == '__main__':
    unittest.main()
