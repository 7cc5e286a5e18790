"""Attacks on the client: by other users of the laptop, and by a hostile server. Each works without its cure."""

import contextlib
import io
import itertools
import os
import shutil
import socket
import sys
import threading
import time
import unittest
from unittest import mock

from tests import lab, serving
from tests.test_faas import FAAS, KEYS, ApiCase, faas, token

# In place of the client: it keeps what every user of the machine can read of it, and what came on its stdin.
TELLTALE = f"""#!{sys.executable} -IS
import sys
open('seen', 'wb').write(open('/proc/self/cmdline', 'rb').read().replace(b'\\0', b' '))
open('given', 'w').write(sys.stdin.read())
"""


class Paste(ApiCase):
    """Other users of a laptop read /proc/PID/cmdline while its owner pastes an invite."""

    def test_what_is_to_be_pasted_is_in_no_argument(self):
        self.serve((200, {'token': token(), 'name': None, 'expires': '2026-11-23T21:00:00Z'}))
        code, text, _ = self.faas('vpn', 'invite', 'laptop')
        self.assertEqual(0, code)
        for shell in filter(shutil.which, ('sh', 'bash', 'zsh', 'busybox')):
            with self.subTest(shell):
                folder = self.folder({'faas': TELLTALE, 'typed': f'cd {self.home}/{shell}\n{text}'}, shell)
                (folder / 'faas').chmod(0o755)
                self.type(shell, folder)
                self.assertIn('vpn connect laptop --invite', (folder / 'seen').read_text())
                self.assertNotIn('faas1_', (folder / 'seen').read_text())
                self.assertEqual(f'{token()}\n', (folder / 'given').read_text())

    @staticmethod
    def type(shell, folder):
        """The text comes from a terminal: the shell has it on its stdin."""
        words = [shell, 'sh'] if shell == 'busybox' else [shell]
        with open(folder / 'typed') as typed:
            move = (os.POSIX_SPAWN_DUP2, typed.fileno(), 0)
            pid = os.posix_spawnp(words[0], words, os.environ, file_actions=[move])
            os.waitpid(pid, 0)


OK = b'HTTP/1.1 200 OK\r\n'
PATIENCE_S = 0.2


def for_ever(*parts):
    """The first part, then the second again and again."""
    yield parts[0]
    yield from itertools.repeat(parts[-1])


class Planted(ApiCase):
    """What others can put on this machine is not run as another user."""

    def test_a_module_beside_the_client(self):
        for module in '__future__', 'argparse', 'typing':
            folder = self.folder({f'{module}.py': 'print("planted", flush=True)\n'}, module)
            shutil.copy(FAAS, folder / 'faas')
            with open(folder / 'said', 'w+') as said:
                move = (os.POSIX_SPAWN_DUP2, said.fileno(), 1)
                pid = os.posix_spawn(folder / 'faas', ['faas', '--version'], os.environ, file_actions=[move])
                self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            self.assertEqual(f'faas {faas.VERSION}\n', (folder / 'said').read_text())

    def test_the_environment_of_roots_programs(self):
        set_by_person = {'BASH_ENV': '/tmp/x', 'LD_PRELOAD': '/tmp/x', 'PYTHONPATH': '/tmp', 'FAAS_INVITE': token()}
        with mock.patch.dict(os.environ, {**set_by_person, 'PATH': '/tmp:relative::/usr/bin'}):
            for uid in 0, 4711:
                with mock.patch.object(os, 'geteuid', return_value=uid):
                    self.assertFalse({'/tmp', 'relative', ''} & {*faas.environment()['PATH'].split(':')})
                    self.assertNotIn('FAAS_INVITE', faas.environment())
                    self.assertEqual(uid != 0, 'BASH_ENV' in faas.environment())
                    self.assertEqual(uid != 0, 'LD_PRELOAD' in faas.environment())


@lab.needs_root
class PlantedPrograms(unittest.TestCase):
    """A user's folder is in root's PATH."""

    NAMES = 'ip', 'wg', 'cat', 'mkdir', 'ls', 'nft', 'sysctl', 'ss', 'runc', 'wireguard-go', 'coredns'

    def test_they_are_not_run_as_root(self):
        host = self.enterContext(lab.Host('server'))
        host.sh(f'mkdir -p /home/joe/bin; cd /home/joe/bin; for name in {" ".join(self.NAMES)}; do '
                "printf '%s\\n' '#!/bin/sh' 'echo $0 >>/tmp/planted; exit 1' >$name; chmod 755 $name; done; "
                'chown -R 4711 /home/joe')
        env = {'PATH': f'/home/joe/bin:{os.environ["PATH"]}', 'HOME': '/root', 'FAAS_VPN_ENDPOINT': '127.0.0.1'}
        host.run([*serving.FAASD, '--prepare'], env=env)
        done = host.run([sys.executable, '-I', FAAS, 'vpn', 'connect', '--server', '127.0.0.1:1'], ok=(1,), env=env)
        self.assertIn('cannot be reached', done.stderr)
        self.assertFalse(host.path('/tmp/planted').exists(), host.sh('cat /tmp/planted', ok=None))
        self.assertEqual(sorted(self.NAMES), sorted(os.listdir(host.path('/home/joe/bin'))))


