"""The client with every resolver that Debian has: the real programs, each on a laptop of its own.

Their packages are unpacked on that laptop alone. A LAN's DNS server, which is the default one everywhere, knows
printer.lan and writes down whatever it is asked.
"""
import contextlib
import itertools
import json
import subprocess
import sys
import unittest

from tests import lab, packages, serving

FAAS = lab.REPO / 'faas'
LAN_DNS = '203.0.113.53'
ZONE_SERVER = 'fd00:faa5:0:100::2'
TESTING = 'ping', ''                                # the first step after DNS
LAN_COREFILE = f'''
. {{
    bind {LAN_DNS}
    hosts {{
        192.0.2.80 printer.lan
        2001:db8::80 printer.lan
    }}
    log . "{{name}}"
}}
'''


@lab.needs_root
class Resolvers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        cls.addClassCleanup(cls.stack.close)
        cls.server = cls.stack.enter_context(lab.Host('server'))
        cls.numbers = itertools.count(1)
        for address in (lab.SERVER[0].replace('/24', '/32'), f'{LAN_DNS}/32'):
            cls.server.run(['ip', 'address', 'add', address, 'dev', 'lo'])
        cls.faasd = cls.stack.enter_context(serving.standalone(cls.server))
        assert cls.faasd.deploy('hello', serving.saying('hello')).status == 200
        cls.server.path('/etc/lan-corefile').write_text(LAN_COREFILE)
        log = cls.server.path('/run/lan-queries').open('a')
        lan = cls.server.popen(['coredns', '-quiet', '-conf', '/etc/lan-corefile'], stdout=log)
        log.close()
        cls.stack.callback(lan.wait, 10)
        cls.stack.callback(lan.terminate)

    def laptop(self, *names):
        """A new laptop with these packages, on the LAN, that is invited; its resolv.conf names the LAN's server."""
        number = next(self.numbers)
        self.server.path('/run/lan-queries').write_text('')
        self.host = lab.Host('laptop')
        self.addCleanup(self.host.close)
        lab.join(self.server, self.host, [f'10.0.{number}.1/24'], [f'10.0.{number}.2/24'])
        self.sh(f'ip route add default via 10.0.{number}.1; echo nameserver {LAN_DNS} >/etc/resolv.conf')
        packages.put(self.host, *names)
        invite = self.faasd.api('POST', '/api/vpn/invite', {'name': f'laptop{number}'}).json['token']
        lab.wait_until(lambda: 'printer' in self.lookup('printer.lan'), 5, "the LAN's DNS server")
        self.invite = ['--invite', invite]

    def sh(self, script, ok=(0,)):
        return self.host.sh(script, ok=ok)

    def write(self, path, text):
        self.host.run(['sh', '-c', 'mkdir -p "$(dirname "$1")"; cat >"$1"', 'sh', path], input=text)

    def start(self, *argv):
        """Start a program that ends with the laptop."""
        return self.host.popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_dbus(self):
        self.sh('mkdir -p /run/dbus /run/systemd')
        self.start('dbus-daemon', '--system', '--nofork', '--nopidfile')
        lab.wait_until(self.host.path('/run/dbus/system_bus_socket').exists, 5, 'dbus')

    def faas(self, *words, ok=(0,), **options):
        return self.host.run([sys.executable, FAAS, 'vpn', *words], ok=ok, **options)

    def connect(self, trap=None, ok=(0,)):
        """vpn connect; the first call of `trap` = (program, words, what) runs `what` in its place, then the rest."""
        words, self.invite = self.invite, []
        if trap is None:
            return self.faas('connect', *words, ok=ok)
        program, pattern, what = trap
        real = self.sh(f'command -v {program}').strip()
        self.write(f'/opt/trap/{program}', f'#!/bin/sh\ncase "$*" in *"{pattern}"*) {what};; esac\nexec {real} "$@"\n')
        self.sh(f'chmod 755 /opt/trap/{program}')
        path = {'PATH': '/opt/trap:' + lab.environment()['PATH']}
        try:
            return self.faas('connect', *words, ok=ok, env=path)
        finally:
            self.sh('rm -r /opt/trap')

    def lookup(self, name):
        """What libc finds."""
        return self.host.run(['getent', 'ahosts', name], ok=None).stdout

    def faas_queries(self):
        """What the LAN's server was asked about our zone."""
        return [line for line in self.server.path('/run/lan-queries').read_text().split() if line.endswith('faas.')]

    def files(self):
        """All that a resolver has on this laptop: content and links, without what changes by itself."""
        return self.sh("find /etc /run -xdev ! -name '*.pid' ! -path /run/faas/lock "
                       "! -path '/run/NetworkManager/devices/*' "
                       "\\( -type f -exec sha256sum {} + -o -type l -printf '%l  %p\\n' \\) | sort -k2; "
                       'cat /etc/resolv.conf')

    def assert_as_before(self):
        try:
            lab.wait_until(lambda: self.files() == self.before, 5, 'the files')
        except TimeoutError:
            self.assertMultiLineEqual(self.before, self.files())

    def assert_works(self, name):
        """Names of the LAN and ours are found, each by its own server, and `name` is said to do it."""
        self.assertIn('fd00:faa5:1::a ', self.lookup('hello.faas'))
        lab.wait_until(lambda: '192.0.2.80 ' in self.lookup('printer.lan'), 5, 'printer.lan')
        self.assertEqual('hello', self.sh('curl -s --max-time 5 http://hello.faas/'))
        self.assertEqual([], self.faas_queries())
        status = json.loads(self.faas('status', '--json').stdout)
        self.assertEqual((status['dns'], status['connectivity']), (name, 'active'))

    def assert_comes_and_goes(self, name, *steps):
        """Connect and disconnect; then be killed at each of these steps, and mended by connect and by disconnect."""
        self.before = self.files()
        splits = name in ('systemd-resolved', "NetworkManager's dnsmasq")
        self.assertIn(f'DNS server: fd00:faa5:0:100::{1 if splits else 2} ({name})\n', self.connect().stdout)
        self.assert_works(name)
        self.faas('disconnect')
        self.assert_as_before()
        for step, mend in zip(steps, itertools.cycle(('connect', 'disconnect'))):
            with self.subTest(killed_at=step, mended_by=mend):
                self.connect((*step, 'kill -9 $PPID'), ok=(-9,))
                if mend == 'connect':
                    self.connect()
                    self.assert_works(name)
                self.faas('disconnect')
                self.assert_as_before()

    def assert_falls_back(self, step, says):
        """A step that fails is told, the file is used instead, and nothing of it is left at the end."""
        done = self.connect((*step, 'echo no luck >&2; exit 1'))
        self.assertIn(f'warning: {says}', done.stderr)
        self.assert_works('resolv.conf')
        self.faas('disconnect')
        self.assert_as_before()

    # A file

    def test_a_bare_file_and_a_link_to_one(self):
        self.laptop()
        self.write('/etc/resolv.conf', f'search x\noptions rotate timeout:3\nnameserver {LAN_DNS}\n')
        self.assert_comes_and_goes('resolv.conf', TESTING, TESTING)
        self.sh('mkdir /run/x; mv /etc/resolv.conf /run/x/r; ln -s ../run/x/r /etc/resolv.conf')
        self.assert_comes_and_goes('resolv.conf')
        self.connect()
        for _ in range(6):                      # it rotates no longer
            self.assert_works('resolv.conf')
        self.sh('ip link delete wg-faas; rm -r /run/faas')      # a power cut, after which the file is still there
        self.faas('disconnect')
        self.assert_as_before()

    # systemd-resolved

    def start_resolved(self):
        self.sh('pkill systemd-resolve; true')
        process = self.start('/lib/systemd/systemd-resolved')
        lab.wait_until(lambda: self.host.run(['resolvectl', 'dns', 'eth0', LAN_DNS], ok=None).returncode == 0, 5,
                       'systemd-resolved')
        return process

    def laptop_with_resolved(self, *packages):
        self.laptop('systemd-resolved', 'libnss-resolve', *packages)
        self.sh('id systemd-resolve >/dev/null 2>&1 || { echo systemd-resolve:x:4712:4712::/:/bin/false >>/etc/passwd; '
                'echo systemd-resolve:x:4712: >>/etc/group; }')
        self.start_dbus()

    def test_systemd_resolved_as_a_stub(self):
        self.laptop_with_resolved()
        self.start_resolved()
        self.sh('ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf')
        self.assert_comes_and_goes('systemd-resolved', ('resolvectl', 'domain wg-faas'), TESTING)
        self.assert_falls_back(('resolvectl', 'domain wg-faas'), 'systemd-resolved: no luck; resolv.conf is used')
        self.assert_falls_back(('resolvectl', 'dns wg-faas'), 'systemd-resolved: no luck; resolv.conf is used')

    def test_systemd_resolved_that_is_strict(self):
        self.laptop_with_resolved()
        self.write('/etc/systemd/resolved.conf', '[Resolve]\nDNSSEC=yes\nDNSOverTLS=yes\n')
        self.start_resolved()
        self.sh('ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf')
        self.assertRegex(self.sh('resolvectl status eth0'), r'\+DNSOverTLS DNSSEC=yes')
        self.assertIn('(systemd-resolved)', self.connect().stdout)
        self.assertIn('fd00:faa5:1::a ', self.lookup('hello.faas'))
        self.assertEqual('', self.lookup('nobody.faas'))
        self.assertEqual([], self.faas_queries())

    def test_systemd_resolved_beside_a_file_of_somebody_else(self):
        self.laptop_with_resolved()
        self.assert_comes_and_goes('resolv.conf')               # it is installed, and does not run
        self.start_resolved()
        self.assertIn('foreign', self.sh('resolvectl status'))
        self.assert_comes_and_goes('resolv.conf')               # it runs, and nobody asks it
        self.sh("sed -i 's/^hosts:.*/hosts: files resolve [!UNAVAIL=return] dns/' /etc/nsswitch.conf")
        self.assert_comes_and_goes('systemd-resolved')

    def test_systemd_resolved_that_only_writes_the_file(self):
        self.laptop_with_resolved()
        self.start_resolved()
        self.sh('ln -sf ../run/systemd/resolve/resolv.conf /etc/resolv.conf')
        self.assert_comes_and_goes('resolv.conf')

    # resolvconf

    def test_debians_resolvconf(self):
        self.laptop('resolvconf')
        self.sh('mkdir -p /run/resolvconf/interface; ln -sf ../run/resolvconf/resolv.conf /etc/resolv.conf; '
                f'resolvconf --enable-updates; echo nameserver {LAN_DNS} | resolvconf -a eth0.inet; '
                'echo nameserver 192.0.2.53 | resolvconf -a zzz')
        self.assert_comes_and_goes('resolvconf', ('resolvconf', '-a lo.wg-faas'), TESTING)
        self.assert_falls_back(('resolvconf', '-a lo.wg-faas'), 'resolvconf: no luck; resolv.conf is used')
        self.sh('echo options rotate | resolvconf -a zzz')
        self.before = self.files()
        self.assertIn('warning: resolvconf: /etc/resolv.conf says "options rotate"', self.connect().stderr)
        self.assert_works('resolv.conf')
        self.faas('disconnect')
        self.assert_as_before()
        self.sh('echo nameserver 127.0.0.1 | resolvconf -a lo.dnsmasq')     # goes before ours, and does not answer
        self.before = self.files()
        self.assertIn('warning: resolvconf: it did not put', self.connect().stderr)
        self.faas('disconnect')
        self.assert_as_before()

    def test_openresolv(self):
        self.laptop('openresolv')
        self.sh(f'echo nameserver {LAN_DNS} | resolvconf -a eth0; echo nameserver 192.0.2.53 | resolvconf -a zzz')
        self.assert_comes_and_goes('openresolv', ('resolvconf', '-a lo.wg-faas'), TESTING)
        self.assert_falls_back(('resolvconf', '-a lo.wg-faas'), 'openresolv: no luck; resolv.conf is used')
        self.connect()
        self.sh('ip link delete wg-faas; rm -r /run/faas /run/resolvconf')  # a power cut
        self.faas('disconnect')
        self.assertEqual(self.before.splitlines()[-3:], self.files().splitlines()[-3:])

    def test_openresolv_with_a_local_dnsmasq(self):
        self.laptop('openresolv', 'dnsmasq-base')
        run = ('dnsmasq --user=root --pid-file=/run/dnsmasq.pid --listen-address=127.0.0.1 --bind-interfaces '
               '--no-hosts --conf-file=/run/dnsmasq.conf --resolv-file=/run/dnsmasq-resolv.conf')
        self.write('/etc/resolvconf.conf', 'name_servers=127.0.0.1\ndnsmasq_conf=/run/dnsmasq.conf\n'
                   'dnsmasq_resolv=/run/dnsmasq-resolv.conf\n'
                   f"dnsmasq_restart='while kill $(cat /run/dnsmasq.pid); do sleep 0.05; done 2>/dev/null; {run}'\n")
        self.sh(f'echo nameserver {LAN_DNS} | resolvconf -a eth0')
        self.assert_comes_and_goes('openresolv', TESTING)
        self.connect()
        self.assertIn(f'server=/faas/{ZONE_SERVER}', self.sh('cat /run/dnsmasq.conf'))
        self.assertNotIn(ZONE_SERVER, self.sh('cat /run/dnsmasq-resolv.conf'))

    # NetworkManager

    def start_network_manager(self, dns):
        self.sh('mount -o remount,bind,ro /sys; [ -L /etc/resolv.conf ] || : >/etc/resolv.conf')    # no udev here
        self.write('/etc/NetworkManager/NetworkManager.conf', f'[main]\nplugins=keyfile\ndns={dns}\n')
        lan = '/etc/NetworkManager/system-connections/lan.nmconnection'
        address = self.sh('ip -4 -o address show eth0').split()[3]
        self.write(lan, f'[connection]\nid=lan\ntype=ethernet\ninterface-name=eth0\n[ipv6]\nmethod=ignore\n'
                   f'[ipv4]\nmethod=manual\naddress1={address},{address.replace(".2/24", ".1")}\ndns={LAN_DNS};\n')
        self.sh(f'chmod 600 {lan}')
        self.start('NetworkManager', '--no-daemon')
        lab.wait_until(lambda: '192.0.2.80 ' in self.lookup('printer.lan'), 20, 'NetworkManager')

    def test_network_managers_dnsmasq(self):
        self.laptop('network-manager', 'dnsmasq-base')
        self.start_dbus()
        self.start_network_manager('dnsmasq')
        self.assert_comes_and_goes("NetworkManager's dnsmasq", ('nmcli', 'reload'), TESTING)
        done = self.connect(('nmcli', 'reload', 'echo no luck >&2; exit 1'), ok=(3,))
        self.assertIn("degraded:\n   DNS could not be set up: NetworkManager's dnsmasq: no luck;", done.stdout)
        self.assertIn('192.0.2.80 ', self.lookup('printer.lan'))
        self.faas('disconnect')
        self.assert_as_before()
        self.connect()
        self.sh('ip link delete wg-faas; rm -r /run/faas')      # a power cut
        self.faas('disconnect')
        self.assert_as_before()

    def test_network_manager_with_systemd_resolved(self):
        self.laptop_with_resolved('network-manager')
        self.start('/lib/systemd/systemd-resolved')
        self.sh('ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf')
        self.start_network_manager('systemd-resolved')
        self.assert_comes_and_goes('systemd-resolved', TESTING)
        self.connect()
        self.sh('nmcli device reapply eth0; nmcli general reload dns-full')     # its changes leave ours alone
        self.assert_works('systemd-resolved')

    def test_network_managers_own_file(self):
        self.laptop('network-manager', 'dnsmasq-base')
        self.start_dbus()
        self.start_network_manager('default')
        self.assert_comes_and_goes('resolv.conf')
        self.connect()
        self.sh('nmcli general reload dns-rc')                  # it writes the file anew: told, and mended
        lab.wait_until(lambda: ZONE_SERVER not in self.sh('cat /etc/resolv.conf'), 5, 'a new file')
        self.assertIn('.faas names are not resolved', self.faas('status', ok=(3,)).stdout)
        self.connect()
        self.assert_works('resolv.conf')
        self.faas('disconnect')
        self.assert_as_before()


if __name__ == '__main__':
    unittest.main()
