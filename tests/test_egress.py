"""What a function reaches, and what it does not: real veths, rules, DNS, behind them a LAN and an internet."""

import json
import unittest
import urllib.parse

from tests import lab, serving

ASKS = """
import contextlib, io, socket, traceback, urllib.request

def fetch(url, timeout=1):
    with urllib.request.urlopen(url, timeout=timeout) as reply:
        return reply.read().decode()

def app(environ, start_response):
    code = environ['wsgi.input'].read(int(environ['CONTENT_LENGTH'])).decode()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(code, globals())
        except OSError as error:
            print(type(getattr(error, 'reason', error)).__name__)
        except Exception:
            traceback.print_exc(file=out)
    start_response('200 OK', [])
    return [out.getvalue().encode()]
"""
PAGES = """
import http.server, socket, socketserver, sys
class Server(http.server.ThreadingHTTPServer):
    server_bind = socketserver.TCPServer.server_bind  # the other one asks DNS who it is
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].removeprefix('::ffff:').encode())
    def log_message(self, *_):
        pass
family, address, port = sys.argv[1:]
Server.address_family = socket.AF_INET if family == '4' else socket.AF_INET6
Server((address, int(port)), Page).serve_forever()
"""
LISTENS = """
import http.server, socket, signal, sys, urllib.request
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with urllib.request.urlopen('http://plain.faas/', timeout=5) as reply:
            body = reply.read()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
Server(('::', 80), Page).serve_forever()
"""
NOTHING = {'TimeoutError', 'OSError', 'PermissionError', 'ConnectionRefusedError', 'gaierror'}


FUNCTIONS = {
    'inter': 'internet',
    'local': 'functions',
    'named': 'api.example.com:80,lan.example.com,db.example.com:80,10.9.9.0/24:80',
    'hosts': 'host:5432,host:5433',
    'none': None,
}


class World(unittest.TestCase):
    """A server 192.168.1.1, on its LAN a router 192.168.1.2, beyond that 203.0.113.5, 2001:db8:f::5, private places."""

    functions = FUNCTIONS

    @classmethod
    def setUpClass(cls):
        cls.host, cls.net = (cls.enterClassContext(lab.Host(name)) for name in ('server', 'net'))
        lab.join(cls.host, cls.net, ['192.168.1.1/24', '2001:db8:1::1/64'], ['192.168.1.2/24', '2001:db8:1::2/64'])
        cls.host.sh('ip route add default via 192.168.1.2; ip -6 route add default via 2001:db8:1::2')
        cls.net.sh('ip address add 192.0.2.53/32 dev lo')  # the server's resolver: it refuses at once
        for address in ('203.0.113.5/32', '10.9.9.9/32', '169.254.169.254/32', '2001:db8:f::5/128', 'fd99::9/128'):
            cls.net.sh(f'ip address add {address} dev lo')
        for host, *place in (
            (cls.net, '6', '::', 80),
            (cls.net, '6', '::', 81),
            (cls.host, '6', '::', 2222),
            (cls.host, '4', '127.0.0.1', 5432),
            (cls.host, '6', '::1', 5433),
        ):
            host.popen(['python3', '-c', PAGES, *place])
        for host, *ports in (cls.net, 80, 81), (cls.host, 2222, 5432, 5433):
            for port in ports:
                lab.wait_until(lambda where=host, n=port: f':{n} ' in where.sh('ss -ltn'), 10, f'port {port}')
        cls.host.path('/etc/hosts').write_text(
            '127.0.0.1 localhost\n203.0.113.5 api.example.com\n192.168.1.2 lan.example.com\n10.9.9.9 db.example.com\n'
        )
        cls.server = cls.enterClassContext(serving.standalone(cls.host))
        cls.ipv6 = {'plain': cls.deploy('plain', serving.saying('plain'))}
        for name, egress in cls.functions.items():
            cls.ipv6[name] = cls.deploy(name, {'handler.py': ASKS}, egress)

    @classmethod
    def deploy(cls, name, files, egress=None):
        config = json.dumps({'set': {'egress': egress} if egress else {}})
        body = files if isinstance(files, bytes) else serving.archive(files)
        reply = cls.server.api('POST', f'/api/new?name={name}&config={urllib.parse.quote(config)}', body)
        assert reply.status == 200, reply.body
        return reply.json['ipv6']

    def run_in(self, name, code):
        """What the code prints in that function."""
        url = f'http://[{self.ipv6[name]}]/'
        return self.host.run(['curl', '-sg', '--max-time', '30', '--data-binary', '@-', url], input=code).stdout.strip()

    def fetch(self, name, where):
        return self.run_in(name, f'print(fetch("http://{where}/"))')

    def refuse(self, name, *places):
        for where in places:
            with self.subTest(name=name, where=where):
                self.assertIn(self.fetch(name, where), NOTHING)

    def inside(self, name):
        """nsenter into the network of the instance, as root of the host: more than any function can be."""
        folders = self.host.path('/run/faasd/instances').iterdir()
        records = [json.loads((folder / 'record.json').read_text()) for folder in folders]
        (pid,) = (record['pid'] for record in records if record['function'] == name)
        return f'nsenter --target {pid} --net'

    HOSTS_OWN = (
        '192.168.1.1:2222', '[2001:db8:1::1]:2222', '198.18.0.1:2222', '[fd00:faa5:0:200::1]:2222', '198.18.0.1:5432',
        '[fd00:faa5:0:100::1]:8080', '[fd00:faa5:0:200::1]:8080', '127.0.0.1:5432', '192.168.1.1:5432',
    )  # fmt: skip
    PRIVATE = ('192.168.1.2', '[2001:db8:1::2]', '10.9.9.9', '169.254.169.254', '[fd99::9]', '[::ffff:192.168.1.2]')


