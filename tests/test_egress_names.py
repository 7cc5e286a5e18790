"""How long the addresses of a name count."""

import ipaddress
import socket
import threading
import unittest
from unittest import mock

from host import egress_names
from host.egress_names import Names


class Addresses(unittest.TestCase):
    def setUp(self):
        self.now, self.answers = 1000.0, {}
        self.names = Names(lambda: self.now)
        self.enterContext(mock.patch.object(socket, 'getaddrinfo', self.resolve))

    def resolve(self, name, port, type):
        if not (found := self.answers.get(name)):
            raise socket.gaierror(socket.EAI_NONAME, 'no')
        return [(None, None, None, '', (text, 0)) for text in found]

    def look_up(self, name='db.example.com', *found):
        self.answers[name] = found
        self.names.look_up([name], 5)

    def seen(self, name='db.example.com'):
        return [(str(address), left_s) for address, left_s in self.names.addresses(name)]

    def test_the_latest_is_first_and_each_counts_for_ten_minutes_after_it_was_last_seen(self):
        self.look_up('db.example.com', '203.0.113.1', '2001:db8::1')
        self.now += 590
        self.look_up('db.example.com', '203.0.113.2')
        self.assertEqual([('203.0.113.2', 600), ('203.0.113.1', 10), ('2001:db8::1', 10)], self.seen())
        self.now += 30
        self.look_up('db.example.com', '203.0.113.2')
        self.assertEqual([('203.0.113.2', 600)], self.seen())

    def test_a_name_that_is_not_resolved_any_more_ends_too(self):
        self.look_up('db.example.com', '203.0.113.1')
        self.now += 599
        self.look_up()
        self.assertEqual([('203.0.113.1', 1)], self.seen())
        self.now += 2
        self.assertEqual([], self.seen())

    def test_no_name_is_left_out_however_many_there_are(self):
        self.answers = {f'n{number}.example.com': ['203.0.113.1'] for number in range(200)}
        self.names.look_up(self.answers, 10)
        self.assertTrue(all(map(self.seen, self.answers)))

    def test_they_are_looked_up_when_it_is_time(self):
        self.answers['a.example.com'] = ['2001:db8::1']
        done = threading.Event()
        self.names.refresh(['a.example.com'], done.set)
        self.assertTrue(done.wait(5))
        self.assertEqual([('2001:db8::1', 600)], self.seen('a.example.com'))
        done.clear()
        self.names._thread.join()
        self.names.refresh(['a.example.com'], done.set)
        self.now += egress_names.LOOKUP_S
        self.assertFalse(done.is_set())
        self.names.refresh(['a.example.com'], done.set)
        self.assertTrue(done.wait(5))

    def test_a_link_local_address_has_no_interface(self):
        self.look_up('x.example.com', 'fe80::1%eth0')
        self.assertEqual([ipaddress.ip_address('fe80::1')], [each for each, _ in self.names.addresses('x.example.com')])


if __name__ == '__main__':
    unittest.main()
