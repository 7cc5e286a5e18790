"""The monitor with a clock of the test, and its thread with real descriptors."""

import contextlib
import io
import os
import resource
import socket
import threading
import unittest

from control.monitor import Check, Monitor
from host.errors import FaasError


class Looks(unittest.TestCase):
    def setUp(self):
        self.now, self.reports = 100.0, []

    def monitor(self, *checks):
        return Monitor(list(checks), lambda area, text: self.reports.append((area, text)), clock=lambda: self.now)

    def test_each_check_has_its_period(self):
        done = []
        monitor = self.monitor(
            Check('often', lambda: done.append('often')), Check('rarely', lambda: done.append('rarely'), 5)
        )
        for _ in range(10):
            monitor.look()
            self.now += 1
        self.assertEqual((10, 2), (done.count('often'), done.count('rarely')))

    def test_what_it_raises_is_reported_and_the_next_success_takes_it_back(self):
        answers = [FaasError('it is gone'), OSError(28, 'No space left on device'), None]

        def look():
            answer = answers.pop(0)
            if answer:
                raise answer

        monitor = self.monitor(Check('wg0', look))
        for _ in range(3):
            monitor.look()
            self.now += 1
        self.assertEqual(
            [('wg0', 'it is gone'), ('wg0', '[Errno 28] No space left on device'), ('wg0', None)], self.reports
        )

    def test_one_that_knows_nothing_reports_nothing(self):
        self.monitor(Check('wg0', lambda: False)).look()
        self.assertEqual([], self.reports)

    def test_a_fault_in_one_is_a_problem_and_ends_no_other(self):
        done = []
        monitor = self.monitor(Check('bad', lambda: 1 / 0), Check('good', lambda: done.append(1)))
        with contextlib.redirect_stderr(io.StringIO()) as traceback:
            monitor.look()
        self.assertIn('ZeroDivisionError', traceback.getvalue())
        self.assertEqual('bad', self.reports[0][0])
        self.assertIn('a fault of faasd', self.reports[0][1])
        self.assertEqual([1], done)

    def test_only_a_message_that_matters_wakes(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            done = []
            monitor = self.monitor(Check('rules', lambda: done.append(1), 5, ours, lambda message: message == b'other'))
            monitor.look()
            for messages, looks in (((b'own', b'own'), 1), ((b'own', b'other'), 2), ((b'own',), 2)):
                for message in messages:
                    theirs.send(message)
                monitor.look({ours})
                self.assertEqual(looks, len(done))

    def test_a_socket_wakes_its_check_before_its_time(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            done = []
            monitor = self.monitor(Check('rules', lambda: done.append('rules'), 5, ours))
            monitor.look()
            monitor.look()
            self.assertEqual(1, len(done))
            theirs.send(b'changed')
            monitor.look({ours})
            self.assertEqual(2, len(done))
            self.assertRaises(BlockingIOError, ours.recv, 1, socket.MSG_DONTWAIT)


class Thread(unittest.TestCase):
    def test_it_lives_and_is_woken_where_descriptors_are_beyond_1024(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limits[1] != resource.RLIM_INFINITY and limits[1] < 1300:
            self.fail(f'this test needs 1300 descriptors; ulimit -n allows {limits[1]}')
        resource.setrlimit(resource.RLIMIT_NOFILE, (1300, limits[1]))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for fd in [os.open('/dev/null', os.O_RDONLY) for _ in range(1100)]:
            self.addCleanup(os.close, fd)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.assertGreater(ours.fileno(), 1024)
        looked = threading.Semaphore(0)
        with ours, theirs:
            monitor = Monitor([Check('rules', looked.release, 3600, ours)], lambda area, text: None)
            monitor.start()
            try:
                self.assertTrue(looked.acquire(timeout=5), 'the first look')
                theirs.send(b'changed')
                self.assertTrue(looked.acquire(timeout=5), 'the look that the socket asked for')
            finally:
                monitor.stop()
        self.assertFalse(monitor.thread.is_alive())


if __name__ == '__main__':
    unittest.main()
