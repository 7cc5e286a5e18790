"""Limits that an instance comes up against are told, with their names: by a fake, and by a real function."""

import types
import unittest

from control.limit_watch import LimitWatch
from handlers.containers.limits import Bounds, Limits
from handlers.images.spec import Spec
from tests import lab, serving

FORKS = """
import subprocess, sys

def app(environ, start_response):
    start_response('200 OK', [])
    if environ['PATH_INFO'] == '/eat':
        code = 'x = bytearray(1 << 30)'
        return [str(subprocess.run([sys.executable, '-c', code]).returncode).encode()]
    started = []
    try:
        for _ in range(60):
            started.append(subprocess.Popen(['sleep', '5']))
    except OSError as error:
        return [type(error).__name__.encode()]
    finally:
        for each in started:
            each.kill()
            each.wait()
    return [b'all']
"""


class Watch(unittest.TestCase):
    def setUp(self):
        self.events, self.logged = [], []
        limits = Limits(64 << 20, 16, 1)
        self.watch = LimitWatch(Bounds(limits, limits), lambda area, text, **_: self.events.append(text))
        log = types.SimpleNamespace(append=self.logged.append)
        self.pool = types.SimpleNamespace(name='f', log=log, limit_reason=None, revision=None)

    def instance(self):
        class Fake:
            pool, revision, counts = self.pool, types.SimpleNamespace(spec=Spec('handler')), {'pids': 0, 'memory': 0}

            def hits(self):
                return self.counts

        return Fake()

    def test_each_is_told_once_and_forgotten_with_its_instance(self):
        instance = self.instance()
        self.pool.instances = [instance]
        for pids, told in ((0, 0), (3, 1), (3, 1)):
            instance.counts = {'pids': pids, 'memory': 0}
            self.watch.look([self.pool])
            self.assertEqual(told, len(self.events))
        self.assertEqual(
            'no process or thread more could start (pids 16): faas config f --set pids=32', self.pool.limit_reason
        )
        instance.counts = {'pids': 3, 'memory': 1}
        self.watch.look([self.pool])
        self.assertIn('ran out of memory (memory 64M): faas config f --set memory=128M', self.events[-1])
        self.assertEqual(2, len(self.logged))
        self.pool.instances = [self.instance()]
        self.watch.look([self.pool])
        self.assertIsNone(self.pool.limit_reason)


@lab.needs_root
class Told(unittest.TestCase):
    def test_a_real_function(self):
        with lab.Host('server') as host, serving.standalone(host) as server:
            toml = 'memory = "64M"\npids = 24\n'
            ipv6 = server.deploy('forks', {'handler.py': FORKS, 'faas.toml': toml}).json['ipv6']
            self.assertEqual('BlockingIOError', server.get(ipv6))
            lab.wait_until(lambda: 'pids 24' in (server.status_of('forks')['reason'] or ''), 10, 'the reason')
            self.assertEqual('-9', server.get(ipv6, '/eat'))
            lab.wait_until(lambda: 'memory 64M' in (server.status_of('forks')['reason'] or ''), 10, 'the reason')
            health = server.api('GET', '/api/health').json
            self.assertIn('forks: a process of it ran out of memory', health['problems'][0]['what'])
            log = host.run([str(lab.REPO / 'faas'), 'logs', 'forks']).stdout
            self.assertIn('[faasd] no process or thread more could start (pids 24)', log)
            server.api('POST', '/api/config/forks', {'set': {'pids': '200', 'memory': '2G'}})
            self.assertEqual(('all', '0'), (server.get(ipv6), server.get(ipv6, '/eat')))
            lab.wait_until(lambda: server.status_of('forks')['reason'] is None, 15, 'a status without reason')


if __name__ == '__main__':
    unittest.main()
