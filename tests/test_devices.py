"""What a device meets on its way to a real faasd: narrow paths, other WireGuard clients, sudo."""
import contextlib
import json
import os
import signal
import subprocess
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

    # Several configurations

    def two_configs(self):
        """Saved configs default and work, default connected: their addresses."""
        self.faas('vpn', 'connect', 'work', '--invite', self.invite())
        self.faas('vpn', 'disconnect')
        self.connected()
        self.addCleanup(self.faas, 'vpn', 'remove', 'work', '--local', ok=None)
        return [each['ipv6'] for each in self.listed()]

    def listed(self):
        return json.loads(self.faas('vpn', 'list', '--json').stdout)

    def active(self):
        return [each['name'] for each in self.listed() if each['status'] == 'active']

    def assert_names_work(self):
        self.assertEqual(self.laptop.run(['curl', '-s', '--max-time', '5', 'http://fibonacci.faas/?n=3']).stdout,
                         'Fibonacci sequence (3 steps):\n0, 1, 1\n')

    def test_a_second_config_is_refused_and_switched_to_on_demand(self):
        default, work = self.two_configs()
        done = self.faas('vpn', 'connect', 'work', ok=(1,))
        self.assertEqual(done.stderr, 'error: the VPN is connected already, with another config: default\n'
                         'hint: disconnect that first (./faas vpn disconnect), or do both at once: add --switch\n')
        self.assertEqual(self.active(), ['default'])
        out = self.faas('vpn', 'connect', 'work', '--switch').stdout
        self.assertRegex(out, f'Disconnecting default...\nActivating (?s:.*){work}/64\n(?s:.*)\nConnected!\n')
        self.assertEqual(self.active(), ['work'])
        self.assert_names_work()
        self.assertEqual(self.faas('vpn', 'connect', 'work', '--switch').stdout, 'Already connected: work\n')
        self.faas('vpn', 'disconnect')
        self.assertNotIn('Disconnecting', self.faas('vpn', 'connect', '--switch').stdout)
        self.addCleanup(self.faas, 'vpn', 'remove', 'new', '--local')
        self.faas('vpn', 'connect', 'new', '--switch', '--invite', self.invite())
        self.assertEqual(self.active(), ['new'])
        self.assert_names_work()

    def test_a_switch_that_fails_goes_back(self):
        self.two_configs()
        before = self.laptop.path('/etc/resolv.conf').read_bytes()
        path = self.laptop.path('/root/.config/faas/vpn/work.json')
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, 'server_public_key': config['public_key']}))
        done = self.faas('vpn', 'connect', 'work', '--switch', ok=(1,))
        self.assertRegex(done.stderr, r'\AConnected again: default\nerror: .* \(no WireGuard handshake\)\nhint: .*\n\Z')
        self.assertEqual(self.active(), ['default'])
        self.assert_names_work()
        self.assertEqual(self.laptop.path('/etc/resolv.conf').read_bytes(), before)
        path.write_text('{')
        self.assertIn('cannot be used', self.faas('vpn', 'connect', 'work', '--switch', ok=(1,)).stderr)
        self.assert_names_work()                        # it never ended

    def test_a_switch_that_can_not_go_back_says_where_it_stands(self):
        self.two_configs()
        for name in 'work', 'default':
            path = self.laptop.path(f'/root/.config/faas/vpn/{name}.json')
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, 'server_endpoint': 'gone.invalid'}))
        done = self.faas('vpn', 'connect', 'work', '--switch', ok=(1,))
        self.assertRegex(done.stderr, r'\Awarning: default was disconnected and could not be connected again: .*\n'
                                      r"error: the server's address gone.invalid cannot be found: .*\nhint: .*\n\Z")
        self.assertEqual(self.active(), [])
        self.assertEqual(self.faas('vpn', 'status', ok=(3,)).stdout.splitlines()[0], 'Status: Not connected')

    def test_an_interrupted_switch_goes_back(self):
        self.two_configs()
        slow = self.laptop.path('/opt/slow/ping')
        slow.parent.mkdir(exist_ok=True)
        slow.write_text('#!/bin/sh\nexec sleep 60\n')
        slow.chmod(0o755)
        process = self.laptop.popen([sys.executable, '-u', FAAS, 'vpn', 'connect', 'work', '--switch'], text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    env={'PATH': '/opt/slow:' + os.environ['PATH']})
        while 'DNS server' not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.communicate(timeout=30)[1], 'Connected again: default\nerror: interrupted\n')
        self.assertEqual((process.returncode, self.active()), (130, ['default']))
        self.assert_names_work()

    def test_somebody_elses_connection_is_not_switched_away(self):
        self.two_configs()
        self.addCleanup(self.laptop.run, ['rm', '-rf', '/tmp/other'])
        self.laptop.run(['sh', '-c', 'mkdir /tmp/other; cp -r ~/.config /tmp/other'])
        done = self.faas('vpn', 'connect', 'work', '--switch', ok=(1,), env={'HOME': '/tmp/other'})
        self.assertEqual(done.stderr, 'error: the VPN is connected with a config that is not among yours: '
                         '/root/.config/faas/vpn/default.json\nhint: if it may end: ./faas vpn disconnect\n')
        self.assertEqual(self.active(), ['default'])


if __name__ == '__main__':
    unittest.main()
