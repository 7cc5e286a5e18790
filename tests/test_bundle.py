"""The limits in the OCI configuration of an instance are those that the kernel enforces."""

import json
import pathlib
import subprocess
import tempfile
import unittest
import unittest.mock

from handlers.containers import bundle
from handlers.containers.limits import Bounds
from host import apparmor
from tests import inside, lab, programs


class Limits(inside.InHost):
    @inside.inside
    def test_memory_kills_and_the_reason_says_so(self):
        with inside.prepared(inside.LIMITS._replace(memory=48 << 20)) as them:
            with inside.Expressions(them) as instance:
                instance.wait_up()
                client = instance.connect(json.dumps('len(b"x" * (200 << 20))').encode() + b'\n')
                self.assertEqual('ran out of memory (the limit is 48 MiB)', instance.wait_end())
                client.close()
            with inside.Expressions(them) as instance:
                self.assertEqual(3, instance.wait_up().value('1 + 2'))
                instance.container.kill()
                self.assertEqual('ended by SIGKILL', instance.wait_end())

    @inside.inside
    def test_processes_and_threads_are_bounded(self):
        with inside.prepared(inside.LIMITS._replace(pids=16)) as them, inside.Expressions(them) as instance:
            instance.wait_up()
            how, what = instance.eval('[subprocess.Popen(["sleep", "100"]) for _ in range(30)]')
            self.assertEqual(('OSError', 'EAGAIN'), (how, what))
            self.assertEqual(3, instance.value('1 + 2'))
            sleep = json.dumps('__import__("time").sleep(0.2)').encode() + b'\n'
            # More than there may be threads for.
            clients = [self.stack.enter_context(instance.connect(sleep)) for _ in range(4)]
            self.assertEqual([b'["ok", null]'] * 4, [inside.read_all(client) for client in clients])

    @inside.inside
    def test_cores_are_bounded(self):
        with inside.prepared(inside.LIMITS._replace(cpus=0.25)) as them, inside.Expressions(them) as instance:
            instance.wait_up()
            used, took = instance.value(
                '(lambda t, c: ([None for _ in iter(lambda: t.time() < c[0] + 0.6, False)],'
                ' (t.process_time() - c[1], t.time() - c[0]))[1])'
                '(*(lambda t: (t, (t.time(), t.process_time())))(__import__("time")))'
            )
            self.assertLess(used / took, 0.5)


class AppArmor(unittest.TestCase):
    """No kernel with AppArmor is needed."""

    SOURCE = lab.REPO / 'systemd/faas-instance.apparmor'

    def profile_of(self, loaded):
        """The profile in the configuration where these are loaded (None: there is no AppArmor)."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'profiles')
            if loaded is not None:
                path.write_text(loaded)
            with unittest.mock.patch.object(apparmor, 'PROFILES', str(path)):
                made = bundle.Configurations(Bounds(inside.LIMITS, inside.LIMITS), 'group', '/rootfs')
                config = made.shared('id', 'name', inside.SPEC, 0x70010000, 5, '/notify.sock')
        return config['process'].get('apparmorProfile')

    def test_the_profile_is_asked_for_only_where_it_is_loaded(self):
        name = apparmor.PROFILE
        self.assertEqual(name, self.profile_of(f'docker-default (enforce)\n{name} (enforce)\n'))
        for others in ('docker-default (enforce)\n', f'{name}-2 (enforce)\n', '', None):
            self.assertIsNone(self.profile_of(others))

    @lab.not_in_check
    def test_the_profile_parses(self):
        self.assertIn(f'\nprofile {apparmor.PROFILE} ', self.SOURCE.read_text())
        tree = programs.unpacked('apparmor')
        parser = [f'{tree}/sbin/apparmor_parser', '--base', f'{tree}/etc/apparmor.d', '--skip-kernel-load']
        for features in (tree / 'etc/apparmor.d/abi').iterdir():  # what the kernels of Ubuntu and of Debian can
            argv = [*parser, '--skip-cache', '--kernel-features', str(features), '--stdout', str(self.SOURCE)]
            done = subprocess.run(argv, capture_output=True)
            self.assertEqual(0, done.returncode, done.stderr)
            self.assertIn(apparmor.PROFILE.encode(), done.stdout)


if __name__ == '__main__':
    unittest.main()