class Flood:
    """A UDP socket at which answers to no question of ours wait without end."""

    def __init__(self, *_):
        self._end = time.monotonic() + 10 * PATIENCE_S

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    connect = send = settimeout = lambda self, *_: None

    def recv(self, _):
        if time.monotonic() > self._end:
            raise AssertionError('it still reads')
        return b'xx'


@lab.not_in_check
class Drip(ApiCase):
    """A hostile server answers for ever, a little at a time or as fast as it can."""

    # What it sends (pieces), and how long it waits between them.
    ANSWERS = {
        'the status line': (b'H', b'T', 0.05),
        'interim answers': (b'', b'HTTP/1.1 100 Continue\r\n\r\n', 0.05),
        'interim answers, fast': (b'', b'HTTP/1.1 100 Continue\r\n\r\n' * 2000, 0),
        'headers': (OK, b'X: y\r\n', 0.05),
        'one header': (OK + b'X: ', b'y', 0.05),
        'a body': (OK + b'Content-Length: 100000\r\n\r\n', b' ', 0.05),
        'a body without an end, fast': (OK + b'\r\n', b' ' * 65536, 0),
        'chunks': (OK + b'Transfer-Encoding: chunked\r\n\r\n', b'1\r\n \r\n', 0.05),
        'trailers': (OK + b'Transfer-Encoding: chunked\r\n\r\n0\r\n', b'X: y\r\n', 0.05),
        'trailers, fast': (OK + b'Transfer-Encoding: chunked\r\n\r\n0\r\n', b'X: y\r\n' * 10000, 0),
        'nothing': (b'', b'', 0.05),
    }

    def hostile(self, family, address, first, rest, pause_s):
        """The address of a server that answers everybody so, until the test has ended."""
        listener = socket.socket(family)
        listener.bind(address)
        listener.listen()
        self.addCleanup(listener.close)
        over = threading.Event()
        self.addCleanup(over.set)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        client.recv(65536)
                        for piece in for_ever(first, rest):
                            if over.wait(pause_s):
                                return
                            client.sendall(piece)

        threading.Thread(target=serve, daemon=True).start()
        self.addCleanup(listener.shutdown, socket.SHUT_RDWR)
        return listener.getsockname()

    def given_up(self, call, *args, within_s=3):
        """The Failure of a call that may not wait longer."""
        found = []
        thread = threading.Thread(target=lambda: found.append(self.failure(call, *args)), daemon=True)
        thread.start()
        thread.join(within_s)
        self.assertFalse(thread.is_alive(), 'it still waits')
        return found[0].message

    def test_the_api(self):
        for what, answer in self.ANSWERS.items():
            with self.subTest(what), mock.patch.object(faas, 'MAX_ANSWER', 1 << 20), \
                    mock.patch.object(faas.ImpatientSocket, 'most', 1 << 20):
                faas.SOCKET = f'{self.home}/{what.replace(" ", "-")}'
                self.hostile(socket.AF_UNIX, faas.SOCKET, *answer)
                said = self.given_up(faas.Api(timeout_s=PATIENCE_S).request, 'GET', '/api/list')
                self.assertRegex(said, 'no answer in time|longer than|does not speak HTTP')

    def test_enrolling(self):
        for what in ('interim answers', 'interim answers, fast', 'a body', 'trailers, fast'):
            with self.subTest(what), mock.patch.object(faas, 'ENROLL_S', PATIENCE_S):
                host, port = self.hostile(socket.AF_INET, ('127.0.0.1', 0), *self.ANSWERS[what])
                said = self.given_up(faas.redeem, faas.Invite(token(a=f'{host}:{port}')), KEYS[0], within_s=12)
                self.assertRegex(said, 'no answer in time|longer than')

    def test_an_upload_that_is_read_a_little_at_a_time(self):
        with mock.patch.object(faas, 'SEND_S', PATIENCE_S), mock.patch.object(faas, 'ANSWER_S', PATIENCE_S):
            listener = socket.socket(socket.AF_UNIX)
            self.addCleanup(listener.close)
            listener.bind(faas.SOCKET)
            listener.listen()
            threading.Thread(target=self.read_slowly, args=(listener,), daemon=True).start()
            self.assertIn('no answer in time', self.given_up(faas.Api().upload, '/api/new', io.BytesIO(bytes(8 << 20)),
                                                             8 << 20))

    @staticmethod
    def read_slowly(listener):
        with contextlib.suppress(OSError), listener.accept()[0] as client:
            while client.recv(16):
                time.sleep(0.02)

    def test_an_answer_that_comes_on_is_waited_for(self):
        """Slower than the time-out in all, and never still."""
        def answer(handler, body):
            handler.send_response(200)
            handler.send_header('Content-Length', str(5 * faas.LEAST_RATE))
            handler.end_headers()
            for _ in range(5):
                time.sleep(PATIENCE_S / 2)
                handler.wfile.write(b'x' * faas.LEAST_RATE)
                handler.wfile.flush()

        self.serve(answer)
        reply = faas.Api(timeout_s=PATIENCE_S).request('GET', '/api/logs/x')
        self.assertEqual(5 * faas.LEAST_RATE, len(reply.body))

    def test_dns_answers_that_are_none(self):
        with mock.patch.object(faas.socket, 'socket', Flood), self.assertRaises(OSError):
            faas.direct_lookup('ns.faas', '::1', PATIENCE_S)


if __name__ == '__main__':
    unittest.main()
