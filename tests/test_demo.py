"""The demo leaves nothing behind when it is interrupted, killed, or when a step goes wrong."""
import os
import pathlib
import signal
import subprocess
import sys
import unittest
import uuid

from tests import demo, lab


def processes(marker):
    """Those with `marker` in their environment: a program that the demo started, in whichever host."""
    found = []
    for environ in pathlib.Path('/proc').glob('[0-9]*/environ'):
        try:
            if marker.encode() in environ.read_bytes():
                found.append(environ.parent.joinpath('cmdline').read_bytes())
        except OSError:
            continue                                # gone meanwhile
    return found


@lab.needs_root
class Endings(unittest.TestCase):
    def setUp(self):
        self.marker = f'LAB_MARKER={uuid.uuid4()}'
        self.before = demo.machine(), lab.faas_cgroups()

    def start(self, code='demo.main()'):
        key, _, value = self.marker.partition('=')
        process = subprocess.Popen([sys.executable, '-c', f'import sys; from tests import demo; sys.exit({code})'],
                                   cwd=lab.REPO, env={**os.environ, key: value}, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def read_until(self, process, text):
        for line in process.stdout:
            if text in line:
                return
        self.fail(f'the demo ended without: {text}\n{process.stderr.read()}')

    def assert_nothing_remains(self):
        lab.wait_until(lambda: not processes(self.marker), 20, 'the end of all that the demo started')
        lab.wait_until(lambda: lab.faas_cgroups() <= self.before[1], 20, 'the end of its cgroups')
        self.assertEqual(self.before[0], demo.machine())

    def test_ctrl_c(self):
        process = self.start()
        self.read_until(process, 'Created interface wg-faas')
        self.assertTrue(processes(self.marker))
        os.killpg(process.pid, signal.SIGINT)       # as a terminal does
        self.assertEqual(130, process.wait(30), process.stderr.read())
        self.assert_nothing_remains()

    def test_kill_9(self):
        process = self.start()
        self.read_until(process, 'Deployed fibonacci')
        process.kill()
        process.wait()
        self.assert_nothing_remains()

    def test_a_failed_step(self):
        process = self.start('setattr(demo, "ANSWER", "42") or demo.main()')
        _, error = process.communicate(timeout=60)
        self.assertIn("`curl 'http://fibonacci.faas/?n=10'` did not show: 42", error)
        self.assertEqual(1, process.returncode)
        self.assert_nothing_remains()
