"""Runs the tests: `python3 -m tests [--check] [--strict] [NAME…]`; NAME is test_lab, test_lab.Hosts or one test of it.

Without names all of them. --check: only those that need neither root nor installed programs. --strict: a skip whose
reason is not in skips.txt is a failure. A test that leaves a ResourceWarning is always one; with `-X tracemalloc=5`
it tells where the thing was made. The last line is `N passed, N failed`, and the exit status 1 when one failed.
"""
import argparse
import collections
import gc
import os
import pathlib
import re
import signal
import sys
import time
import tracemalloc
import unittest
import warnings

HERE = pathlib.Path(__file__).resolve().parent
SKIPS = HERE / 'skips.txt'


class Result(unittest.TextTestResult):
    """Counts each test once, whatever its subtests say, and keeps how long it took.

    `warned` is the list that warnings.catch_warnings(record=True) fills.
    """

    def __init__(self, *args, warned, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {}
        self._warned, self._last = warned, None

    def startTest(self, test):
        self._take_warnings()                       # of what stands between two tests: a class, a module
        self._last = test
        self.seconds[test.id()] = -time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        self.seconds.setdefault(test.id(), -time.monotonic())      # Python 3.12.1 starts no test that is skipped
        self.seconds[test.id()] += time.monotonic()
        super().stopTest(test)
        self._take_warnings()

    def stopTestRun(self):
        self._take_warnings()
        super().stopTestRun()

    def _take_warnings(self):
        """Show what warned since the last call. A ResourceWarning is an error of the test that ran last."""
        gc.collect()
        taken, self._warned[:] = self._warned[:], []
        for each in taken:
            text = warnings.formatwarning(each.message, each.category, each.filename, each.lineno)
            if each.source is not None and (made := tracemalloc.get_object_traceback(each.source)):
                text += '\n'.join(['made at:', *made.format()])
            if issubclass(each.category, ResourceWarning):
                self.addError(self._last, (ResourceWarning, ResourceWarning(f'left open: {text}'), None))
            else:
                self.stream.writeln(text)

    def counts(self):
        """(passed, failed, skipped)"""
        broken = {getattr(test, 'test_case', test).id() for test, _ in self.failures + self.errors}
        broken.update(test.id() for test in self.unexpectedSuccesses)
        skipped = {getattr(test, 'test_case', test).id() for test, _ in self.skipped} - broken
        return len(self.seconds.keys() - broken - skipped), len(broken), len(skipped)


class Runner(unittest.TextTestRunner):
    """Runs a suite with a Result, to which every warning goes."""

    def run(self, tests):
        # The super class would show each warning once for each line; the second test of that line is as guilty.
        with warnings.catch_warnings(record=True) as self._warned:
            return super().run(tests)

    def _makeResult(self):
        return Result(self.stream, self.descriptions, self.verbosity, warned=self._warned)


def load(names):
    """The tests of those names, or all. A name may be a path too: tests/test_lab.py."""
    loader = unittest.TestLoader()
    if not names:
        return loader.discover(str(HERE), top_level_dir=str(HERE.parent))
    names = [name.removesuffix('.py').replace('/', '.').removeprefix('tests.') for name in names]
    return loader.loadTestsFromNames([f'tests.{name}' for name in names])


def flat(suite):
    for each in suite:
        if isinstance(each, unittest.TestSuite):
            yield from flat(each)
        else:
            yield each


def in_check(test):
    """Whether no lab.not_in_check, lab.needs_root is on it or on its class."""
    method = getattr(test, test._testMethodName)
    return getattr(method, 'in_check', True) and getattr(test, 'in_check', True)


def unlisted(reasons):
    """Those of these reasons to skip that no line of skips.txt, a regular expression, matches."""
    lines = [line.partition('#')[0].strip() for line in SKIPS.read_text().splitlines()]
    return [reason for reason in reasons if not any(re.search(line, reason) for line in lines if line)]


def run(suite, strict=False):
    """Run these tests and print what came of them; the exit status."""
    gc.freeze()                                     # what is loaded needs no look after each test
    result = Runner(sys.stdout, verbosity=2, warnings='always').run(suite)
    slowest = sorted(result.seconds.items(), key=lambda each: -each[1])[:20]
    print('\nslowest:', *(f'{seconds:7.2f} s  {name}' for name, seconds in slowest), sep='\n')
    reasons = collections.Counter(reason for _, reason in result.skipped)
    refused = unlisted(reasons) if strict else ()
    result.failures += [(test, reason) for test, reason in result.skipped if reason in refused]
    passed, failed, skipped = result.counts()
    print()
    for reason, count in reasons.most_common():
        why = f', which is a failure: {SKIPS.name} does not list this reason' if reason in refused else ''
        print(f'skipped {count}{why}: {" ".join(reason.split())}')
    print(f'{passed} passed, {failed} failed' + (f', {skipped} skipped' if skipped else ''))
    return 1 if failed or not passed else 0


def main(argv):
    parser = argparse.ArgumentParser(prog='python3 -m tests', description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='what needs neither root nor installed programs')
    parser.add_argument('--strict', action='store_true', help='a skip whose reason is not in skips.txt is a failure')
    parser.add_argument('names', nargs='*', metavar='NAME')
    asked = parser.parse_args(argv)
    os.chdir(HERE.parent)
    sys.path.insert(0, str(HERE.parent))
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in a shell's background has it ignored
    sys.stderr = sys.stdout                         # in order, also in a file
    suite = load(asked.names)
    if asked.check:
        suite = unittest.TestSuite(filter(in_check, flat(suite)))
    return run(suite, asked.strict)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
