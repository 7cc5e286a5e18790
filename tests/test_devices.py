"""What a device meets on its way to a real faasd: narrow paths, other WireGuard clients, sudo."""
import contextlib
import json
import sys
import unittest

from tests import lab, serving

FAAS = lab.REPO / 'faas'
BIG = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'x' * 100000]\n"
# A router that loses what is too long for its next link, and says nothing. It stands at a host's end of the cable.
BLACK_HOLE = 'table netdev hole { chain ingress { type filter hook ingress device eth0 priority 0; %s; }; }'


@lab.needs_root
class TestDevices(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.server, cls.laptop = stack.enter_context(lab.pair())
        faasd = stack.enter_context(serving.standalone(cls.server))
        for name, source in (('fibonacci', serving.example('fibonacci')), ('big', {'handler.py': BIG})):
            if faasd.deploy(name, source).status != 200:
                raise RuntimeError(f'{name} was not deployed')

    def on_server(self, *words):
        return self.server.run(['/usr/bin/python3', FAAS, *words]).stdout

    def invite(self, *words):
        return self.on_server('vpn', 'invite', *words).split()[-1]

    def faas(self, *words, ok=(0,), **options):
        return self.laptop.run([sys.executable, FAAS, *words], ok=ok, **options)

    def connected(self, *words):
        """Connect the laptop, for this test alone; what it printed."""
        self.addCleanup(self.faas, 'vpn', 'remove', '--local', ok=None)
        return self.faas('vpn', 'connect', '--invite', self.invite(), *words).stdout

    def loses(self, host, longest):
        """UDP packets that are longer do not arrive at the host, during this test."""
        host.run(['nft', '-f', '-'], input=BLACK_HOLE % f'meta l4proto udp meta length > {longest} drop')
        self.addCleanup(host.run, ['nft', 'delete', 'table', 'netdev', 'hole'], ok=None)

    def mtu(self):
        """What wg-faas has, which is what is told too."""
        mtu = json.loads(self.laptop.run(['ip', '--json', 'link', 'show', 'wg-faas']).stdout)[0]['mtu']
        self.assertEqual(json.loads(self.faas('vpn', 'status', '--json').stdout)['mtu'], mtu)
        return mtu

    def assert_a_large_answer_arrives(self):
        got = self.laptop.run(['curl', '-sS', '--max-time', '10', 'http://big.faas/']).stdout
        self.assertEqual(len(got), 100000)

    # A path that loses full packets

    def test_full_packets_that_arrive_leave_the_documents_mtu(self):
        out = self.connected()
        self.assertEqual(out.count('Set MTU'), 1, out)
        self.assertEqual(self.mtu(), 1420)
        self.assert_a_large_answer_arrives()

    def test_full_packets_that_get_lost_on_the_way_here_or_there_lower_it(self):
        for where in self.laptop, self.server:
            with self.subTest(where.name):
                self.loses(where, 1400)
                out = self.connected()
                self.assertRegex(out, r'Set MTU: 1420\n(?s:.*)Ping VPN server: .*\n'
                                      r'.*Set MTU: 1280 \(large answers did not arrive with 1420\)\n')
                self.assertIn('Connected! Your', out)
                self.assertEqual(self.mtu(), 1280)
                self.assert_a_large_answer_arrives()
                self.assertEqual(self.faas('vpn', 'connect').stdout, 'Already connected: default\n')
                self.doCleanups()

    def test_a_path_that_narrows_while_connected_is_mended_by_connect(self):
        self.connected()
        self.loses(self.laptop, 1400)
        done = self.faas('vpn', 'connect')
        self.assertIn('building it up again', done.stderr)
        self.assertEqual(self.mtu(), 1280)

    def test_a_path_that_is_too_narrow_for_ipv6_is_told(self):
        self.loses(self.laptop, 1000)
        self.addCleanup(self.faas, 'vpn', 'remove', '--local', ok=None)
        done = self.faas('vpn', 'connect', '--invite', self.invite(), ok=(3,))
        self.assertIn('Connected, but degraded:\n   large answers do not arrive, not even with an MTU of 1280\n',
                      done.stdout)

    def test_ones_own_mtu_is_set_and_kept_and_lowered_too_where_it_does_not_arrive(self):
        self.assertIn('Set MTU: 1380\n', self.connected('--mtu', '1380'))
        self.assertEqual(self.mtu(), 1380)
        self.faas('vpn', 'disconnect')
        self.assertIn('Set MTU: 1380\n', self.faas('vpn', 'connect').stdout)
        self.assertEqual(self.faas('vpn', 'connect', '--mtu', '1380').stdout, 'Already connected: default\n')
        self.assertIn('Set MTU: 1300\n', self.faas('vpn', 'connect', '--mtu', '1300').stdout)
        self.assertEqual(self.mtu(), 1300)
        self.loses(self.server, 1350)
        out = self.faas('vpn', 'connect', '--mtu', '1400').stdout
        self.assertIn('Set MTU: 1280 (large answers did not arrive with 1400)\n', out)
        self.assertEqual(self.mtu(), 1280)

    def test_a_number_that_is_no_mtu(self):
        for bad in ('1279', '9001', '0', '-1', 'x', '01300', '１３００'):
            done = self.faas('vpn', 'connect', f'--mtu={bad}', ok=(2,))
            self.assertRegex(done.stderr, r'\Aerror: .* is no MTU from 1280 to 9000\nhint: .*\n\Z')


if __name__ == '__main__':
    unittest.main()
