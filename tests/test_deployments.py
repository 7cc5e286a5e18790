"""What a function wants, by flags, by its folder and by `faas config`, on a real server."""

import threading
import unittest

from control.deployments import Change
from handlers.images import wants
from tests import lab, serving

ENVIRONMENT = """
import os

def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [' '.join(f'{key}={os.environ.get(key)}' for key in 'AB').encode()]
"""


class Changes(unittest.TestCase):
    def test_what_is_set_and_unset(self):
        change = Change({'memory': '64M', 'env.A': 'x'}, ['env.B', 'pids'])
        config = {'pids': 9, 'env': {'B': 'y', 'C': 'z'}}
        self.assertEqual({'memory': 64 << 20, 'env': {'A': 'x', 'C': 'z'}}, change.of(config))
        with self.assertRaisesRegex(wants.BadWant, "the flags: 'env.B' is not set"):
            change.of({})
        with self.assertRaisesRegex(wants.BadWant, "the flags: there is no setting 'x'"):
            Change({'x': '1'})


@lab.needs_root
class Config(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_MEMORY_MAX='512M'))

    def faas(self, *words, ok=(0,)):
        return self.host.run([str(lab.REPO / 'faas'), *words], ok=ok)

    def folder(self, files):
        folder = f'/tmp/{self.id().rpartition(".")[2][:20]}'
        self.host.path(folder).mkdir()
        for name, text in files.items():
            self.host.path(f'{folder}/{name}').write_text(text)
        return folder

    def rows(self, name):
        return {row['key']: (row['value'], row['from']) for row in self.server.api('GET', f'/api/config/{name}').json}

    def ask(self, ipv6):
        return self.server.get(ipv6)

    def test_flags_stay_and_a_change_loses_no_request(self):
        files = {'handler.py': ENVIRONMENT, 'faas.toml': 'memory = "100M"\n[env]\nA = "folder"\nB = "folder"\n'}
        folder = self.folder(files)
        self.faas('new', 'app', folder, '--env', 'A=flag', '--cpus', '0.5')
        ipv6 = self.server.api('GET', '/api/ip/app').json['ipv6']
        self.assertEqual('A=flag B=folder', self.ask(ipv6))
        rows = self.rows('app')
        self.assertEqual(('flag', 'flags'), rows['env.A'])
        self.assertEqual(('folder', 'the folder'), rows['env.B'])
        self.assertEqual((('100M', 'the folder'), ('0.5', 'flags')), (rows['memory'], rows['cpus']))
        self.assertEqual('the server', rows['pids'][1])

        answers, ended = [], threading.Event()

        def load():
            while not ended.is_set():
                answers.append(self.ask(ipv6))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            said = self.faas('config', 'app', '--set', 'env.B=changed', '--unset', 'env.A').stdout
            self.assertIn('Revision 2 of app serves', said)
            self.faas('new', 'app', folder)  # the same folder: what was set stays
            self.assertEqual('A=folder B=changed', self.ask(ipv6))
            self.assertEqual(('changed', 'flags'), self.rows('app')['env.B'])
        finally:
            ended.set()
            thread.join()
        self.assertLessEqual(set(answers), {'A=flag B=folder', 'A=folder B=changed'})
        self.server.restart()
        self.assertEqual('A=folder B=changed', self.ask(ipv6))

        described = self.server.api('GET', '/api/describe/app').json
        self.assertEqual((100 << 20, 0.5), (described['limits']['memory'], described['limits']['cpus']))
        (instance,) = described['instances']
        self.assertTrue(0 < instance['memory'] < 100 << 20)
        self.assertTrue(instance['pids'] >= 1 and instance['cpu_s'] > 0)
        said = self.faas('describe', 'app').stdout
        self.assertRegex(said, r'(?m)^memory +100M +the folder$')
        self.assertRegex(said, r'[0-9]+ of 100 MiB')

    def test_what_is_not_allowed_is_refused_and_changes_nothing(self):
        folder = self.folder({'handler.py': ENVIRONMENT})
        for words, pattern in (
            (('new', 'bad', folder, '--memory', '1G'), 'memory: 1G is more than FAAS_MEMORY_MAX, 512M'),
            (('new', 'bad', folder, '--memory', 'much'), 'the flags: memory must be a size'),
            (('new', 'bad', folder, '--env', 'A'), '--env A is not NAME=TEXT'),
            (('config', 'bad'), "there is no function 'bad'"),
        ):
            with self.subTest(words):
                self.assertIn(pattern, self.faas(*words, ok=(1, 2)).stderr)
        self.assertEqual([], [row for row in self.server.api('GET', '/api/list').json if row['name'] == 'bad'])
        self.faas('new', 'good', folder)
        for words, pattern in (
            (('--set', 'memory=1G'), 'FAAS_MEMORY_MAX'),
            (('--set', 'memory'), 'there is no = in it'),
            (('--set', 'colour=red'), "there is no setting 'colour'"),
            (('--unset', 'memory'), "'memory' is not set"),
        ):
            with self.subTest(words):
                self.assertIn(pattern, self.faas('config', 'good', *words, ok=(1, 2)).stderr)
        self.assertEqual(1, self.server.api('GET', '/api/list').json[-1]['revision'])


if __name__ == '__main__':
    unittest.main()
