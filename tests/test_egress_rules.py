"""What people write for egress, and what the rules are for it."""

import ipaddress
import unittest

from host import egress, egress_rules
from host.egress_rules import Target


class Texts(unittest.TestCase):
    def test_what_is_understood(self):
        network = ipaddress.ip_network
        for text, target in (
            ('functions', Target('functions')),
            ('internet', Target('internet')),
            ('host:5432', Target('host', None, 5432)),
            ('10.1.2.0/24:5432', Target('network', network('10.1.2.0/24'), 5432)),
            ('10.1.2.3', Target('network', network('10.1.2.3/32'))),
            ('[fd00:1::/64]:80', Target('network', network('fd00:1::/64'), 80)),
            ('[2001:db8::1]', Target('network', network('2001:db8::1/128'))),
            ('API.Example.com', Target('name', 'api.example.com')),
            ('_srv.example.com:443', Target('name', '_srv.example.com', 443)),
        ):
            with self.subTest(text):
                self.assertEqual(target, egress_rules.parse(text))

    def test_what_is_refused(self):
        for text in (
            *('', 'host', 'host:0', 'host:65536', 'localhost', 'example', 'a b.c', 'x.y:z', 'a..b', '-a.b'),
            'http://a.b/',
            *('10.1.2.3/24:5432', '300.1.1.1', '1.2.3', 'fd00::1', '[::ffff:10.0.0.1]', '[fd00::1', '[fe80::1%eth0]'),
            'a.b;drop',
        ):
            with self.subTest(text), self.assertRaises(ValueError):
                egress_rules.parse(text)

    def test_what_is_public(self):
        public = ('8.8.8.8', '2a00::1')
        others = (
            *('10.0.0.1', '169.254.169.254', '100.64.0.1', '192.168.1.1', '198.18.0.1', '127.0.0.1', '224.0.0.1'),
            '0.0.0.0',
            *('255.255.255.255', 'fd00::1', 'fe80::1', '::1', '::ffff:8.8.8.8', '2002:a00:1::', '64:ff9b::a00:1'),
        )
        for text in (*public, *others):
            with self.subTest(text):
                self.assertEqual(text in public, egress_rules.is_public(ipaddress.ip_address(text)))

    def test_rules_are_counted_as_nft_counts_them(self):
        text = 'chain a {\nx\ny\n}\nset s { type x; }\nchain b {\n}\nchain a_c { type filter;\nz\n}\n'
        self.assertEqual({'a': 2, 'a_c': 1}, egress.expected_counts(text))


if __name__ == '__main__':
    unittest.main()
