"""Which connections are ended when a function has too much of the kernel's memory."""

import errno
import os
import types
import unittest
from unittest import mock

from control.tcp_memory import AFTER, MACHINE_PART, TCPMemory
from handlers.containers.limits import Bounds, Limits
from handlers.images import spec
from host import sock_diag

MEGA = 1 << 20


def bounds(memory):
    return Bounds(Limits(memory, 64, 1), Limits(memory, 64, 1))


class Watched(unittest.TestCase):
    def setUp(self):
        self.events, self.ended, self.killed = [], [], []
        loop = types.SimpleNamespace(call=lambda function, *args: function(*args))
        self.function = types.SimpleNamespace(name='test', ipv6='fd00:faa5:1:0::a')
        self.pool = types.SimpleNamespace(around=types.SimpleNamespace(loop=loop),
                                          instances=types.SimpleNamespace(kill=self.killed.append), revision=None)
        self.memory = TCPMemory(bounds(16 * MEGA), lambda area, text, **more: self.events.append(text))

    def look(self, sizes, end=None):
        address = bytes.fromhex('fd00faa500010000000000000000000a')
        heaviest = [(size * MEGA, b'%d' % size) for size in sorted(sizes, reverse=True)]
        with mock.patch.multiple(sock_diag, heaviest=lambda *_: heaviest, end=end or self.ended.append):
            self.memory.look({address: sum(sizes) * MEGA, b'other' + bytes(11): MEGA}, [(self.function, self.pool)])

    def test_the_heaviest_are_ended_until_there_is_room_again(self):
        self.look([1, 9, 2, 4, 1])
        self.assertEqual([b'9'], self.ended)
        self.assertLessEqual(1 + 2 + 4 + 1, 16 * AFTER)
        text = "test: its connections take 17 MiB of the kernel's memory, and 16 MiB are allowed: ended the 1 heaviest"
        self.assertEqual(([text], []), (self.events, self.killed))

    def test_nobody_is_ended_within_the_bound(self):
        self.look([16])
        self.assertEqual(([], [], []), (self.ended, self.events, self.killed))

    def test_a_kernel_that_ends_no_connection_ends_the_instance(self):
        def end(_):
            raise OSError(errno.EOPNOTSUPP, 'not supported')

        self.look([17], end)
        self.assertEqual(["its connections take 17 MiB of the kernel's memory, and 16 MiB are allowed"], self.killed)
        with self.assertRaises(PermissionError):
            self.look([17], mock.Mock(side_effect=PermissionError))

    def test_a_small_machine_has_less(self):
        machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        self.assertEqual(machine // MACHINE_PART, TCPMemory(bounds(machine), print).most(self.pool))
        asks = spec.Spec('handler', settings={'memory': 32 << 20})
        self.pool.revision = types.SimpleNamespace(spec=asks)
        self.assertEqual(32 << 20, TCPMemory(bounds(machine), print).most(self.pool))


if __name__ == '__main__':
    unittest.main()
