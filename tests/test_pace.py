"""How long a client may keep a thread waiting."""

import io
import socket
import threading
import time
import unittest
from unittest import mock

from handlers.containers import pace, runtime


class Paced(unittest.TestCase):
    def setUp(self):
        for name, value in (('GRACE_S', 0.4), ('RATE', 5000), ('LOOK_S', 0.05)):
            self.enterContext(mock.patch.object(pace, name, value))
        listener = self.enterContext(socket.create_server(('::1', 0), family=socket.AF_INET6))
        self.peer = self.enterContext(socket.create_connection(listener.getsockname()[:2]))
        accepted, _ = listener.accept()
        self.client = pace.Client(socket.AF_INET6, socket.SOCK_STREAM, fileno=accepted.detach())
        self.addCleanup(self.client.close)
        self.client.left_s = pace.GRACE_S
        self.file = self.enterContext(self.client.makefile('rb', -1))

    def drip(self, data, pause_s):
        def run():
            for number in range(len(data)):
                self.peer.sendall(data[number : number + 1])
                time.sleep(pause_s)

        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)

    def test_what_drips_is_given_up_and_what_comes_in_time_is_read(self):
        self.client.owes = lambda: True
        self.drip(b'x' * 30, 0.05)
        began = time.monotonic()
        with self.assertRaises(pace.TooSlow):
            self.file.read(1000)
        self.assertLess(time.monotonic() - began, 1)
        self.client.refuse()
        self.assertEqual(pace.TIMEOUT, self.peer.recv(4096))

    def test_a_slow_client_that_makes_progress_is_read_to_its_end(self):
        self.client.owes = lambda: True
        data = bytes(1000)

        def send():
            for _ in range(10):
                self.peer.sendall(data)  # 10,000 bytes a second
                time.sleep(0.1)

        thread = threading.Thread(target=send)
        thread.start()
        self.assertEqual(10 * data, self.file.read(10000))
        thread.join()
        self.client.refuse()
        self.peer.setblocking(False)
        self.assertRaises(BlockingIOError, self.peer.recv, 1)

    def test_who_owes_nothing_may_be_silent(self):
        for owes in (None, lambda: False):
            self.client.owes = owes
            threading.Timer(0.6, self.peer.sendall, [b'late\n']).start()
            self.assertEqual(b'late\n', self.file.readline())

    def test_time_outs_of_the_function_itself_count_too(self):
        self.client.owes = lambda: True
        self.client.settimeout(0.1)
        with self.assertRaisesRegex(TimeoutError, 'timed out'):
            self.file.read(1)
        self.assertFalse(self.client.late)
        self.client.setblocking(False)
        self.assertIsNone(self.client.makefile('rb', -1).peek(1) or None)

    def test_who_does_not_read_is_reset(self):
        began = time.monotonic()
        with self.assertRaises(pace.TooSlow):
            self.client.sendall(bytes(64 << 20))
        self.assertLess(time.monotonic() - began, 3)
        self.file.close()
        self.client.close()
        with self.assertRaises(ConnectionResetError):
            while self.peer.recv(1 << 20):
                pass

    def test_who_reads_slowly_gets_everything(self):
        data, got = memoryview(bytes(range(256)) * 16384).cast('I'), io.BytesIO()

        def read():
            while chunk := self.peer.recv(65536):
                got.write(chunk)
                time.sleep(0.005)

        thread = threading.Thread(target=read)
        thread.start()
        self.client.sendall(data)
        self.client.shutdown(socket.SHUT_WR)
        thread.join()
        self.assertEqual(data.tobytes(), got.getvalue())


class Shares(unittest.TestCase):
    def test_one_client_leaves_threads_to_the_next(self):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        its = runtime.Runtime(ours)
        its._address = lambda number: number[0]
        gone = threading.Event()
        served = []

        def serve(number, fd):
            served.append(number)
            gone.wait(10)

        its._serve = serve
        its._lock = threading.Lock()
        threads = []
        for number in [('a', each) for each in range(40)] + [('b', each) for each in range(40)] + [('c', 0)]:
            threads.append(threading.Thread(target=its._step, args=(number, None)))
            threads[-1].start()
            threads[-1].join(0.01)
        names = [name for name, _ in served]
        self.assertEqual(runtime.MOST_THREADS * 3 // 4, names.count('a'))
        self.assertGreaterEqual(names.count('b'), 5)
        self.assertIn('c', names)
        gone.set()
        for each in threads:
            each.join()
        self.assertEqual(81, len(served))
        self.assertEqual(({}, []), (its._serving, its._deferred))


if __name__ == '__main__':
    unittest.main()
