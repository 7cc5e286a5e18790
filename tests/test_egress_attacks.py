"""What a hostile function with egress reaches. The tests enter its network with rights that no function has."""

import json
import subprocess
import time

from tests import lab
from tests.test_egress import NOTHING, World

HOSTILE = str(lab.REPO / 'tests/hostile.py')
RIGHTS = r"""
import os, re, socket
def tries(what):
    try:
        what()
        return 'done'
    except OSError as error:
        return error.strerror
def bound(*kind):
    with socket.socket(*kind) as sock:
        sock.bind(('eth0', 0))
def ask(kind):
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.sendall(kind)
        code = int.from_bytes(sock.recv(4096)[16:20], 'little', signed=True)
        if code:
            raise OSError(-code, os.strerror(-code))
route = bytes.fromhex('1c000000180005040100000000000000') + bytes([2, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0])
status = open('/proc/self/status').read()
print(sorted(re.findall(r'^(?:Cap\w+|NoNewPrivs|Seccomp):\s*\w+', status, re.MULTILINE)))
print(tries(lambda: bound(socket.AF_PACKET, socket.SOCK_RAW)))
print(tries(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()))
print(tries(lambda: ask(route)))
print(tries(lambda: open('/proc/sys/net/ipv4/ip_forward', 'w').close()))
"""


@lab.needs_root
class Attacks(World):
    functions = {'inter': 'internet', 'named': 'api.example.com:80', 'local': 'functions', 'none': None}

    def address(self, name, family):
        said = json.loads(self.host.sh(f'{self.inside(name)} ip -j -{family} address show dev eth0'))
        (address,) = (info['local'] for info in said[0]['addr_info'])
        return address

    def test_no_packet_passes_that_its_egress_does_not_name(self):
        others = self.address('local', 4), self.address('local', 6)
        for name, control in (
            ('inter', ['control 2001:db8:f::5', 'control 203.0.113.5']),
            ('named', ['control 203.0.113.5']),
        ):
            with self.subTest(name):
                pipe = subprocess.PIPE
                with self.net.popen(['python3', HOSTILE, 'watch', 'eth0'], stdout=pipe, text=True) as watching:
                    self.assertEqual('watching\n', watching.stdout.readline())
                    sent = self.host.sh(f'{self.inside(name)} python3 {HOSTILE} send {" ".join(others)}; true')
                    self.assertGreater(len(sent.splitlines()), 25)
                    self.assertEqual(control, json.loads(watching.stdout.readline()))

    def test_neither_routes_nor_neighbours_of_the_server_change(self):
        looks = (
            'ip -6 route show', 'ip route show', 'ip -6 neigh show', 'ip neigh show',
            'ip -br address show | grep faas-', 'nft list table inet faas | grep -v counter',
        )  # fmt: skip
        self.assertEqual('192.168.1.1', self.fetch('inter', '203.0.113.5'))

        def state():
            said = [self.host.sh(look).splitlines() for look in looks]
            return [sorted(line for line in lines if 'eth0' not in line) for lines in said]

        before = state()
        self.assertEqual('done\n', self.host.sh(f'{self.inside("inter")} python3 {HOSTILE} flood'))
        self.assertEqual(before, state())
        self.assertIn('default via 2001:db8:1::2', self.host.sh('ip -6 route show default'))
        self.assertEqual('192.168.1.1', self.fetch('inter', '203.0.113.5'))

    def test_nobody_begins_to_talk_to_an_instance(self):
        for family in (4, 6):
            address = self.address('local', family)
            place = f'[{address}]' if family == 6 else address
            serve = [*self.inside('local').split(), 'python3', '-m', 'http.server', '--bind', address, '8000']
            with self.host.popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
                curl = f'curl -sgo /dev/null -w %{{http_code}} --max-time 1 http://{place}:8000/'
                lab.wait_until(lambda line=curl: self.host.sh(f'{line}; true') == '200', 10, 'the server inside')
                self.assertIn(self.fetch('inter', f'{place}:8000'), NOTHING)
                self.assertEqual('000', self.host.sh(f'{self.inside("inter")} {curl}; true'))
                network = '198.18.0.0/16' if family == 4 else 'fd00:faa5:0:200::/64'
                via = '192.168.1.1' if family == 4 else '2001:db8:1::1'
                self.net.sh(f'ip -{family} route replace {network} via {via}')
                self.assertEqual('000', self.net.sh(f'{curl}; true'))
                server.terminate()

    def test_the_loopback_of_the_server_is_not_behind_the_veth(self):
        enter = self.inside('inter')
        mac = self.host.sh(f'{enter} ip -4 neigh show dev eth0').split()[2]
        for command in (
            'sysctl -qw net.ipv4.conf.eth0.route_localnet=1 net.ipv4.conf.all.route_localnet=1',
            'ip route del local 127.0.0.0/8 dev lo table local',
            'ip route del local 127.0.0.1 dev lo table local',
            f'ip route add 127.0.0.0/8 dev eth0 src {self.address("inter", 4)}',
            f'ip neigh replace 127.0.0.1 lladdr {mac} dev eth0',
        ):
            self.host.sh(f'{enter} {command}')
        self.assertIn('127.0.0.1 dev eth0', self.host.sh(f'{enter} ip route get 127.0.0.1'))
        curl = 'curl -so /dev/null -w %{http_code} --max-time 1 http://127.0.0.1:5432/'
        self.assertEqual('200', self.host.sh(curl))
        self.assertEqual('000', self.host.sh(f'{enter} {curl}; true'))

    def test_what_faasd_does_itself_is_not_taken_for_somebody_elses(self):
        time.sleep(0.5)  # the look at the table comes after the change
        self.assertFalse(self.server.printed('changed by somebody'))

    def test_it_has_the_rights_of_one_without_egress(self):
        rights = self.run_in('none', RIGHTS)
        self.assertEqual(rights, self.run_in('inter', RIGHTS))
        caps, packet, raw, route, sysctl = rights.splitlines()
        self.assertIn("'CapEff:\\t0000000000000000'", caps)
        refused = {'Operation not permitted', 'Permission denied', 'Address family not supported by protocol'}
        refused.add('Read-only file system')
        self.assertEqual(set(), {packet, raw, route, sysctl} - refused)

    def test_one_instance_has_a_bound_for_what_the_kernel_tracks(self):
        flood = (
            'import socket\n'
            's = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n'
            'for port in range(1000, 6000):\n'
            '    try: s.sendto(b"x", ("203.0.113.5", port))\n'
            '    except OSError: pass\n'
            'print("done")'
        )
        to_the_server = (
            'import socket\n'
            'for port in range(10000, 13000):\n'
            '    try:\n'
            '        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:\n'
            '            s.bind(("::", port))\n'
            '            s.sendto(b"x", ("fd00:faa5:0:100::1", 53))\n'
            '    except OSError: pass\n'
            'print("done")'
        )
        before = int(self.host.sh('cat /proc/sys/net/netfilter/nf_conntrack_count'))
        self.assertEqual('done', self.run_in('inter', flood))
        self.assertEqual('done', self.run_in('inter', to_the_server))
        tracked = int(self.host.sh('cat /proc/sys/net/netfilter/nf_conntrack_count')) - before
        self.assertTrue(1500 < tracked < 2300, tracked)
        self.assertEqual('plain', self.fetch('local', 'plain.faas'))


del World
