"""What a function may ask for: each key from faas.toml, from a label, from a flag, and what is refused."""

import importlib.util
import re
import unittest
from importlib.machinery import SourceFileLoader

from handlers.images import spec, wants
from tests import lab

ALL = {  # as faas.toml has it → normalised
    'command': ('node x', ['node', 'x']),
    'build': ('make', 'make'),
    'env': ({'A': 'b', 'B': {'secret': 'S'}}, {'A': 'b', 'B': {'secret': 'S'}}),
    'secrets': (['one', 'two', 'one'], ['one', 'two']),
    'volumes': (
        {'a': '/data', 'b': {'path': '/b', 'size': '2G'}},
        {'a': {'path': '/data', 'size': None}, 'b': {'path': '/b', 'size': 2 << 30}},
    ),
    'egress': (['functions', 'host:5432', 'db.example.com:5432', '10.1.2.0/24:5432', '[fd00::/8]:1'],) * 2,
    'mounts': ({'/run/postgresql': 'ro'},) * 2,
    'memory': ('512M', 512 << 20),
    'cpus': (0.5, 0.5),
    'pids': (64, 64),
    'writable': ('1.5M', 3 << 19),
    'log': (1 << 20, 1 << 20),
    'port': (8080, 8080),
    'start_timeout': (2.5, 2.5),
    'idle': (0, 0),
    'concurrency': (8, 8),
    'max_instances': (2, 2),
    'ready': ('/health', '/health'),
    'exec_tmp': (True, True),
    'overlap': (False, False),
}


class Wants(unittest.TestCase):
    def test_each_key_is_normalised_once_and_stays_so(self):
        self.assertEqual(list(wants.KEYS), list(ALL))
        normal = wants.checked({key: given for key, (given, _) in ALL.items()}, 'x')
        self.assertEqual({key: value for key, (_, value) in ALL.items()}, normal)
        self.assertEqual(normal, wants.checked(normal, 'x'))
        asks = spec.Spec('command', ('x',), settings=normal)
        self.assertEqual(asks, spec.Spec.from_json(asks.to_json()))

    def test_the_texts_of_a_want_are_read_as_that_want(self):
        normal = {key: value for key, (_, value) in ALL.items() if not wants.KEYS[key].only_folder}
        self.assertEqual(normal, wants.from_texts(wants.lines(normal), 'x'))
        labels = {f'faas.{key}': text for key, text in wants.lines(normal)}
        self.assertEqual(normal, wants.from_labels({**labels, 'maintainer': 'x', 'faasd': 'y'}))
        self.assertEqual({'start_timeout': 1.0}, wants.from_texts([('start-timeout', '1')], 'x'))
        self.assertEqual({'egress': []}, wants.from_texts([('egress', '')], 'x'))

    def test_what_is_wrong_is_one_line_that_names_it(self):
        for bad, pattern in (
            ({'memroy': 1}, "t: there is no setting 'memroy'"),
            ({'memory': '1X'}, 't: memory must be a size'),
            ({'memory': 1 << 10}, 't: memory must be a size'),
            ({'cpus': '1'}, 't: cpus must be a number'),
            ({'cpus': True}, 't: cpus must be a number'),
            ({'env': {'A-B': 'x'}}, 't: env must be'),
            ({'env': {'A': {'secret': '../x'}}}, 't: env must be'),
            ({'env': {'A': '\0'}}, 't: env must be'),
            ({'secrets': ['../../etc/shadow']}, 't: secrets must be'),
            ({'volumes': {'../x': '/data'}}, 't: volumes must be'),
            ({'volumes': {'x': '/a/../b'}}, 't: volumes must be'),
            ({'volumes': {'x': 'data'}}, 't: volumes must be'),
            ({'volumes': {'x': {'path': '/x', 'mode': 1}}}, 't: volumes must be'),
            ({'mounts': {'/x': 'rwx'}}, 't: mounts must be'),
            ({'egress': 'http://x/'}, 't: egress must be'),
            ({'egress': ['a b']}, 't: egress must be'),
            ({'egress': ['host']}, 't: egress must be'),
            ({'ready': 'health'}, 't: ready must be'),
            ({'ready': '/a b\r\nX: y'}, 't: ready must be'),
            ({'port': 0}, 't: port must be'),
            ({'idle': float('nan')}, 't: idle must be'),
            ({'start-timeout': 1, 'start_timeout': 1}, 't: start_timeout stands there twice'),
            ({1: 2}, 't: there is no setting 1'),
            ([], 't is not a table'),
        ):
            with self.subTest(bad), self.assertRaises(wants.BadWant) as caught:
                wants.checked(bad, 't')
            self.assertRegex(str(caught.exception), f'^{re.escape(pattern)}')
            self.assertNotIn('\n', str(caught.exception))
        for key, text, pattern in (
            ('memory.x', '1', 'is not a setting'),
            ('env', 'x', 'is not a setting'),
            ('command', 'x', 'there is no setting'),
            ('pids', 'many', 'pids must be a number'),
            ('overlap', 'perhaps', 'overlap must be true or false'),
        ):
            with self.subTest(key), self.assertRaisesRegex(wants.BadWant, pattern):
                wants.from_texts([(key, text)], 't')

    def test_flags_count_above_and_tables_count_together(self):
        below = {'memory': 1, 'env': {'A': '1', 'B': '2'}, 'secrets': ['a'], 'egress': ['internet']}
        above = {'memory': 2, 'env': {'B': '3'}, 'secrets': ['b'], 'egress': []}
        expected = {'memory': 2, 'env': {'A': '1', 'B': '3'}, 'secrets': ['a', 'b'], 'egress': []}
        self.assertEqual(expected, wants.merged(below, above))
        left = wants.without(below, ['memory', 'env.A', 'secrets'], 't')
        self.assertEqual({'env': {'B': '2'}, 'egress': ['internet']}, left)
        self.assertEqual({'A': '1', 'B': '2'}, below['env'])
        for key in ('pids', 'env.C', 'memory.x', 'nothing'):
            with self.subTest(key), self.assertRaisesRegex(wants.BadWant, 'is not set'):
                wants.without(below, [key], 't')

    def test_the_docs_have_each_key(self):
        text = (lab.REPO / 'docs/HANDLERS.md').read_text().partition('\n## What a function may ask for\n')[2]
        rows = re.findall(r'^\| `(\w+)` \|', text.partition('\n## ')[0], re.M)
        self.assertEqual(list(wants.KEYS), rows)

    def test_each_flag_of_faas_new_is_a_key(self):
        loader = SourceFileLoader('faas_client', str(lab.REPO / 'faas'))
        client = importlib.util.module_from_spec(importlib.util.spec_from_loader('faas_client', loader))
        loader.exec_module(client)
        self.assertGreater(len(client.WANTS), 10)
        self.assertLessEqual(set(client.WANTS), wants.KEYS.keys())


if __name__ == '__main__':
    unittest.main()
