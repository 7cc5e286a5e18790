"""Runs the tests: `python3 -m tests [NAME…]`, where a name is test_lab, test_lab.Hosts or test_lab.Hosts.test_…

Without names all of them. The last line is `N passed, N failed`, and the exit status 1 when one failed.
"""
import os
import pathlib
import sys
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent


class Result(unittest.TextTestResult):
    """Counts each test once, whatever its subtests say, and keeps how long it took."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds = {}

    def startTest(self, test):
        self.seconds[test.id()] = -time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        self.seconds[test.id()] += time.monotonic()
        super().stopTest(test)

    def counts(self):
        """(passed, failed, skipped)"""
        broken = {getattr(test, 'test_case', test).id() for test, _ in self.failures + self.errors}
        broken.update(test.id() for test in self.unexpectedSuccesses)
        skipped = {getattr(test, 'test_case', test).id() for test, _ in self.skipped} - broken
        return len(self.seconds.keys() - broken - skipped), len(broken), len(skipped)


def load(names):
    """The tests of those names, or all. A name may be a path too: tests/test_lab.py."""
    loader = unittest.TestLoader()
    if not names:
        return loader.discover(str(HERE), top_level_dir=str(HERE.parent))
    names = [name.removesuffix('.py').replace('/', '.').removeprefix('tests.') for name in names]
    return loader.loadTestsFromNames([f'tests.{name}' for name in names])


def main(names):
    os.chdir(HERE.parent)
    sys.path.insert(0, str(HERE.parent))
    sys.stderr = sys.stdout                         # in order, also in a file
    runner = unittest.TextTestRunner(sys.stdout, verbosity=2, resultclass=Result, warnings='default')
    result = runner.run(load(names))
    slowest = sorted(result.seconds.items(), key=lambda each: -each[1])[:5]
    print('\nslowest:', *(f'{seconds:7.2f} s  {name}' for name, seconds in slowest), sep='\n')
    passed, failed, skipped = result.counts()
    print(f'\n{passed} passed, {failed} failed' + (f', {skipped} skipped' if skipped else ''))
    return 1 if failed or not passed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
