"""What instances print: kept in order, in files of limited size, without a wait for the disk."""

import os
import tempfile
import threading
import unittest
import unittest.mock

from handlers.containers import logs


class Output(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, 'log')
        self.log = logs.Log(self.path)

    def test_the_last_lines_are_whole_and_in_order(self):
        self.assertEqual(b'', self.log.last(5))
        for number in range(10):
            self.log.append(b'line %d\n' % number)
        self.assertEqual(b'line 8\nline 9\n', self.log.last(2))
        self.log.append(b'unfinished')
        self.assertEqual(b'line 9\nunfinished', self.log.last(2))
        self.assertEqual(11, len(self.log.last(100).splitlines()))

    def test_it_is_bounded_and_the_older_part_is_read_too(self):
        chunk = b'x' * 1023 + b'\n'
        for _ in range(3 * logs.LOG_LIMIT // 1024):
            self.log.append(chunk)
        self.log.append(b'last\n')
        files = [
            os.path.getsize(os.path.join(os.path.dirname(self.path), name))
            for name in os.listdir(os.path.dirname(self.path))
        ]
        self.assertEqual(2, len(files))
        self.assertLessEqual(sum(files), 2 * logs.LOG_LIMIT + 2048)
        self.assertEqual(chunk + b'last\n', self.log.last(2))

    def test_a_disk_that_refuses_is_not_the_instances_trouble(self):
        logs.Log('/no/such/folder/log').append(b'x')
        self.assertEqual(b'', logs.Log('/no/such/folder/log').last(5))

    def pipe(self):
        copier = logs.LogCopier()
        pipe = logs.LogPipe(self.log)
        copier.add(pipe)
        return pipe

    def test_a_line_that_comes_again_and_again_is_counted(self):
        pipe = self.pipe()
        for data in (b'begin\n', b'fail', b'ed\n', *[b'failed\n' * 100] * 10, b'other\nother\nunfinished'):
            os.write(pipe.writer, data)
        os.write(pipe.writer, b' line\n' + b'x\n' * 5)
        pipe.close_writer()
        pipe.wait()
        expected = b'begin\n' + b'failed\n' * 3 + b'[faasd] the line above came 998 times more\n'
        expected += b'other\nother\nunfinished line\n' + b'x\n' * 3 + b'[faasd] the line above came 2 times more\n'
        self.assertEqual(expected, self.log.last(100))

    def test_what_an_instance_writes_is_in_the_log_and_its_tail_at_hand(self):
        pipe = self.pipe()
        for number in range(50):
            os.write(pipe.writer, b'line %d\n' % number)
        os.write(pipe.writer, b'end\xff')
        pipe.close_writer()
        pipe.wait()
        lines = [f'line {number}' for number in range(50)] + ['end\ufffd']
        self.assertEqual(lines[-logs.TAIL_LINES - 1 :], pipe.tail())
        self.assertEqual(b'line 49\nend\xff', self.log.last(2))

    def test_a_copy_of_the_reading_end_in_a_child_does_not_end_the_copier(self):
        pipe = self.pipe()
        held = os.dup(pipe.reader)  # as a child has between its fork and its exec
        self.addCleanup(os.close, held)
        pipe.close_writer()
        pipe.wait()
        with unittest.mock.patch.object(threading, 'excepthook') as fault:
            again = self.pipe()
            os.write(again.writer, b'after\n')
            again.close_writer()
            again.wait()
        fault.assert_not_called()
        self.assertEqual(['after'], again.tail())

    def test_a_line_without_end_takes_no_more_memory(self):
        pipe = self.pipe()
        for _ in range(64):
            os.write(pipe.writer, b'x' * 65536)
        pipe.close_writer()
        pipe.wait()
        self.assertLessEqual(sum(map(len, pipe.tail())), 2 * logs.LINE_LIMIT)

    def test_many_writers_at_once_leak_no_descriptor(self):
        pipe = self.pipe()
        pipe.close_writer()
        pipe.wait()
        before = len(os.listdir('/proc/self/fd'))
        copier = logs.LogCopier()

        def one():
            mine = logs.LogPipe(self.log)
            copier.add(mine)
            os.write(mine.writer, b'text\n')
            mine.close_writer()
            mine.wait()

        threads = [threading.Thread(target=one) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertLessEqual(len(os.listdir('/proc/self/fd')), before + 1)  # the second copier's own
        self.assertEqual(50, self.log.last(100).count(b'text\n'))


if __name__ == '__main__':
    unittest.main()