@lab.needs_root
class Reach(World):
    def test_the_internet_and_nothing_else(self):
        self.assertEqual('192.168.1.1', self.fetch('inter', '203.0.113.5'))  # masqueraded
        self.assertEqual('2001:db8:1::1', self.fetch('inter', '[2001:db8:f::5]'))
        self.refuse('inter', *self.HOSTS_OWN, *self.PRIVATE, f'[{self.ipv6["plain"]}]')

    def test_functions_and_nothing_else(self):
        self.assertEqual('plain', self.fetch('local', 'plain.faas'))
        self.assertEqual('plain', self.fetch('local', f'[{self.ipv6["plain"]}]'))
        self.refuse('local', *self.HOSTS_OWN, *self.PRIVATE, '203.0.113.5', '[2001:db8:f::5]', 'api.example.com')
        self.refuse('local', f'[{self.ipv6["plain"]}]:81')

    def test_names_and_networks(self):
        self.assertEqual('192.168.1.1', self.fetch('named', 'api.example.com'))
        self.assertEqual('192.168.1.1', self.fetch('named', 'db.example.com'))  # private, and its network is named
        self.assertEqual('192.168.1.1', self.fetch('named', '10.9.9.9'))
        self.refuse('named', 'api.example.com:81', '10.9.9.9:81', 'lan.example.com', 'plain.faas', 'other.example.com')
        self.refuse('named', *self.HOSTS_OWN, '192.168.1.2', '169.254.169.254', '[2001:db8:f::5]')
        hosts = self.run_in('named', 'print(open("/etc/hosts").read())')
        self.assertIn('203.0.113.5 api.example.com\n', hosts)
        self.assertNotIn('lan.example.com', hosts)
        self.assertEqual('', self.run_in('named', 'print(open("/etc/resolv.conf").read())'))

    def test_a_port_of_this_host(self):
        self.assertEqual('198.18.0.', self.fetch('hosts', 'host.faas:5432')[:9])
        self.assertTrue(self.server.printed('host:5433 is not reached: it listens at ::1 alone, not at 127.0.0.1'))
        self.refuse('hosts', *(f'host.faas:{port}' for port in (2222, 5433)), '127.0.0.1:5432', '192.168.1.1:5432')
        self.refuse('hosts', '192.168.1.2', '203.0.113.5')
        self.refuse('hosts', f'[{self.ipv6["plain"]}]')

    def test_without_egress_there_is_no_way(self):
        self.refuse('none', *self.HOSTS_OWN, *self.PRIVATE, '203.0.113.5', 'plain.faas')

    def test_dns_is_no_tunnel(self):
        ask = (
            'import socket, struct\n'
            's = socket.socket(socket.AF_INET6 if ":" in "%s" else socket.AF_INET, socket.SOCK_DGRAM)\n'
            's.settimeout(9)\n'
            'name = b"\\4data\\7example\\3com\\0"\n'
            's.sendto(bytes.fromhex("aaaa01000001000000000000") + name + b"\\0\\1\\0\\1", ("%s", 53))\n'
            'print(s.recv(512)[3] & 15)'
        )
        for name, server, expected in (
            ('local', 'fd00:faa5:0:100::2', {'5'}),  # REFUSED
            ('local', 'fd00:faa5:0:100::1', NOTHING),
            ('named', 'fd00:faa5:0:100::2', NOTHING),
            ('hosts', 'fd00:faa5:0:100::1', NOTHING),
            ('inter', 'fd00:faa5:0:100::1', {'0', '2', '3'}),
        ):
            with self.subTest(name=name, server=server):
                asked = ask % (server, server)
                asked = asked if name == 'inter' else asked.replace('settimeout(9)', 'settimeout(1)')
                self.assertIn(self.run_in(name, asked), expected)

    def test_a_table_that_was_taken_away_comes_back_and_without_it_nothing_passes(self):
        self.assertEqual('192.168.1.1', self.fetch('named', '10.9.9.9'))
        self.host.sh('nft delete table inet faas_egress')
        lab.wait_until(lambda: self.fetch('named', '10.9.9.9') == '192.168.1.1', 20, 'the table')
        self.host.sh('nft flush chain inet faas_egress input')
        lab.wait_until(lambda: 'reject' in self.host.sh('nft list chain inet faas_egress input'), 20, 'the chain')
        self.host.sh('nft flush ruleset')
        lab.wait_until(lambda: self.fetch('named', '10.9.9.9') == '192.168.1.1', 20, 'both tables')
        lab.wait_until(lambda: self.fetch('named', '192.168.1.2') in NOTHING, 20, 'both tables')

    def test_one_without_egress_that_tries_is_told(self):
        self.run_in('none', 'import urllib.request; urllib.request.urlopen("http://203.0.113.5/")\nprint(1)')
        self.run_in('none', 'import sys; print("[Errno 101] Network is unreachable", file=sys.stderr)')
        told = '[faasd] none may reach nothing: faas config none --set egress=internet'
        lab.wait_until(lambda: told in self.server.api('GET', '/api/logs/none').body.decode(), 5, told)
        starts = 'import urllib.request\nurllib.request.urlopen("http://203.0.113.5/")\n'
        reply = self.server.deploy('starts', {'handler.py': starts})
        self.assertEqual(422, reply.status)
        self.assertIn('such as --egress internet', reply.json['hint'])

    def test_who_asks_is_told(self):
        told = self.deploy('tells', {'handler.py': TELLS})
        address = self.fetch('local', f'[{told}]')
        shown = self.host.run([str(lab.REPO / 'faas'), 'describe', 'local']).stdout
        self.assertIn(address, shown)
        self.assertIn(address, self.server.status_of('local')['egress'])
        dig = ['dig', '+short', '-x', address, '@fd00:faa5:0:100::1']
        lab.wait_until(lambda: self.host.run(dig, ok=None).stdout == 'local.faas.\n', 20, 'the name of the address')
        self.assertTrue(self.server.printed(f'local is seen by others as {address} and 198.18.0.'))
        self.assertRegex(address, '^fd00:faa5:0:200::')


