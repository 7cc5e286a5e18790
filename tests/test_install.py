"""`make install` and `make uninstall`, on machines booted with systemd, and into a DESTDIR."""

import unittest

from host.version import VERSION
from tests import boot, images, lab, programs

FIBONACCI = 'fd00:faa5:1:0::a'
GATEWAY = 'fd00:faa5:0:100::1'
SETTINGS = 'FAAS_VPN_ENDPOINT=faas.example.com'
PROFILE = '/etc/apparmor.d/faas-instance'
# What an uninstall leaves: data and keys.
KEPT = '/etc/faasd/faasd.env /var/lib/faasd/registry.db /etc/wireguard/server_private.key /etc/wireguard/wg0.conf'


def install(machine, *settings):
    """(exit code, output) of `sudo make install`."""
    return machine.type(' '.join(['sudo make install', *settings]), 'faasd')


def is_active(machine, *units):
    return machine.run(['systemctl', 'is-active', *units], ok=None).stdout.split() == ['active'] * len(units)


@lab.needs_root
class Installed(unittest.TestCase):
    """A server as the README installs it, and a laptop with systemd-resolved that joined it."""

    @classmethod
    def setUpClass(cls):
        lan = cls.enterClassContext(boot.lan())
        cls.server = boot.Machine(lan, 'server', boot.SERVER)
        cls.laptop = boot.Machine(lan, 'laptop', boot.LAPTOP)
        cls.server.copy(lab.REPO, 'faasd')
        cls.laptop.copy(lab.REPO / 'faas', 'faas')
        cls.server.sh('mkdir -p /etc/apparmor.d')
        code, output = install(cls.server, SETTINGS)
        assert code == 0, output
        cls.server.sh('faas new fibonacci')
        code, output = cls.laptop.type(cls.server.sh('faas vpn invite laptop'))
        assert code == 0, output

    def asked(self, url='http://fibonacci.faas/?n=10', seconds=60):
        """What curl on the laptop gets, as soon as it gets something."""
        curl = f'curl -sg --max-time 5 {url}'
        return lab.wait_until(lambda: self.laptop.sh(curl, ok=None), seconds, curl)

    def here(self):
        """What the function answers on the server itself, where no tunnel has to shake hands anew."""
        return self.server.sh(f'curl -sg --max-time 10 http://[{FIBONACCI}]/?n=10', ok=None)

    def test_the_documents_own_checks(self):
        for command, seen in (
            (f'ping6 -c 3 {GATEWAY}', '3 received, 0% packet loss'),
            (f'dig fibonacci.faas AAAA @{GATEWAY}',
             r'NOERROR(.|\n)*fibonacci\.faas\.\s+60\s+IN\s+AAAA\s+fd00:faa5:1::a'),
            (f'nslookup fibonacci.faas {GATEWAY}', r'Name:\s+fibonacci\.faas\nAddress: fd00:faa5:1::a'),
            (f'curl -6 http://[{FIBONACCI}]/?n=10', '0, 1, 1, 2, 3, 5, 8, 13, 21, 34'),
            ('curl http://fibonacci.faas/?n=10', '0, 1, 1, 2, 3, 5, 8, 13, 21, 34'),
            ('ip -6 route show', r'fd00:faa5::/32 dev wg-faas '),
            (f'traceroute6 {FIBONACCI}', r'\n 1 +(fibonacci\.faas|fd00:faa5:1::a) '),
        ):
            with self.subTest(command):
                self.assertRegex(self.laptop.sh(command), seen)
        self.assertRegex(self.server.sh('ip -6 addr show dev wg0'), 'fd00:faa5:1::a/128 (.|\n)*fd00:faa5:0:100::1/64 ')

    def test_only_faas_goes_through_the_tunnel(self):
        status = self.laptop.sh('resolvectl status wg-faas --no-pager')
        self.assertRegex(status, r'DNS Domain: ~faas')
        self.assertRegex(status, GATEWAY)
        self.assertIn('link: wg-faas', self.laptop.sh('resolvectl query fibonacci.faas'))

    def test_a_resolver_that_forgets_is_told_and_mended(self):
        self.laptop.write('/etc/systemd/network/90-all.network', '[Match]\nName=*\n[Network]\nLLMNR=yes\n')
        self.laptop.sh('systemctl restart systemd-networkd')
        # networkd takes up wg-faas as well, and drops what resolved was told of it
        lab.wait_until(lambda: '~faas' not in self.laptop.sh('resolvectl domain wg-faas'), 10, 'the loss')
        code, output = self.laptop.type('./faas vpn status')
        self.assertEqual(3, code)
        self.assertIn('DNS: ❌ .faas names are not resolved on this machine', output)
        self.laptop.sh('rm /etc/systemd/network/90-all.network; systemctl restart systemd-networkd')
        code, output = self.laptop.type('./faas vpn connect laptop')
        self.assertEqual(0, code, output)
        self.assertIn('34', self.asked())

    def test_the_units_are_sound(self):
        units = 'faasd.service faas-coredns.service faas-instances.service wg-quick@wg0.service faas.slice'
        done = self.server.run(['sh', '-c', f'systemd-analyze verify --man=no {units}'])
        self.assertEqual('', done.stdout + done.stderr)
        self.assertNotIn('ordering cycle', self.server.sh('journalctl --no-pager'))
        self.assertEqual('', self.server.sh('systemctl --failed --no-legend'))
        self.assertTrue(is_active(self.server, 'faasd', 'faas-coredns', 'faas-instances', 'wg-quick@wg0'))
        self.assertEqual('0660 root faas', self.server.sh("stat -c '0%a %U %G' /run/faasd/faasd.sock").strip())

    def test_instances_live_in_a_cgroup_that_is_not_faasds(self):
        self.asked()
        pid = self.server.sh("pgrep -f '^/usr/bin/python3 .* /opt/faas/runtime.py' | head -n 1").strip()
        for line in self.server.sh(f'cat /proc/{pid}/cgroup').splitlines():
            if 'memory' in line or 'pids' in line or line.startswith('0::'):
                self.assertRegex(line, r':/faas\.slice/faas-instances\.service/faas-[0-9a-f]+/faas-')

    def test_peers_survive_reload_and_restart_of_wg_quick(self):
        peers = self.server.sh('wg show wg0 peers')
        self.assertTrue(peers)
        self.server.sh('systemctl reload wg-quick@wg0')
        self.assertEqual(peers, self.server.sh('wg show wg0 peers'))
        self.server.sh('systemctl restart wg-quick@wg0')
        lab.wait_until(lambda: self.server.sh('wg show wg0 peers') == peers, 10, 'the peers')
        self.assertIn('34', self.asked())
        self.assertTrue(is_active(self.server, 'faasd', 'faas-coredns'))

    def test_a_broken_wg0_conf_cannot_wipe_the_peers_by_a_reload(self):
        peers = self.server.sh('wg show wg0 peers')
        self.server.sh('mv /etc/wireguard/wg0.conf /root/')
        self.server.run(['systemctl', 'reload', 'wg-quick@wg0'], ok=(1,))
        self.server.sh('mv /root/wg0.conf /etc/wireguard/')
        self.assertEqual(peers, self.server.sh('wg show wg0 peers'))

    def test_a_restart_of_faasd_is_none_of_what_listens_by_itself(self):
        server = 'import http.server, socket\nclass Server(http.server.ThreadingHTTPServer):\n'
        server += '    address_family = socket.AF_INET6\n'
        server += 'Server(("::", 80), http.server.SimpleHTTPRequestHandler).serve_forever()\n'
        self.server.write('/root/listens/faas.toml', 'command = ["/usr/bin/python3", "server.py"]\n')
        self.server.write('/root/listens/server.py', server)
        self.server.sh('faas new listens')
        ipv6 = self.server.sh('faas ip listens').strip()
        asking = f"""
            for try in $(seq 400); do
                curl -sg --max-time 5 -o /dev/null "http://[{ipv6}]/" || echo "$try failed"
                [ $try != 20 ] || systemctl restart faasd &
            done; wait"""
        self.assertEqual('', self.server.sh(asking))
        self.assertTrue(is_active(self.server, 'faasd'))
        self.server.sh('systemctl stop faasd')
        self.server.run(['pgrep', '-f', 'server.py'], ok=(1,))
        self.server.sh('systemctl start faasd; faas rm listens')

    def test_an_image_under_the_hardened_unit(self):
        """With a state directory that can map ids, which the machine's own file system, an overlay, cannot."""
        program = programs.static_busybox().read_bytes()
        page = images.layer(('busybox', program, {'mode': 0o755}), ('www/index.html', b'from an image\n'))
        command = ['/busybox', 'httpd', '-f', '-p', '[::]:80', '-h', '/www']
        archive = images.image([page], {'Cmd': command, 'User': '33'})
        self.server.lan.path(f'{self.server.root}/root/image.tar').write_bytes(archive)
        self.assertIn('cannot map ids', self.server.run(['faas', 'new', 'image', 'image.tar'], ok=(1,)).stderr)
        self.server.sh('systemctl stop faasd; mount -t tmpfs -o mode=711 state /var/lib/faasd; systemctl start faasd')
        try:
            self.server.sh('faas new image image.tar')
            ipv6 = self.server.sh('faas ip image').strip()
            self.assertEqual('from an image\n', self.server.sh(f'curl -sg --max-time 10 "http://[{ipv6}]/"'))
            self.server.sh('systemctl restart faasd')
            self.assertEqual('from an image\n', self.server.sh(f'curl -sg --max-time 10 "http://[{ipv6}]/"'))
        finally:
            self.server.sh('systemctl stop faasd; umount --lazy /var/lib/faasd; systemctl start faasd')

    def test_secrets_and_folders_of_the_server_under_the_hardened_unit(self):
        service = '[Service]\nRuntimeDirectory=clock\nExecStart=/bin/sh -c "date +%%N >/run/clock/now; sleep 9999"\n'
        handler = (
            'def app(environ, start_response):\n'
            '    start_response("200 OK", [])\n'
            '    now = open("/run/clock/now").read()\n'
            '    with open("/srv/shared/" + now.strip(), "w") as file:\n'
            '        file.write(open("/run/secrets/KEY").read())\n'
            '    return [now.encode()]\n'
        )
        env = self.server.sh('cat /etc/faasd/faasd.env')
        self.server.write('/etc/systemd/system/clock.service', service)
        self.server.write('/etc/faasd/faasd.env', f'{env}FAAS_MOUNTS=/run/clock /srv/shared:rw\n')
        self.server.write('/home/joe/tells/handler.py', handler)
        wanted = 'secrets = ["KEY"]\n[mounts]\n"/run/clock" = "ro"\n"/srv/shared" = "rw"\n'
        self.server.write('/home/joe/tells/faas.toml', wanted)
        try:
            self.server.sh('mkdir -m 777 /srv/shared; systemctl start clock; systemctl restart faasd')
            self.assertEqual('Set KEY\n', self.server.sh('echo value | faas secret set KEY 2>&1'))
            self.assertEqual('systemd-creds\n', self.server.sh('head -n 1 /var/lib/faasd/secrets/KEY'))
            self.server.sh('usermod -aG faas joe')
            code, output = self.server.type('sg faas -c "faas new tells"')
            self.assertEqual((1, True), (code, 'only root deploys' in output), output)
            self.server.sh('faas new tells /home/joe/tells')
            ipv6 = self.server.sh('faas ip tells').strip()
            told = f'curl -sg --max-time 10 "http://[{ipv6}]/"'
            first = self.server.sh(told)
            self.assertEqual(first, self.server.sh('cat /run/clock/now'))
            self.assertEqual('value', self.server.sh('cat /srv/shared/*'))
            self.server.sh('systemctl restart clock')
            now = lab.wait_until(lambda: self.server.sh('cat /run/clock/now', ok=None), 10, 'the clock')
            lab.wait_until(lambda: self.server.sh(told) == now != first, 20, 'the new one')
        finally:
            self.server.write('/etc/faasd/faasd.env', env)
            self.server.sh('gpasswd -d joe faas; faas rm -y tells; faas secret rm KEY; systemctl stop clock', ok=None)
            self.server.sh('rm -r /srv/shared; systemctl restart faasd')

    def test_a_killed_faasd_and_a_killed_coredns_come_back(self):
        self.server.sh('systemctl kill --signal=KILL faasd faas-coredns')
        lab.wait_until(lambda: is_active(self.server, 'faasd', 'faas-coredns'), 20, 'both')
        self.assertIn('34', self.asked())

    def test_the_group_deploys_without_sudo(self):
        self.assertIn('join the group faas', self.server.type('faas list')[1])
        self.server.sh('usermod -aG faas joe')
        self.addCleanup(self.server.sh, 'gpasswd -d joe faas')
        code, output = self.server.type('sg faas -c "faas new hello"')
        self.assertEqual(0, code, output)
        self.server.sh('faas rm hello')

    def test_reboot(self):
        self.server.reboot()
        self.assertEqual('running', self.server.state, self.server.sh('systemctl --failed --no-pager'))
        self.assertIn('34', self.asked())
        self.assertNotIn('ordering cycle', self.server.sh('journalctl --no-pager --boot'))

    def test_install_over_a_running_server(self):
        before = self.server.sh('cat /etc/wireguard/wg0.conf /etc/faasd/faasd.env; wg show wg0 peers')
        invocation = self.server.sh('systemctl show --property=InvocationID wg-quick@wg0')
        stale = '/usr/local/lib/faasd/no_more.py'
        self.server.sh(f'touch {stale}')
        given = 'FAAS_VPN_ENDPOINT=192.0.2.1', 'FAAS_WG_PORT=51999', 'FAAS_WG_INTERFACE=wg8'
        code, output = install(self.server, *given)
        self.assertEqual(0, code, output)
        for setting in given:
            self.assertIn(f'install: kept /etc/faasd/faasd.env as it is; {setting} is yours', output)
        self.server.run(['test', '-e', '/etc/wireguard/wg8.conf'], ok=(1,))
        self.server.run(['test', '-e', stale], ok=(1,))
        self.assertEqual(before, self.server.sh('cat /etc/wireguard/wg0.conf /etc/faasd/faasd.env; wg show wg0 peers'))
        self.assertEqual(invocation, self.server.sh('systemctl show --property=InvocationID wg-quick@wg0'))
        self.assertIn('34', self.asked())
        self.assertEqual('', self.server.sh('find /home/joe/faasd -name __pycache__'))
        self.assertNotIn('kept', install(self.server)[1])

    def test_a_wg0_that_somebody_brought_up_by_hand_becomes_a_service(self):
        self.server.sh('systemctl stop faasd wg-quick@wg0; wg-quick up wg0')
        code, output = install(self.server)
        self.assertEqual(0, code, output)
        self.assertTrue(is_active(self.server, 'faasd', 'faas-coredns', 'wg-quick@wg0'))
        self.assertIn('34', self.here())

    def test_edits_of_faasd_env(self):
        env = self.server.sh('cat /etc/faasd/faasd.env')
        for wrong, said in (
            ('FAAS_PIDS=many', 'faasd: FAAS_PIDS=many: '), ('FAAS_WRONG=1', 'there is no setting FAAS_WRONG'),
        ):
            self.server.write('/etc/faasd/faasd.env', env + wrong + '\n')
            code, output = install(self.server)
            self.assertNotEqual(0, code)
            self.assertIn(said, output.splitlines()[0])
            self.assertTrue(is_active(self.server, 'faasd'))        # what ran runs on
            self.server.run(['systemctl', 'restart', 'faasd'], ok=(1,))
            state = self.server.sh('systemctl show --property=SubState,NRestarts faasd').split()
            self.assertEqual(['NRestarts=0', 'SubState=failed'], sorted(state))
            self.server.write('/etc/faasd/faasd.env', env)
            self.server.sh('systemctl restart faasd')
        # As an editor of another system leaves it, pasted from a web page.
        self.server.write('/etc/faasd/faasd.env', f'\ufeffFAAS_WG_INTERFACE=\xa0"wg7"\r\n{env}FAAS_WG_PORT=51999')
        code, output = install(self.server)
        self.assertEqual(0, code, output)
        self.assertNotIn('kept', output)
        self.assertEqual('51999', self.server.sh('wg show wg7 listen-port').strip())
        units = 'systemctl list-units --no-legend; ls /etc/systemd/system/*.wants'
        self.assertNotIn('wg0', self.server.sh(f'ip link; {units}'))
        self.assertIn('34', self.here())
        self.server.write('/etc/faasd/faasd.env', env)
        code, output = install(self.server)
        self.assertEqual(0, code, output)
        self.assertIn('34', self.here())

    def test_a_service_that_does_not_start_says_why(self):
        conf = self.server.sh('cat /etc/wireguard/wg0.conf')
        self.addCleanup(install, self.server)
        self.addCleanup(self.server.write, '/etc/wireguard/wg0.conf', conf)
        for wrong, said in (
            (conf.replace('Address = fd00:faa5:0:100::1/64', 'Address = 10.9.9.1/24'),
             'faasd: wg0 does not have the address fd00:faa5:0:100::1'),
            (conf.replace('[Interface]', '[Interface]\nBogus = 1'), 'Line unrecognized: `Bogus=1'),
        ):
            self.server.write('/etc/wireguard/wg0.conf', wrong)
            self.server.sh('systemctl stop wg-quick@wg0')
            code, output = install(self.server)
            self.assertNotEqual(0, code)
            self.assertIn(said, output)

    def test_uninstall_leaves_data_and_keys_and_an_install_finds_them(self):
        self.pretend_apparmor()
        code, output = self.server.type('sudo make uninstall', 'faasd')
        self.assertEqual(0, code, output)
        self.server.sh(f'ls {KEPT}')
        self.assertEqual('', self.left(self.server))
        self.assertEqual(f'--remove {PROFILE}\n', self.server.sh('cat /root/parser'))
        self.server.sh('wg-quick up wg0')                         # by hand: the next install gives it to the unit
        code, output = install(self.server)
        self.assertEqual(0, code, output)
        self.assertIn('34', self.here())
        self.assertTrue(is_active(self.server, 'wg-quick@wg0'))
        self.assertEqual(f'--replace {PROFILE}\n', self.server.sh('tail -n 1 /root/parser'))
        self.assertTrue(self.server.sh(f'cat {PROFILE}').startswith(f'# faasd {VERSION}\n'))

    def pretend_apparmor(self):
        """What would be there with AppArmor, which not all kernels have. The parser writes down how it is called."""
        self.server.sh('mount -t tmpfs security /sys/kernel/security; mkdir /sys/kernel/security/apparmor')
        self.addCleanup(self.server.sh, 'umount /sys/kernel/security; rm /usr/sbin/apparmor_parser /root/parser')
        self.server.write('/usr/sbin/apparmor_parser', '#!/bin/sh\nls "$2" >/dev/null && echo "$@" >>/root/parser\n')
        self.server.sh('chmod 755 /usr/sbin/apparmor_parser')

    @staticmethod
    def left(machine):
        """What is left of an installation, beside data and keys."""
        return machine.sh(
            'ls -d /usr/local/lib/faasd* /usr/local/bin/faas /usr/local/lib/systemd/system/* /run/faasd '
            '/etc/apparmor.d/faas* /etc/systemd/system/*.wants/*faas* /etc/systemd/system/*.wants/wg-quick* '
            '/sys/class/net/wg* /sys/fs/cgroup/*/faas* /sys/fs/cgroup/faas* 2>/dev/null; '
            'getent group faas; nft list tables; pgrep -a coredns; pgrep -af "faasd\\.py"', ok=None)


