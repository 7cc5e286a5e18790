"""Calls, timers and descriptors are served in turn, and a fault in one is not the others'."""

import os
import unittest
import unittest.mock

from handlers.serving.loop import Loop
from tests import lab


class LoopTest(unittest.TestCase):
    def test_calls_timers_and_faults(self):
        loop, seen = Loop(), []
        try:
            loop.call(loop.later, 0.02, seen.append, 'later')
            loop.call(seen.append, 'call')
            with unittest.mock.patch('traceback.print_exc') as printed:
                loop.call(lambda: 1 / 0)
                lab.wait_until(lambda: len(seen) == 2, 5, 'the timer')
            self.assertEqual(['call', 'later'], seen)
            printed.assert_called_once()
        finally:
            loop.stop()

    def test_wait_returns_and_raises_what_the_call_did(self):
        loop = Loop()
        try:
            self.assertEqual(3, loop.wait(lambda a, b: a + b, 1, 2))
            with self.assertRaises(ZeroDivisionError):
                loop.wait(lambda: 1 / 0)
            self.assertEqual(1, loop.wait(int, 1))
        finally:
            loop.stop()

    def test_a_descriptor_that_one_of_its_round_unwatched_is_not_served(self):
        loop, seen = Loop(), []
        pipes = [os.pipe() for _ in range(2)]
        readers = [reader for reader, _ in pipes]

        def readable(mine):
            seen.append(mine)
            for reader in readers:
                loop.unwatch(reader)

        def begin():
            for reader, writer in pipes:
                os.write(writer, b'x')
                loop.watch(reader, lambda reader=reader: readable(reader))

        try:
            loop.wait(begin)
            lab.wait_until(lambda: seen, 5, 'one of them')
            loop.wait(int)
            self.assertEqual(1, len(seen))
        finally:
            loop.stop()
            for pair in pipes:
                for fd in pair:
                    os.close(fd)


if __name__ == '__main__':
    unittest.main()
