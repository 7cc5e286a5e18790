"""The runner of the tests: what it counts, what it refuses, and that `make check` needs nothing but Python."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest
from unittest import mock

from tests import __main__ as runner
from tests import inside, lab

# What the tests in `make check` may use of Debian beside Python. dpkg calls the packages with these Essential.
ESSENTIAL = ('cat', 'cp', 'head', 'printf', 'readlink', 'rm', 'sh', 'sleep')
NOBODY = ('setpriv', f'--reuid={inside.NOBODY}', f'--regid={inside.NOBODY}', '--clear-groups')


def leak():
    """Leave an open file behind in a circle, which only the garbage collector finds."""
    circle = [open('/dev/null')]
    circle.append(circle)


class Inner:
    """Tests for the runner, in a class of another kind so that nobody else finds them."""

    class Skipping(unittest.TestCase):
        def test_1(self):
            self.skipTest('no moon')

        @unittest.skip('no sun (tonight)')
        def test_2(self):
            pass

        def test_3(self):
            self.skipTest('no moon')

    class Leaking(unittest.TestCase):
        def test_1(self):
            leak()

        def test_2(self):
            leak()

        def test_3(self):
            pass

    class LeakingAtItsEnd(unittest.TestCase):
        @classmethod
        def tearDownClass(cls):
            leak()

        def test_1(self):
            pass

    class Passing(unittest.TestCase):
        def test_1(self):
            pass

    class Marked(unittest.TestCase):
        def test_1(self):
            pass

        @lab.not_in_check
        def test_2(self):
            pass


def run(*classes, **options):
    """(exit status, lines that were printed) of the tests in these classes."""
    suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, classes))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = runner.run(suite, **options)
    return status, out.getvalue().splitlines()


class Counting(unittest.TestCase):
    def test_skips_are_told_by_reason(self):
        status, lines = run(Inner.Skipping, Inner.Passing)
        self.assertEqual(['skipped 2: no moon', 'skipped 1: no sun (tonight)'], lines[-3:-1])
        self.assertEqual((0, '1 passed, 0 failed, 3 skipped'), (status, lines[-1]))

    def test_strict_refuses_reasons_that_are_not_listed(self):
        with tempfile.TemporaryDirectory() as folder:
            skips = pathlib.Path(folder, 'skips.txt')
            skips.write_text('# comment: moon\n\nno sun  # at night\n')
            with mock.patch.object(runner, 'SKIPS', skips):
                status, lines = run(Inner.Skipping, strict=True)
        self.assertEqual(
            [
                'skipped 2, which is a failure: skips.txt does not list this reason: no moon',
                'skipped 1: no sun (tonight)',
                '0 passed, 2 failed, 1 skipped',
            ],
            lines[-3:],
        )
        self.assertEqual(1, status)

    def test_each_test_that_leaves_a_resource_warning_fails(self):
        status, lines = run(Inner.Leaking)
        self.assertEqual((1, '1 passed, 2 failed'), (status, lines[-1]))
        self.assertEqual(2, sum('ResourceWarning: unclosed file' in line for line in lines))

    def test_a_class_that_leaves_one_fails_with_its_last_test(self):
        for classes in (Inner.LeakingAtItsEnd, Inner.Passing), (Inner.Passing, Inner.LeakingAtItsEnd):
            with self.subTest(classes):
                status, lines = run(*classes)
                self.assertEqual((1, '1 passed, 1 failed'), (status, lines[-1]))
                self.assertIn('ERROR: test_1 (tests.test_main.Inner.LeakingAtItsEnd.test_1)', lines)


class InAHost(inside.InHost):
    def test_a_resource_warning_there_arrives_here(self):
        with self.assertWarnsRegex(ResourceWarning, "in server: unclosed file .*'/dev/null'"):
            inside.call(self.host, leak)


class Check(unittest.TestCase):
    def test_marked_tests_are_left_out(self):
        suites = map(unittest.defaultTestLoader.loadTestsFromTestCase, (Inner.Marked, Inner.Passing, InAHost))
        kept = [test.id().partition('Inner.')[2] for test in runner.flat(suites) if runner.in_check(test)]
        self.assertEqual(['Marked.test_1', 'Passing.test_1'], kept)

    @lab.needs_root
    def test_it_needs_neither_root_nor_programs(self):
        """Of a copy, since nobody may not see into every checkout; with Debian's Python, since so it is with root's."""
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            programs, clone = pathlib.Path(folder, 'bin'), pathlib.Path(folder, 'clone')
            programs.mkdir()
            for name in ('python3', *ESSENTIAL):
                (programs / name).symlink_to(f'/usr/bin/{name}')
            left_out = shutil.ignore_patterns('.git', '.venv*', '.*_cache', '__pycache__')
            shutil.copytree(lab.REPO, clone, ignore=left_out)
            command = [*NOBODY, 'env', '-i', f'PATH={programs}', 'HOME=/nonexistent', 'LANG=C.UTF-8']
            command += ['python3', '-B', '-m', 'tests', '--check']
            done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
        self.assertEqual(0, done.returncode, done.stdout[-5000:] + done.stderr)
        self.assertRegex(done.stdout.splitlines()[-1], re.compile(r'^[2-9]\d\d passed, 0 failed$'))


if __name__ == '__main__':
    unittest.main()
