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

    def test_folders_of_the_server_are_roots(self):
        callers = [Caller('local', uid=0), Caller('local', uid=1000), Caller('local'), Caller('admin', 'me')]
        self.assertEqual([True, False, False, False], [access.may(each, 'mount') for each in callers])
        self.assertFalse(any(access.may(Caller(role, uid=0), 'mount') for role in ('admin', 'peer', 'stranger')))


if __name__ == '__main__':
    unittest.main()