@lab.needs_root
class Refused(unittest.TestCase):
    """A server where something stands in the way."""

    @classmethod
    def setUpClass(cls):
        cls.server = boot.Machine(cls.enterClassContext(boot.lan()), 'server', boot.SERVER)
        cls.server.copy(lab.REPO, 'faasd')

    def refused(self, said, *settings):
        """The install says that in one line, and has changed nothing."""
        code, output = install(self.server, SETTINGS, *settings)
        self.assertNotEqual(0, code)
        self.assertRegex(output, rf'^(faasd|install): {said}.*\)\nmake: \*\*\* .*\n$')
        self.assertEqual('', Installed.left(self.server).replace('wg0', '').replace('/sys/class/net/\n', ''))
        self.assertEqual('', self.server.sh('ls -d /etc/faasd /var/lib/faasd /etc/coredns 2>/dev/null', ok=None))

    def test_a_foreign_wg0_is_left_alone_and_another_name_works(self):
        theirs = f'[Interface]\nPrivateKey = {self.server.sh("wg genkey").strip()}\nAddress = 10.9.9.1/24\n'
        self.server.write('/etc/wireguard/wg0.conf', theirs)
        self.server.sh('wg-quick up wg0')
        self.refused("wg0 is not faasd's: .* .set FAAS_WG_INTERFACE to another name")
        code, output = install(self.server, SETTINGS, 'FAAS_WG_INTERFACE=wg1')
        self.assertEqual(0, code, output)
        self.assertEqual(theirs, self.server.sh('cat /etc/wireguard/wg0.conf'))
        self.assertIn('FAAS_WG_INTERFACE=wg1\n', self.server.sh('cat /etc/faasd/faasd.env'))
        self.server.sh('faas new fibonacci')
        self.assertIn('34', self.server.sh(f'curl -sg http://[{FIBONACCI}]/?n=10'))
        code, output = self.server.type('sudo make uninstall PURGE=1', 'faasd')
        self.assertEqual(0, code, output)
        self.assertEqual('wg0.conf\n', self.server.sh('ls /etc/wireguard'))
        self.assertEqual('wg0\n', self.server.sh('wg show interfaces'))
        self.server.sh('wg-quick down wg0; rm /etc/wireguard/wg0.conf')

    def test_a_web_server_on_every_address(self):
        self.server.sh('systemd-run --quiet --unit=web python3 -m http.server 80 --bind ::')
        self.addCleanup(self.server.sh, 'systemctl stop web')
        lab.wait_until(lambda: self.server.sh('ss -Htln sport = :80'), 10, 'it')
        self.refused(r'TCP port 80 is in use by python3 \(let it listen on addresses of its own')

    def test_a_faasd_that_was_started_by_hand(self):
        self.server.sh('systemd-run --quiet --unit=by-hand python3 /home/joe/faasd/faasd.py --standalone')
        self.addCleanup(self.server.sh, 'systemctl stop by-hand; rm -rf /var/lib/faasd /run/faasd /etc/coredns')
        lab.wait_until(lambda: '[faasd] Ready' in self.server.sh('journalctl -u by-hand'), 30, 'it')
        for verb in ('install', 'uninstall'):
            code, output = self.server.type(f'sudo make {verb}', 'faasd')
            self.assertNotEqual(0, code)
            self.assertRegex(output, rf'^install: a faasd that was started by hand .* sudo make {verb}\n')
        self.server.sh('ls /run/faasd/faasd.sock; ls /sys/class/net/wg0')

    def test_purge_leaves_the_tunnels_of_others_alone(self):
        code, output = install(self.server, SETTINGS)
        self.assertEqual(0, code, output)
        self.server.write('/etc/wireguard/theirs.conf', '[Interface]\n\nListenPort = 51999\n')
        self.server.sh('echo >/etc/wireguard/server_private.key')
        code, output = self.server.type('sudo make uninstall PURGE=1', 'faasd')
        self.assertEqual(0, code, output)
        self.assertIn('theirs.conf', self.server.sh('ls /etc/wireguard'))
        self.server.sh('rm -rf /etc/wireguard/*')

    def test_uninstall_where_faas_is_a_users_own_group(self):
        self.server.sh('useradd --user-group faas')
        code, output = install(self.server, SETTINGS)
        self.assertEqual(0, code, output)
        code, output = self.server.type('sudo make uninstall PURGE=1', 'faasd')
        self.assertEqual(0, code, output)
        self.assertIn('install: left: the group faas', output)
        self.server.sh('userdel faas')
        self.assertEqual('', Installed.left(self.server))
        self.server.run(['test', '-e', '/var/lib/faasd'], ok=(1,))

    def test_a_setting_that_is_none(self):
        self.refused('there is no setting FAAS_PORT .docs/API.md lists them', 'FAAS_PORT=51999')

    def test_without_root(self):
        code, output = self.server.type('make install', 'faasd')
        self.assertNotEqual(0, code)
        self.assertEqual('install: this needs root: sudo make install', output.splitlines()[0])

    def test_a_python_that_is_too_old(self):
        self.server.sh('mv /usr/bin/python3 /usr/bin/python3.kept; cp /bin/false /usr/bin/python3; '
                       'mv /usr/bin/python3.11 /usr/bin/kept')
        self.addCleanup(self.server.sh, 'cd /usr/bin; mv kept python3.11; mv python3.kept python3')
        code, output = install(self.server, SETTINGS)
        self.assertNotEqual(0, code)
        self.assertRegex(output, r'^install: Python 3.11 or newer is needed')


