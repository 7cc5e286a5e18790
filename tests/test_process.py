"""Programs are run as asked, their failures say why, and processes are told from others of the same number."""

import ctypes
import errno
import os
import pathlib
import signal
import tempfile
import unittest
from unittest import mock

from host import process, systemd
from tests import inside, lab

PR_SET_CHILD_SUBREAPER = 36


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)


class Run(InFolder):
    def test_text_goes_in_and_comes_out(self):
        self.assertEqual('grüße\n', process.run(['cat'], input='grüße\n').stdout)
        with open('/dev/zero') as zero:
            self.assertEqual('\0\0', process.run(['head', '-c2'], stdin=zero).stdout)
        self.assertEqual('', process.run(['cat']).stdout)

    def test_an_exit_code_that_is_not_ok_is_an_error_that_has_everything(self):
        argv = ['sh', '-c', 'echo out; echo first >&2; echo why >&2; exit 3']
        with self.assertRaises(process.CommandError) as caught:
            process.run(argv)
        error = caught.exception
        self.assertEqual(
            (argv, 3, 'out\n', 'first\nwhy\n', 'why'),
            (error.argv, error.exit_code, error.stdout, error.stderr, error.reason),
        )
        self.assertEqual('sh: why', str(error))
        self.assertEqual(3, process.run(argv, ok=(0, 3)).returncode)

    def test_a_silent_failure_is_told_by_its_exit_code(self):
        with self.assertRaisesRegex(process.CommandError, 'sh: exit code 7'):
            process.run(['sh', '-c', 'exit 7'])

    def test_a_missing_program_is_named_with_what_installs_it(self):
        for start in (process.run, process.start):
            with self.assertRaisesRegex(process.CommandError, 'no-such-program: not installed .make deps') as caught:
                start(['no-such-program'])
            self.assertIsNone(caught.exception.exit_code)

    def test_one_that_is_too_slow_is_ended(self):
        mark = self.folder / 'pid'
        with self.assertRaisesRegex(process.CommandError, 'no end after 0.3 s'):
            process.run(['sh', '-c', f'echo $$ >{mark}; exec sleep 1000'], timeout_s=0.3)
        self.assertFalse(os.path.exists(f'/proc/{mark.read_text().strip()}'))

    def test_output_that_is_no_utf_8_is_no_error(self):
        self.assertEqual('a\ufffdb', process.run(['printf', r'a\377b']).stdout)


class Start(InFolder):
    def test_it_has_a_session_of_its_own_and_its_output_can_be_read(self):
        with process.start(
            ['sh', '-c', 'echo $MORE; echo err >&2; exec sleep 1000'], output=True, MORE='seen'
        ) as child:
            self.assertEqual([b'seen\n', b'err\n'], [child.stdout.readline(), child.stdout.readline()])
            self.assertEqual(child.pid, os.getsid(child.pid))
            child.terminate()
            self.assertEqual(-signal.SIGTERM, child.wait(5))


