"""Who may do what."""

import unittest

from control import access
from control.access import Caller
from control.api import ControlAPI


class MayTest(unittest.TestCase):
    def test_who_may_do_what(self):
        verbs = set(ControlAPI.ROUTES.values())
        allowed = {
            'local': verbs,
            'admin': verbs,
            'peer': {'list', 'ip', 'health'},
            'newcomer': {'vpn_create'},
            'stranger': set(),
        }
        for role, expected in allowed.items():
            self.assertEqual(expected, {verb for verb in verbs if access.may(Caller(role, 'me'), verb, 'other')}, role)
        self.assertTrue(access.may(Caller('peer', 'me'), 'vpn_remove', 'me'))


if __name__ == '__main__':
    unittest.main()