@lab.needs_root
class Packaged(unittest.TestCase):
    """Into a folder, as packagers do."""

    def test_destdir_and_prefix(self):
        with lab.Host('builder') as host:
            before = host.sh('ls /usr/lib/faasd /usr/local/lib/faasd /etc/faasd 2>&1', ok=None)
            host.sh('make install DESTDIR=/tmp/tree PREFIX=/usr FAAS_DNS_FORWARD=192.0.2.1')
            files = host.sh('cd /tmp/tree; find . -type f').split()
            for path in ('./usr/bin/faas', './usr/lib/faasd/faasd.py', './usr/lib/faasd/handlers/fibonacci/handler.py',
                         './usr/lib/faasd/handlers/go/main.go', './usr/lib/faasd/handlers/node/faas.toml',
                         './usr/lib/systemd/system/faasd.service', './etc/faasd/faasd.env',
                         './etc/apparmor.d/faas-instance',
                         './usr/lib/systemd/system/wg-quick@wg0.service.d/faasd.conf'):
                self.assertIn(path, files)
            units = host.sh('cat /tmp/tree/usr/lib/systemd/system/*.service')
            self.assertIn('/usr/lib/faasd/faasd.py', units)
            self.assertNotRegex(units, r'@[A-Z]+@|/tmp/tree')
            for unit in host.sh('ls /tmp/tree/usr/lib/systemd/system/faas*').split():
                self.assertTrue(host.sh(f'cat {unit}').startswith(f'# faasd {VERSION}\n'), unit)
            self.assertIn('FAAS_DNS_FORWARD=192.0.2.1', host.sh('cat /tmp/tree/etc/faasd/faasd.env'))
            self.assertEqual(before, host.sh('ls /usr/lib/faasd /usr/local/lib/faasd /etc/faasd 2>&1', ok=None))
            self.assertNotIn('\nfaas:', host.sh('cat /etc/group'))
            host.sh('make install DESTDIR=/tmp/tree PREFIX=/usr', env={'FAAS_INVITE': 'secret'})
            self.assertNotIn('secret', host.sh('grep -r secret /tmp/tree/etc', ok=None))
            for bad in 'PREFIX="/opt/my stuff"', 'PREFIX=opt', "PREFIX='/opt/&|'", 'UNITDIR=/opt/%i':
                done = host.run(['sh', '-c', f'make install DESTDIR=/tmp/bad {bad}; test ! -e /tmp/bad'])
                self.assertRegex(done.stderr, '^install: PREFIX and UNITDIR: ')
            host.sh('make uninstall DESTDIR=/tmp/tree PREFIX=/usr')
            self.assertEqual(['./etc/faasd/faasd.env'], host.sh('cd /tmp/tree; find . -type f').split())
            host.sh('make uninstall DESTDIR=/tmp/tree PREFIX=/usr PURGE=1')
            self.assertEqual('', host.sh('cd /tmp/tree; find . -type f'))
            refused = host.run(['make', 'install', 'DESTDIR=/tmp/tree', 'FAAS_WG_PROT=1'], ok=(2,)).stderr
            self.assertRegex(refused, '^install: there is no setting FAAS_WG_PROT ')
            host.run(['make', 'install', 'DESTDIR=/tmp/tree', 'FAAS_WG_PORT=51999', 'FAAS_MEMORY=1G'])
            host.run(['make', 'uninstall', 'DESTDIR=/tmp/tree', 'PURGE=1'])
            self.assertEqual('', host.sh('cd /tmp/tree; find . -type f'))

    def test_a_purge_takes_what_has_our_key_and_nothing_else(self):
        with lab.Host('builder') as host:
            host.sh('mkdir -p /tmp/tree/etc/wireguard; cd /tmp/tree/etc/wireguard; wg genkey >server_private.key; '
                    'for each in wg0 wg1; do echo "PrivateKey = $(cat server_private.key)" >$each.conf; done; '
                    'echo "PrivateKey = $(wg genkey)" >theirs.conf')
            host.sh('make uninstall PURGE=1 DESTDIR=/tmp/tree')
            self.assertEqual('theirs.conf\n', host.sh('ls /tmp/tree/etc/wireguard'))


if __name__ == '__main__':
    unittest.main()