TELLS = """
def app(environ, start_response):
    start_response('200 OK', [])
    return [environ['REMOTE_ADDR'].encode()]
"""


@lab.needs_root
class Lives(unittest.TestCase):
    def test_an_instance_that_lives_on_keeps_its_way_and_all_goes_in_the_end(self):
        with lab.Host('server') as host:
            with serving.standalone(host) as server:
                server.deploy('plain', serving.saying('plain'))
                files = {'server.py': LISTENS, 'faas.toml': 'command = "python3 server.py"\negress = ["functions"]\n'}
                ipv6 = server.deploy('listens', files).json['ipv6']
                self.assertEqual('plain', server.get(ipv6))
                links = host.sh('ip -br link show type veth')
                server.stop(9)
                self.assertEqual(links, host.sh('ip -br link show type veth'))
                server.lines.clear()
                server.start()
                self.assertEqual('plain', server.get(ipv6))
                lab.wait_until(lambda: host.sh('ip -br link show type veth').count('faas-') == 1, 30, 'its successor')
                self.assertEqual('plain', server.get(ipv6))
                host.run([str(lab.REPO / 'faas'), 'rm', 'listens', '--yes'])
                lab.wait_until(lambda: not host.sh('ip -br link show type veth'), 10, 'the end of the veth')
                chains = host.sh('nft list table inet faas_egress')
                self.assertNotIn('chain faas_', chains)
            self.assertEqual('', host.sh('nft list tables'))


if __name__ == '__main__':
    unittest.main()
