"""Docker, ufw and others drop what ours lets through: our veths are opened there for as long as they are needed."""

import json
import subprocess
import unittest
import urllib.parse

from host import foreign_firewalls
from tests import lab, packages, programs, serving
from tests.test_egress import ASKS, PAGES

DOCKER = """
for ip in iptables ip6tables; do
    $ip -P FORWARD DROP
    $ip -N DOCKER-USER
    $ip -A DOCKER-USER -j RETURN
    $ip -I FORWARD -j DOCKER-USER
done
"""


class Strangers(unittest.TestCase):
    def test_who_may_drop_what_functions_send(self):
        chains = [
            {'family': 'inet', 'table': 'mine', 'name': 'f', 'hook': 'forward', 'policy': 'accept'},
            {'family': 'ip', 'table': 'filter', 'name': 'FORWARD', 'hook': 'forward', 'policy': 'drop'},
        ]
        seen = foreign_firewalls.Seen(chains, {'iptables': ['-P FORWARD DROP']})
        self.assertEqual(['FORWARD of iptables'], list(foreign_firewalls.strangers(seen)))
        docker = ['-P FORWARD DROP', '-N DOCKER-USER', '-A FORWARD -j DOCKER-USER']
        seen = foreign_firewalls.Seen(chains, {'iptables': docker})
        self.assertEqual([], list(foreign_firewalls.strangers(seen)))
        self.assertEqual(2, len(seen.wanted()))
        opened = [*docker, '-P FORWARD DROP', '-A FORWARD -i faas-+ -j ACCEPT']
        self.assertEqual([], list(foreign_firewalls.strangers(foreign_firewalls.Seen([], {'iptables': opened}))))


@lab.needs_root
class Opened(unittest.TestCase):
    def setUp(self):
        self.host, self.net = (self.enterContext(lab.Host(name)) for name in ('server', 'net'))
        lab.join(self.host, self.net, ['192.168.1.1/24'], ['192.168.1.2/24'])
        self.host.sh('ip route add default via 192.168.1.2')
        self.net.sh('ip address add 203.0.113.5/32 dev lo')
        self.net.popen(['python3', '-c', PAGES, '6', '::', 80])

    def deploy(self, server):
        config = urllib.parse.quote(json.dumps({'set': {'egress': 'functions,203.0.113.5:80'}}))
        server.deploy('plain', serving.saying('plain'))
        body = serving.archive({'handler.py': ASKS})
        reply = server.api('POST', f'/api/new?name=asks&config={config}', body)
        self.assertEqual(200, reply.status, reply.body)
        return reply.json['ipv6']

    def asks(self, ipv6, where):
        code = f'print(fetch("http://{where}/"))'
        command = ['curl', '-sg', '--max-time', '30', '--data-binary', '@-', f'http://[{ipv6}]/']
        return self.host.run(command, input=code).stdout.strip()

    def reaches(self, ipv6):
        return self.asks(ipv6, '203.0.113.5') == '192.168.1.1' and self.asks(ipv6, 'plain.faas') == 'plain'

    def test_docker(self):
        programs.find('iptables')
        self.host.sh(DOCKER)
        before = self.host.sh('iptables -S; ip6tables -S')
        with serving.standalone(self.host) as server:
            ipv6 = self.deploy(server)
            self.assertTrue(self.reaches(ipv6))
            self.assertTrue(server.printed('Docker drops what functions send'))
            self.host.sh('iptables -F DOCKER-USER; iptables -A DOCKER-USER -j RETURN')  # as at its restart
            lab.wait_until(lambda: self.reaches(ipv6), 30, 'the rules that were flushed')
            self.host.run([str(lab.REPO / 'faas'), 'rm', 'asks', '--yes'])
            lab.wait_until(lambda: self.host.sh('iptables -S; ip6tables -S') == before, 30, 'the former rules')
            self.deploy(server)
        self.assertEqual(before, self.host.sh('iptables -S; ip6tables -S'))

    def test_ufw(self):
        programs.find('iptables')
        packages.put(self.host, 'ufw')
        self.host.sh('cp /usr/share/ufw/*.conf /usr/share/ufw/*.rules /usr/share/ufw/iptables/*.rules /etc/ufw/; true')
        self.host.sh('ufw --force enable && ufw allow in on wg0 && ufw allow 51820')
        with serving.standalone(self.host) as server:
            ipv6 = self.deploy(server)
            self.assertTrue(self.reaches(ipv6))
            self.assertTrue(server.printed('ufw drops what functions send'))
            self.host.sh('ufw reload')
            lab.wait_until(lambda: self.reaches(ipv6), 30, 'the rules that were flushed')
        self.assertNotIn('faas-', self.host.sh('iptables -S; ip6tables -S'))

    def test_firewalld(self):
        packages.put(self.host, 'dbus-daemon', 'firewalld')
        actions = '/usr/share/polkit-1/actions/org.fedoraproject.FirewallD1'
        self.host.sh(
            f'mkdir -p /run/dbus; ln -sf {actions}.server.policy.choice {actions}.policy; '
            'grep -q ^messagebus: /etc/passwd || echo messagebus:x:4713:4713::/:/bin/false >>/etc/passwd'
        )
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        self.host.popen(['dbus-daemon', '--system', '--nofork', '--nopidfile'], **quiet)
        lab.wait_until(self.host.path('/run/dbus/system_bus_socket').exists, 10, 'dbus')
        self.host.popen(['/usr/bin/python3', '/usr/sbin/firewalld', '--nofork', '--nopid'], **quiet)
        state = ['firewall-cmd', '--state']
        lab.wait_until(lambda: self.host.run(state, ok=None).returncode == 0, 30, 'firewalld')
        with serving.standalone(self.host) as server:
            ipv6 = self.deploy(server)
            self.assertTrue(self.reaches(ipv6))
            self.assertTrue(server.printed('firewalld drops what functions send'))
            self.host.run(['firewall-cmd', '--reload'])
            lab.wait_until(lambda: self.reaches(ipv6), 30, 'the zone after a reload')
        self.assertNotIn('faas-', self.host.sh('nft list ruleset'))

    def test_what_is_not_known_is_told(self):
        chain = 'type filter hook forward priority 5; policy drop;'
        self.host.sh(f'nft add table inet mine; nft "add chain inet mine f {{ {chain} }}"')
        with serving.standalone(self.host) as server:
            self.deploy(server)
            told = 'the chain inet mine f of nftables may drop what functions send: let faas-+ through there'
            lab.wait_until(lambda: told in server.api('GET', '/api/health').body.decode(), 20, told)


if __name__ == '__main__':
    unittest.main()
