"""The socket guard, on the real kernel: what it lets others than root do, and how long it lives."""

import contextlib
import os
import signal
import socket
import struct
import unittest
from unittest import mock

from host import guard
from tests import lab

NOBODY = 65534
LINGER = struct.Struct('ii')
IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET = socket.IPPROTO_IPV6, socket.IPPROTO_TCP, socket.SOL_SOCKET


def as_nobody(attempt):
    """The errno of attempt() in a process of another user; 0 when it worked."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            attempt()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@lab.needs_root
class OnThisKernel(unittest.TestCase):
    def setUp(self):
        self.guard = guard.Guard('', f'faas-test-{os.getpid()}', 0x70000000)
        self.guard.start()
        self.addCleanup(self.guard.close)

    def connected(self):
        """(the accepted end of a connection of a guarded listener, the listener)."""
        listener = self.enterContext(self.guard.make())
        listener.setblocking(True)
        listener.bind(('::1', 0))
        listener.listen()
        self.enterContext(socket.create_connection(listener.getsockname()[:2]))
        return self.enterContext(listener.accept()[0]), listener

    def test_options_that_servers_need_are_allowed_and_no_others(self):
        connection, listener = self.connected()
        allowed = [
            *((level, option, struct.pack('qq', 1, 0)) for level, option in guard.FREE_OPTIONS),
            (SOL_SOCKET, socket.SO_SNDBUF, guard.BUFFER_MAX),
            (SOL_SOCKET, socket.SO_REUSEADDR, 1),
            (SOL_SOCKET, socket.SO_REUSEPORT, 1),
            (SOL_SOCKET, socket.SO_LINGER, LINGER.pack(0, 3600)),
            (SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, 0)),
        ]
        refused = [
            (SOL_SOCKET, socket.SO_SNDBUF, guard.BUFFER_MAX + 1),
            (SOL_SOCKET, socket.SO_RCVBUF, -1),
            (SOL_SOCKET, socket.SO_REUSEADDR, 0),
            (SOL_SOCKET, socket.SO_REUSEPORT, 0),
            (SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, 1)),
            (SOL_SOCKET, socket.SO_LINGER, LINGER.pack(-1, -1)),
            (IPPROTO_IPV6, 57, bytes([0, 2, 4, 0, 0, 0, 0, 0]) + bytes(16)),  # IPV6_RTHDR
            (IPPROTO_IPV6, socket.IPV6_V6ONLY, 0),
            (IPPROTO_IPV6, 1, socket.AF_INET),  # IPV6_ADDRFORM
            (IPPROTO_IPV6, 78, 1),  # IPV6_FREEBIND
            (IPPROTO_TCP, socket.TCP_FASTOPEN, 1),
            (IPPROTO_TCP, socket.TCP_NODELAY | 0x10000, 1),
            (IPPROTO_TCP | 0x10000, socket.TCP_NODELAY, 1),
        ]
        for sock in (connection, listener):
            for option in allowed:
                with self.subTest(option):
                    self.assertNotEqual(1, as_nobody(lambda sock=sock, option=option: sock.setsockopt(*option)))
            for option in refused:
                with self.subTest(option):
                    self.assertEqual(1, as_nobody(lambda sock=sock, option=option: sock.setsockopt(*option)))
        connection.setsockopt(SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, 1))  # root may

    def test_what_is_not_asked_for_by_listeners_is_as_ever(self):
        with socket.socket(socket.AF_INET6) as own:
            self.assertEqual(0, as_nobody(lambda: own.setsockopt(SOL_SOCKET, socket.SO_LINGER, LINGER.pack(1, 1))))
            self.assertEqual(0, as_nobody(lambda: own.bind(('::1', 0))))

    def test_it_outlives_the_maker_and_the_cgroup(self):
        connection, listener = self.connected()
        self.assertTrue(self.guard.holds(listener))
        folder = self.guard._folder
        self.guard.close()
        self.assertFalse(os.path.exists(folder))
        for sock in (connection, listener):
            self.assertEqual(1, as_nobody(lambda sock=sock: sock.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 0)))
        other = guard.Guard('', f'faas-test-{os.getpid()}', 0x70000000)
        other.start()
        self.addCleanup(other.close)
        self.assertTrue(other.holds(listener), 'of a former faasd')

    def test_a_socket_of_another_maker_is_known(self):
        with socket.create_server(('::1', 0), family=socket.AF_INET6) as plain:
            self.assertFalse(self.guard.holds(plain))

    def test_a_maker_that_has_ended_is_an_error_and_is_started_again(self):
        os.kill(self.guard._maker.pid, signal.SIGKILL)
        self.guard._maker.wait()
        with self.assertRaises(OSError):
            self.guard.make()
        self.guard.heal()
        self.guard.make().close()

    def test_no_socket_is_made_when_the_kernel_does_not_ask(self):
        with mock.patch.object(guard, 'attach_all'):
            blind = guard.Guard('', f'faas-blind-{os.getpid()}', 0x70000000)
            with self.assertRaisesRegex(guard.GuardUnavailable, 'the kernel does not ask the guard'):
                blind.start()
        self.assertFalse(os.path.exists(blind._folder))

    def test_what_a_killed_faasd_left_is_removed(self):
        left = self.guard._folder + '0'
        os.mkdir(left)
        other = guard.Guard('', f'faas-test-{os.getpid()}', 0x70000000)
        other.start()
        self.addCleanup(other.close)
        self.assertFalse(os.path.exists(left))
        self.guard.make().close()

    def test_nothing_is_left_open(self):
        before = os.listdir('/proc/self/fd')
        for _ in range(3):
            self.guard.make().close()
            with contextlib.closing(guard.Guard('', f'faas-more-{os.getpid()}', 0x70000000)) as other:
                other.start()
        self.assertEqual(before, os.listdir('/proc/self/fd'))


class WithoutRoot(unittest.TestCase):
    def test_a_host_without_version_2_is_told(self):
        self.enterContext(mock.patch.object(guard, 'hierarchy', return_value=None))
        with self.assertRaisesRegex(guard.GuardUnavailable, 'none are mounted') as raised:
            guard.Guard('', 'faas-test', 1).start()
        self.assertIn('FAAS_GUARD=table', raised.exception.hint)
        self.assertEqual(os.EX_CONFIG, raised.exception.exit_code)

    def test_a_jump_is_to_a_label_that_comes_later(self):
        program = guard.Program()
        program.add(guard.JEQ_IMM, 1, imm=7, to='end')
        program.add(guard.MOV_IMM, 0, imm=0)
        program.label('end')
        program.add(guard.EXIT)
        self.assertEqual(bytes.fromhex('1501010007000000b7000000000000009500000000000000'), program.pack())
