"""The routes of the control API."""

import re
import unittest

from control.api import ControlAPI
from tests import lab


class Routes(unittest.TestCase):
    def test_the_docs_have_each_endpoint(self):
        rows = re.findall(r'`([A-Z]+) (/api/[a-z/]+)(NAME)?', (lab.REPO / 'docs/API.md').read_text())
        self.assertLessEqual(set(ControlAPI.ROUTES), {(verb, path + (name and '*')) for verb, path, name in rows})

    def test_each_verb_has_a_method(self):
        for verb in ControlAPI.ROUTES.values():
            self.assertTrue(callable(getattr(ControlAPI, f'_{verb}')), verb)


if __name__ == '__main__':
    unittest.main()
