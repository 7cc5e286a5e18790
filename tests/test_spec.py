"""How a revision is started, as JSON and back, with every field checked."""

import json
import unittest

from handlers.images.spec import Spec


class Specs(unittest.TestCase):
    """What is read from a spec.json."""

    def test_there_and_back(self):
        spec = Spec('image', ('a', 'b'), {'A': 'b'}, '/', 'u', (1, 2), 'SIGHUP', ('a' * 64,), 1.5, 3)
        self.assertEqual(spec, Spec.from_json(spec.to_json()))

    def test_every_field_is_checked(self):
        good = Spec('image', ('a',), {'A': 'b'}, '/', 'u', (1,), 'SIGHUP', ('a' * 64,), 1.5, 3)._asdict()
        for change in (
            {'kind': 'other'},
            {'kind': None},
            {'kind': 'command'},
            {'args': 'a'},
            {'args': []},
            {'args': [1]},
            {'args': ['']},
            {'args': ['\0']},
            {'args': ['\ud800']},
            {'env': []},
            {'env': {'A': 1}},
            {'env': {'': 'x'}},
            {'env': {'A=': 'x'}},
            {'cwd': 'a'},
            {'cwd': '/../a'},
            {'cwd': None},
            {'user': 0},
            {'ports': [0]},
            {'ports': [True]},
            {'ports': 80},
            {'stop_signal': 'TERM'},
            {'stop_signal': 15},
            {'layers': ['../x']},
            {'layers': ['a' * 64] * 128},
            {'layers': []},
            {'start_timeout_s': 'x'},
            {'start_timeout_s': 0},
            {'concurrency': 0},
            {'concurrency': 1.0},
            {'more': 1},
        ):
            with self.subTest(change), self.assertRaises(ValueError):
                Spec.from_json(json.dumps({**good, **change}))
        for text in ('', '[]', '7', '[' * 100_000):
            with self.subTest(text[:5]), self.assertRaises(ValueError):
                Spec.from_json(text)


if __name__ == '__main__':
    unittest.main()
