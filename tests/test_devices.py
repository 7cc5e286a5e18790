"""What a device meets on its way to a real faasd: narrow paths, other WireGuard clients, sudo."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import unittest

from tests import lab, packages, serving

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
        return re.search(r'faas1_\S+', self.on_server('vpn', 'invite', *words))[0]

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
            self.assertRegex(done.stderr, r'\Aerror: .* is not an MTU from 1280 to 9000\nhint: .*\n\Z')

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
        command = f'{sys.executable} {FAAS} vpn list'
        shown = self.laptop.run(['script', '-qec', command, '/dev/null'], env={'TERM': 'xterm'})
        self.assertEqual(shown.stdout.replace('\r\n', '\n'), f'''
Saved VPN Configurations:
┌──────────────┬────────────────────────┬──────────┐
│ Name         │ IPv6                   │ Status   │
├──────────────┼────────────────────────┼──────────┤
│ default      │ {default:<22} │ saved    │
│ work         │ {work:<22} │ active   │
└──────────────┴────────────────────────┴──────────┘
''')
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

    # A person with sudo

    def joe(self, sudoers):
        """Run the client as a plain user whom sudo lets do this: a function like self.faas."""
        if self.laptop.run(['which', 'sudo'], ok=None).returncode:
            packages.put(self.laptop, 'sudo')
        self.laptop.run(['sh', '-c', r"""
            rm -rf /home/joe /run/sudo; mkdir -p /opt/joe; cp "$1" /opt/joe/faas
            if ! id joe >/dev/null 2>&1; then
                echo 'joe:x:4712:4712::/home/joe:/bin/sh' >>/etc/passwd
                echo 'joe:x:4712:' >>/etc/group
                echo 'joe:*:19000:0:99999:7:::' >>/etc/shadow
            fi
            mkdir -m 700 /home/joe; chown joe:joe /home/joe""", 'sh', FAAS])
        path = self.laptop.path('/etc/sudoers')
        path.write_text(f'Defaults env_reset\n{sudoers}\n')
        path.chmod(0o440)

        def faas(*words, ok=(0,), by=('/usr/bin/python3',), **options):
            command = ['setpriv', '--reuid=joe', '--regid=joe', '--init-groups', *by, '/opt/joe/faas', *words]
            return self.laptop.run(command, ok=ok, cwd='/home/joe', env=env, **options)

        env = {'HOME': '/home/joe', 'USER': 'joe', 'LOGNAME': 'joe', 'PATH': '/usr/local/bin:/usr/bin:/bin'}
        self.addCleanup(self.laptop.run, ['rm', '-rf', '/home/joe'])
        self.addCleanup(self.faas, 'vpn', 'disconnect', ok=None)
        return faas

    def state(self):
        """What a connection may change on the laptop."""
        say = ('ip -o link; ip -6 route | sort; cat /etc/resolv.conf; ls -l /etc/resolv.conf; ls -A /etc | grep resolv;'
               ' ls -A /run/faas; pgrep wireguard; find /home/joe/.config -name "*.json"')
        return self.laptop.run(['sh', '-c', say], ok=None).stdout

    def test_everything_works_for_a_person_with_sudo(self):
        joe = self.joe('joe ALL=(ALL) NOPASSWD: ALL')
        joe('vpn', 'connect', '--invite', self.invite('--admin'))
        self.assert_names_work()
        self.assertRegex(joe('vpn', 'status').stdout, r'Last handshake: \d+ seconds? ago\n')
        self.assertRegex(joe('vpn', 'list').stdout, r'\ndefault +fd00:\S+ +active\n')
        self.assertIn('fibonacci', joe('list').stdout)
        self.addCleanup(self.on_server, 'vpn', 'remove', 'phone')
        self.assertIn('\nDNS = fd00:faa5:0:100::1\n', joe('vpn', 'create', 'phone').stdout)
        self.assertIn('phone', joe('vpn', 'list', '--peers').stdout)
        token = re.search(r'faas1_\S+', joe('vpn', 'invite').stdout)[0]
        self.assertEqual(joe('vpn', 'connect', '--mtu', '1300').returncode, 0)
        joe('vpn', 'connect', 'second', '--switch', '--invite', token)
        self.assertEqual(joe('vpn', 'disconnect').stdout, 'Disconnecting FaaS VPN...\n\nDisconnected.\n')
        joe('vpn', 'connect', by=('sudo', '/usr/bin/python3'))          # the same configs by "sudo ./faas"
        self.assertRegex(joe('vpn', 'list', by=('sudo', '/usr/bin/python3')).stdout, r'\ndefault .* active\n')
        strangers = ('find /home/joe ! -user joe -o ! -group joe; find /home/joe -type f ! -perm 600; '
                     'find /root/.config/faas -name "*.json"')
        self.assertEqual(self.laptop.run(['sh', '-c', strangers], ok=None).stdout, '')
        joe('vpn', 'disconnect')
        joe('vpn', 'remove', 'second', by=('sudo', '/usr/bin/python3'))
        self.assertEqual(joe('vpn', 'remove').stdout, 'Removed VPN configuration: default\n')
        self.assertEqual(joe('vpn', 'list', '--json').stdout, '[]\n')
        self.assertEqual(self.laptop.run(['ls', '-A', '/run/faas']).stdout, 'lock\n')

    def test_the_password_is_asked_for_once(self):
        self.joe('joe ALL=(ALL) ALL')
        self.laptop.run(['chpasswd', '-c', 'SHA512'], input='joe:secret')
        command = f'/usr/bin/python3 /opt/joe/faas vpn connect --invite {self.invite()}'
        command = ['setpriv', '--reuid=joe', '--regid=joe', '--init-groups', 'script', '-qec', command, '/dev/null']
        process = self.laptop.popen(command, env={'HOME': '/home/joe', 'USER': 'joe', 'TERM': 'xterm'}, cwd='/home/joe',
                                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            said = b''
            while b'password for joe:' not in said:     # what is typed before is thrown away
                said += process.stdout.read(1) or self.fail(said)
            process.stdin.write(b'secret\n')
            process.stdin.flush()
            said += process.stdout.read()
        self.assertIn('✅ Connected!', said.decode())
        self.assertEqual(said.count(b'password for'), 1, said.decode())
        self.faas('vpn', 'disconnect')

    def test_a_sudo_that_refuses_is_one_error_and_changes_nothing(self):
        ip, shell = (self.laptop.run(['sh', '-c', f'command -v {name}']).stdout.strip() for name in ('ip', 'sh'))
        self.laptop.run(['rm', '-rf', '/run/faas'])
        for sudoers, says in (
                ('', 'this needs root, and sudo did not give it: '),                    # it wants a password
                ('joe ALL=(ALL', 'this needs root, and sudo did not give it: '),        # a broken file
                ('Defaults !authenticate\njoe ALL=(ALL) /bin/ls', 'this needs root, and sudo did not give it: Sorry, '),
                (f'joe ALL=(ALL) NOPASSWD: {ip}', 'sudo: a password is required'),
                (f'joe ALL=(ALL) NOPASSWD: {ip}, {shell}, /usr/bin/setsid', 'Added peer: server: failed: ')):
            joe, token = self.joe(sudoers), self.invite()
            before = self.state()
            done = joe('vpn', 'connect', '--invite', '-', ok=(1,), input=token)
            with self.subTest(sudoers, said=done.stderr):
                self.assertRegex(done.stderr, r'\Aerror: .*\nhint: .*\n\Z')
                self.assertIn(says, done.stderr)
                if 'peer' in says:                      # registered: that is kept
                    self.assertIn('default.json', self.laptop.run(['ls', '/home/joe/.config/faas/vpn']).stdout)
                    self.laptop.run(['rm', '-rf', '/home/joe/.config', '/run/faas'])
                self.assertEqual(self.state(), before)

    # Devices without the client

    def configuration(self, *options):
        """What `vpn create phone` prints."""
        self.addCleanup(self.on_server, 'vpn', 'remove', 'phone')
        return self.on_server('vpn', 'create', 'phone', *options)

    def other_host(self):
        """A host that reaches the server and has nothing of ours."""
        host = lab.Host('other')
        self.addCleanup(host.close)
        lab.join(self.server, host, ('198.51.100.1/24',), ('198.51.100.2/24',))
        host.run(['ip', 'route', 'add', 'default', 'via', '198.51.100.1'])
        return host

    def test_wg_quick_takes_the_configuration(self):
        phone = self.other_host()
        text = self.configuration()
        path = phone.path('/etc/wireguard/phone.conf')
        path.touch(0o600)
        path.write_text(text)
        phone.run(['rm', '-f', '/sbin/resolvconf', '/usr/sbin/resolvconf', '/usr/bin/resolvconf'])
        done = phone.run(['wg-quick', 'up', 'phone'], ok=None)
        self.assertNotEqual(done.returncode, 0)         # as docs/DEVICES.md says: it wants resolvconf for DNS
        self.assertIn('resolvconf: command not found', done.stderr)
        self.assertNotIn('phone', phone.run(['ip', '-o', 'link']).stdout)
        packages.put(phone, 'openresolv')
        phone.run(['wg-quick', 'up', 'phone'])
        fibonacci = ['curl', '-s', '--max-time', '5', 'http://fibonacci.faas/?n=3']
        self.assertEqual(phone.run(fibonacci).stdout, 'Fibonacci sequence (3 steps):\n0, 1, 1\n')
        self.assertRegex(self.on_server('vpn', 'list', '--peers'), r'\nphone .* active\n')
        phone.run(['wg-quick', 'down', 'phone'])
        self.assertEqual(phone.path('/etc/resolv.conf').read_text(), f'nameserver {lab.NAMESERVER}\n')
        path.write_text(text.replace('DNS = fd00:faa5:0:100::1\n', ''))
        phone.run(['rm', '/usr/sbin/resolvconf'])
        phone.run(['wg-quick', 'up', 'phone'])          # addresses without names
        self.assertIn('0, 1, 1', phone.run([*fibonacci, '--resolve', 'fibonacci.faas:80:[fd00:faa5:1:0::a]']).stdout)

    def test_network_manager_imports_the_configuration(self):
        desk = self.other_host()
        packages.put(desk, 'dbus-daemon', 'network-manager')
        text = self.configuration()
        key = re.search('PrivateKey = (.*)', text)[1]
        path = desk.path('/root/phone.conf')
        path.touch(0o600)
        path.write_text(text)
        desk.run(['sh', '-c', '[ ! -e /dev/rfkill ] || mount --bind /dev/null /dev/rfkill; mkdir -p /run/dbus; '
                  'grep -q ^messagebus: /etc/passwd || echo messagebus:x:4713:4713::/:/bin/false >>/etc/passwd'])
        quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
        desk.popen(['dbus-daemon', '--system', '--nofork', '--nopidfile'], **quiet)
        lab.wait_until(desk.path('/run/dbus/system_bus_socket').exists, 10, 'dbus')
        desk.popen(['NetworkManager', '--no-daemon'], **quiet)
        lab.wait_until(lambda: desk.run(['nmcli', 'general'], ok=None).returncode == 0, 20, 'NetworkManager')
        done = desk.run(['nmcli', 'connection', 'import', 'type', 'wireguard', 'file', '/root/phone.conf'])
        self.assertRegex(done.stdout, "^Connection 'phone' .* successfully added")
        desk.run(['nmcli', 'connection', 'modify', 'phone', 'ipv6.dns-search', '~faas'])        # of docs/DEVICES.md
        kept = desk.path('/etc/NetworkManager/system-connections/phone.nmconnection').read_text()
        for line in (f'private-key={key}', 'endpoint=203.0.113.10:51820', 'allowed-ips=fd00:faa5::/32;',
                     'dns=fd00:faa5:0:100::1;', 'dns-search=~faas;', 'persistent-keepalive=25'):
            self.assertIn(f'\n{line}\n', kept)
        self.assertRegex(kept, r'\naddress1=fd00:faa5:0:100::\w+/64\n')

    def test_a_phone_scans_it(self):
        packages.put(self.server, 'qrencode')
        spy = self.server.path('/opt/spy/qrencode')
        spy.parent.mkdir()
        spy.write_text('#!/bin/sh\necho "$@" >/tmp/argv; tee /tmp/stdin | exec /usr/bin/qrencode "$@"\n')
        spy.chmod(0o755)
        self.addCleanup(self.on_server, 'vpn', 'remove', 'phone')
        done = self.server.run(['/usr/bin/python3', FAAS, 'vpn', 'create', 'phone', '--qr'],
                               env={'PATH': f'/opt/spy:{os.environ["PATH"]}'})
        lines = re.sub(r'\x1b\[[0-9;]*m', '', done.stdout).splitlines()
        self.assertEqual({len(line) for line in lines}, {69})
        self.assertEqual(len(lines), 35)                # fits a terminal of 80 columns and 40 lines
        self.assertEqual({*''.join(lines)}, {*' ▀▄█'})
        self.assertEqual(self.server.path('/tmp/argv').read_text(), '-t ansiutf8\n')
        text = self.server.path('/tmp/stdin').read_text()
        self.assertRegex(text, r'\A\[Interface\]\nPrivateKey = (?s:.*)PersistentKeepalive = 25\n\Z')
        self.assertNotIn('PrivateKey', done.stdout + done.stderr)

    def test_no_program_for_the_qr_code_makes_no_peer(self):
        self.laptop.run(['rm', '-f', '/usr/bin/qrencode'])
        done = self.laptop.run([sys.executable, FAAS, 'vpn', 'create', 'phone', '--qr'], ok=(1,))
        self.assertEqual(done.stderr, "error: the program 'qrencode' is not installed\n"
                         'hint: install it: sudo apt install qrencode\n')
        self.assertNotIn('phone', self.on_server('vpn', 'list', '--peers'))


if __name__ == '__main__':
    unittest.main()