class RunWithFds(InFolder):
    def test_it_gets_just_those_at_their_numbers(self):
        with open(self.folder / 'out', 'w+b') as out, open('/dev/zero') as zero:
            fds = {1: out.fileno(), 7: zero.fileno()}
            code = process.run_with_fds(['sh', '-c', 'for fd in /proc/self/fd/*; do readlink $fd; done; exit 5'], fds)
            out.seek(0)
            seen = out.read().decode().split('\n')
        self.assertEqual(5, code)
        self.assertEqual(1, seen.count('/dev/zero'))
        self.assertIn('/dev/null', seen)
        self.assertNotIn('/dev/zero', [os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 1, 2)])

    def test_a_number_may_be_the_one_it_has_here(self):
        reader, writer = os.pipe()
        try:
            echo = ['sh', '-c', f'echo here >/proc/self/fd/{writer}']
            self.assertEqual(0, process.run_with_fds(echo, {writer: writer}))
            self.assertEqual(b'here\n', os.read(reader, 100))
        finally:
            os.close(reader)
            os.close(writer)

    def test_what_it_forked_and_left_is_reaped(self):
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.addCleanup(libc.prctl, PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        self.assertEqual(0, process.run_with_fds(['sh', '-c', '{ sleep 0.01; exit 3; } & exit 0'], {}))
        with self.assertRaises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_a_death_by_signal_and_a_missing_program_are_told(self):
        self.assertEqual(-signal.SIGKILL, process.run_with_fds(['sh', '-c', 'kill -9 $$'], {}))
        with self.assertRaisesRegex(process.CommandError, 'not installed'):
            process.run_with_fds(['no-such-program'], {})

    def test_one_that_is_too_slow_is_ended_and_nothing_leaks(self):
        before = os.listdir('/proc/self/fd')
        with self.assertRaisesRegex(process.CommandError, 'no end'):
            process.run_with_fds(['sleep', '1000'], {}, timeout_s=0.2)
        self.assertEqual(before, os.listdir('/proc/self/fd'))


class End(unittest.TestCase):
    def test_a_process_is_gone_afterwards_also_one_that_ignores_sigterm(self):
        for ignore in ('', 'trap "" TERM;'):
            with process.start(['sh', '-c', f'{ignore} echo on; while :; do sleep 0.1; done'], output=True) as child:
                self.assertEqual(b'on\n', child.stdout.readline())
                self.assertTrue(process.end(child.pid, process.start_time(child.pid), timeout_s=0.3))
                self.assertEqual(signal.SIGKILL if ignore else signal.SIGTERM, -child.wait(0))

    def test_another_process_of_that_number_is_left_alone(self):
        with process.start(['sleep', '1000']) as child:
            self.assertFalse(process.end(child.pid, process.start_time(child.pid) - 1))
            self.assertIsNone(child.poll())
            child.kill()
        self.assertFalse(process.end(child.pid, 1))


class Finish(unittest.TestCase):
    def test_a_child_is_ended_and_reaped_also_without_a_descriptor_and_one_that_ignores_sigterm(self):
        for ignore in ('', 'trap "" TERM;'):
            with process.start(['sh', '-c', f'{ignore} echo on; while :; do sleep 0.1; done'], output=True) as child:
                self.assertEqual(b'on\n', child.stdout.readline())
                try:
                    with inside.no_descriptor_left():
                        process.finish(child, timeout_s=0.3)
                except BaseException:
                    child.kill()
                    raise
                self.assertEqual(signal.SIGKILL if ignore else signal.SIGTERM, -child.returncode)
            process.finish(child)  # it has ended by itself


class NoDescriptorLeft(unittest.TestCase):
    """What cannot be told is an error, and no answer."""

    def raises(self, function, *args):
        with inside.no_descriptor_left(), self.assertRaises(OSError) as caught:
            function(*args)
        self.assertEqual(errno.EMFILE, caught.exception.errno)

    def test_a_process_that_lives_is_not_taken_for_another(self):
        self.raises(process.start_time, os.getpid())
        with process.start(['sleep', '1000']) as child:
            try:
                self.raises(process.end, child.pid, process.start_time(child.pid))
                self.assertIsNone(child.poll())
            finally:
                child.kill()

    def test_a_process_that_nobody_could_wait_for_is_not_left(self):
        with mock.patch.object(os, 'pidfd_open', side_effect=OSError(errno.EMFILE, 'Too many open files')):
            self.assertRaises(OSError, process.run_with_fds, ['sleep', '30'], {})
        with self.assertRaises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_a_thread_that_lives_is_not_taken_for_one_of_an_older_kernel(self):
        with mock.patch.object(process, 'process_of', side_effect=AssertionError):
            self.raises(process.copy_of, os.getpid(), 0)

    def test_an_end_whose_reason_cannot_be_told_is_no_restart(self):
        with mock.patch.dict(os.environ, {'NOTIFY_SOCKET': '/run/no-such'}):
            with inside.no_descriptor_left():
                self.assertFalse(systemd.is_restart())
            os.environ['PATH'] = '/nowhere'
            self.assertFalse(systemd.is_restart())


class StartTime(unittest.TestCase):
    def test_it_tells_a_process_from_a_later_one_and_is_none_for_none(self):
        mine = process.start_time(os.getpid())
        self.assertEqual(mine, process.start_time(os.getpid()))
        with process.start(['sleep', '1000']) as child:
            self.assertGreaterEqual(process.start_time(child.pid), mine)
            child.kill()
        self.assertIsNone(process.start_time(child.pid))

    def test_a_name_with_brackets_and_blanks_does_not_confuse_it(self):
        with tempfile.TemporaryDirectory() as folder:
            program = pathlib.Path(folder, 'a) S 1 (b')
            program.symlink_to('/bin/sleep')
            with process.start([str(program), '1000']) as child:
                stat_file = pathlib.Path(f'/proc/{child.pid}/stat')
                lab.wait_until(lambda: b'a) S 1 (b' in stat_file.read_bytes(), 5, 'exec')
                self.assertGreaterEqual(process.start_time(child.pid), process.start_time(os.getpid()))
                child.kill()


if __name__ == '__main__':
    unittest.main()
