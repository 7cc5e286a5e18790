"""A passed socket is a key to the host's network: the two ways to turn it, shut by the mark and the table.

Each attack is seen to work without the rules first; else its failure would say nothing.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import unittest

import registry
import vpn_manager
from host import firewall
from tests import inside, lab, serving

ADDRESS = 'fd00:faa5:1:0::a'
CLONE_NEWNET = 0x40000000


TABLE = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)


def prepare():
    """wg0 with a function's address; in the server host."""
    manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x')
    manager.ensure_keys()
    manager.process = manager.bring_up()
    manager.project_addresses([ADDRESS])
    return manager


def listening():
    """A function's listener, as faasd has it."""
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, firewall.MARK)
    listener.bind((ADDRESS, 80, 0, 0))
    listener.listen()
    return listener


def accepted(listener):
    """(the connection that faasd would hand over, its client)."""
    client = socket.create_connection((ADDRESS, 80), timeout=5)
    return listener.accept()[0], client


class Stranger:
    """A process of uid 65534 in an empty network namespace, which gets one socket by SCM_RIGHTS and attacks with it."""

    def __init__(self, attack):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            self._live(theirs, attack)
        theirs.close()
        self.channel = ours
        self.channel.settimeout(20)

    def _live(self, channel, attack):
        try:
            signal.alarm(30)
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), 'unshare')
            os.setgroups([])
            os.setresgid(*[inside.NOBODY] * 3)
            os.setresuid(*[inside.NOBODY] * 3)
            channel.send(b'ready')
            _, fds, _, _ = socket.recv_fds(channel, 16, 1)
            with socket.socket(fileno=fds[0]) as connection:
                answer = attack(connection, channel)
        except BaseException as error:
            answer = f'{type(error).__name__}: {error}'
        with contextlib.suppress(OSError):
            channel.send(str(answer).encode())
        os._exit(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.channel.close()

    def give(self, owner=0):
        """Hand it a connection as faasd does; the first thing it says after that."""
        assert self.hear() == 'ready'
        with listening() as listener:
            connection, client = accepted(listener)
            with connection, client:
                os.fchown(connection.fileno(), owner, -1)
                socket.send_fds(self.channel, [b'C'], [connection.fileno()])
                return self.hear()

    def give_listener(self):
        """Hand it the function's listener itself, as an injected server has it."""
        assert self.hear() == 'ready'
        with listening() as listener:
            socket.send_fds(self.channel, [b'C'], [listener.fileno()])
            return self.hear()

    def hear(self):
        return self.channel.recv(4096).decode()


def disconnect(connection):
    """connect() with AF_UNSPEC."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(connection.fileno(), struct.pack('=H14x', socket.AF_UNSPEC), 16):
        raise OSError(ctypes.get_errno(), 'connect AF_UNSPEC')


def reach_the_host(connection, channel):
    """The first attack: another connect(), to what listens on the host's own ::1."""
    disconnect(connection)
    connection.settimeout(2)
    connection.connect(('::1', 5432))
    return connection.recv(100).decode()


def open_a_port(connection, channel):
    """The second: bind() and listen() on every address of the host."""
    disconnect(connection)
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    connection.bind(('::', 0, 0, 0))
    connection.listen()
    channel.send(f'port {connection.getsockname()[1]}'.encode())
    while True:
        stranger, _ = connection.accept()
        stranger.recv(4096)
        stranger.sendall(b'from within\n')
        stranger.close()


def join_a_listener(connection, channel):
    """The third, where the host lets anybody bind port 80: a share of another function's clients."""
    disconnect(connection)
    connection.bind((ADDRESS, 80, 0, 0))
    connection.listen()
    return 'joined'


def reach_the_host_by_a_listener(listener, channel):
    listener.shutdown(socket.SHUT_RDWR)
    return reach_the_host(listener, channel)


def bind_a_listener_elsewhere(listener, channel):
    listener.shutdown(socket.SHUT_RDWR)
    disconnect(listener)
    listener.bind(('::', 0, 0, 0))


def take_the_mark_off(connection, channel):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
    return 'no mark any more'


def remembered(connection, channel):
    disconnect(connection)
    return f'{connection.getsockopt(socket.SOL_SOCKET, socket.SO_MARK):#x}'


@contextlib.contextmanager
def database():
    """A service of the host on its ::1 alone."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(('::1', 5432))
        listener.listen()
        if os.fork() == 0:
            signal.alarm(30)
            while True:
                client, _ = listener.accept()
                client.sendall(b'the database')
                client.close()
        yield


@lab.needs_root
class PassedSocket(unittest.TestCase):
    def setUp(self):
        stack = contextlib.ExitStack()
        self.server, self.laptop = stack.enter_context(lab.pair())
        self.addCleanup(stack.close)

    def test_it_does_not_reach_the_hosts_own_services(self):
        def attack():
            self.kept = prepare()
            told = []
            with database():
                for load in (None, TABLE.load, TABLE.remove):
                    if load:
                        load()
                    with Stranger(reach_the_host) as stranger:
                        told.append(stranger.give())
            return told

        without, with_rules, again = inside.call(self.server, attack)
        self.assertEqual(('the database', 'the database'), (without, again), 'the attack itself does not work')
        self.assertEqual('TimeoutError: timed out', with_rules)

    def test_a_listener_does_not_either_and_stays_where_it_is_bound(self):
        def attack():
            self.kept = prepare()
            told = []
            with database():
                for load in (None, TABLE.load):
                    if load:
                        load()
                    with Stranger(reach_the_host_by_a_listener) as stranger:
                        told.append(stranger.give_listener())
            with Stranger(bind_a_listener_elsewhere) as stranger:
                return [*told, stranger.give_listener()]

        without, with_rules, bound = inside.call(self.server, attack)
        self.assertEqual('the database', without, 'the attack itself does not work')
        self.assertEqual('TimeoutError: timed out', with_rules)
        self.assertRegex(bound, 'Invalid argument')

    def test_it_opens_no_port(self):
        came = {}
        for rules in (False, True):

            def attack(rules=rules):
                if rules:
                    TABLE.load()
                else:
                    self.kept = prepare()
                self.stranger = Stranger(open_a_port)  # it stays when this process ends
                return self.stranger.give(), self.stranger.pid

            said, pid = inside.call(self.server, attack)
            self.assertRegex(said, '^port [0-9]+$')
            for address in ('203.0.113.10', '[2001:db8::10]'):
                done = self.laptop.run(['curl', '-sg', '--http0.9', '-m2', f'http://{address}:{said[5:]}'], ok=None)
                came.setdefault(rules, []).append((done.returncode, done.stdout))
            self.server.run(['kill', '-9', str(pid)], ok=None)
        self.assertEqual([(0, 'from within\n')] * 2, came[False], 'the attack itself does not work')
        self.assertEqual([(28, '')] * 2, came[True])  # 28: timed out

    def test_it_joins_no_listener(self):
        self.server.run(['sh', '-c', 'echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start'])

        def attack():
            self.kept = prepare()
            told = []
            for owner in (0, inside.NOBODY):
                with Stranger(join_a_listener) as stranger:
                    told.append(stranger.give(owner))
            return told

        as_root, as_another = inside.call(self.server, attack)
        self.assertEqual('joined', as_root, 'the attack itself does not work')
        self.assertRegex(as_another, 'Address already in use')

    def test_the_mark_stays_and_is_not_the_functions_to_change(self):
        def attack():
            self.kept = prepare()
            told = []
            for what in (take_the_mark_off, remembered):
                with Stranger(what) as stranger:
                    told.append(stranger.give())
            return told

        refused, mark = inside.call(self.server, attack)
        self.assertTrue(refused.startswith('PermissionError'), refused)
        self.assertEqual(f'{firewall.MARK:#x}', mark)


ATTACKER = """
import ctypes, errno, fcntl, json, os, socket, struct

def attempt(what):
    try:
        return what()
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)

def disconnect(sock):
    if ctypes.CDLL(None, use_errno=True).connect(sock.fileno(), struct.pack('=H14x', 0), 16):
        raise OSError(ctypes.get_errno(), 'AF_UNSPEC')

def reach(sock):
    disconnect(sock)
    sock.settimeout(1)
    sock.connect(('::1', 5432))
    return sock.recv(100).decode()

def listen(sock):
    disconnect(sock)
    attempt(lambda: sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0))
    sock.bind(('::', 0, 0, 0))
    sock.listen()
    return sock.getsockname()[1]

def join(sock):
    address = sock.getsockname()
    disconnect(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)

def handle(connection, address):
    request = connection.recv(4096)
    if request.startswith(b'GET /reach '):
        answer = attempt(lambda: reach(connection))
    elif request.startswith(b'GET /listen '):
        answer = attempt(lambda: listen(connection))
    elif request.startswith(b'GET /join '):
        answer = attempt(lambda: join(connection))
    else:
        asked = 0x8912, 0x8913, 0x8927  # SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFHWADDR
        answer = [attempt(lambda: fcntl.ioctl(connection, each, bytearray(4096))) for each in asked]
        answer.append(attempt(lambda: connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)))
        text = json.dumps(answer).encode()
        return connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s' % (len(text), text))
    print('attack:', answer, flush=True)
    if isinstance(answer, int):
        keep.append(connection.dup())

keep = []
"""


@lab.needs_root
class Deployed(unittest.TestCase):
    """The same from a deployed function, through everything that faasd puts around it."""

    def said(self, server, count):
        """What the function printed of its `count` attacks."""

        def lines():
            text = server.api('GET', '/api/logs/attacker').body.decode()
            return [line.partition(': ')[2] for line in text.splitlines() if line.startswith('attack: ')]

        lab.wait_until(lambda: len(lines()) >= count, 10, f'attack {count}')
        return lines()[count - 1]

    def test_a_function_gets_nowhere_and_a_table_that_was_taken_away_returns(self):
        with lab.pair() as (host, laptop), serving.standalone(host) as server:
            deployed = server.deploy('attacker', {'handler.py': ATTACKER})
            self.assertEqual(200, deployed.status, deployed.body)
            ipv6 = deployed.json['ipv6']
            self.assertEqual('["EPERM", "EPERM", "EPERM", "EPERM"]', server.get(ipv6))
            inside.call(host, serve, '::1', 5432)
            server.get(ipv6, '/reach', ok=(0, 28, 52, 56))
            self.assertIn(self.said(server, 1), ('TimeoutError', 'ETIMEDOUT'))
            server.get(ipv6, '/listen', ok=(0, 28, 52, 56))
            port = self.said(server, 2)
            self.assertRegex(port, '^[0-9]+$')

            def reached():
                argv = ['curl', '-sg', '-m1.5', f'http://203.0.113.10:{port}']
                return laptop.run(argv, ok=None).returncode

            self.assertEqual(28, reached())  # dropped: no answer at all
            host.run(['sh', '-c', 'echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start'])
            server.get(ipv6, '/join', ok=(0, 28, 52, 56))
            self.assertEqual('EADDRINUSE', self.said(server, 3))
            host.run(['nft', 'delete', 'table', 'inet', 'faas'])
            self.assertIn(
                'faas', lab.wait_until(lambda: host.run(['nft', 'list', 'tables']).stdout, 5, 'the table again')
            )
            self.assertEqual(28, reached())


@lab.needs_root
class Firewall(unittest.TestCase):
    """What is open to a peer and to the LAN, with a wildcard service and a function on the server."""

    def test_a_peer_reaches_the_function_and_the_lan_the_rest(self):
        with lab.pair() as (server, laptop):
            private = laptop.run(['wg', 'genkey']).stdout
            public = laptop.run(['wg', 'pubkey'], input=private).stdout.strip()
            peer = registry.Peer('laptop', public, None, 'fd00:faa5:0:100::a', 'peer', 0)

            def begin():
                self.kept = manager = prepare()
                manager.project([peer])
                for where, port in ((ADDRESS, 80), (registry.ZONE_SERVER, 53), ('::', 2222), ('::', 8080)):
                    serve(where, port)
                return manager.get_server_public_key()

            def load():
                TABLE.load()

            key = inside.call(server, begin)
            inside.tunnel(laptop, private, key, peer.ipv6)

            def is_open(address, port):
                argv = ['curl', '-sg', '--http0.9', '-m1', f'http://{address}:{port}']
                return laptop.run(argv, ok=None).stdout == 'open\n'

            tunnel = [(f'[{ADDRESS}]', 80), (f'[{registry.GATEWAY}]', 8080), (f'[{ADDRESS}]', 2222)]
            tunnel += [(f'[{registry.GATEWAY}]', 2222), (f'[{ADDRESS}]', 8080)]
            tunnel += [(f'[{registry.ZONE_SERVER}]', port) for port in (53, 2222, 8080)]
            lan = [('203.0.113.10', 2222), (f'[{ADDRESS}]', 80)]
            seen = {}
            for rules in (False, True):
                if rules:
                    inside.call(server, load)
                laptop.run(['ip', 'route', 'replace', 'fd00:faa5::/32', 'dev', 'wg-faas'])
                seen[rules] = [is_open(*each) for each in tunnel]
                laptop.run(['ip', 'route', 'replace', 'fd00:faa5::/32', 'via', '2001:db8::10'])
                seen[rules] += [is_open(*each) for each in lan]
            self.assertEqual([True] * 10, seen[False], 'not even open without the rules')
            self.assertEqual([True, True, False, False, False, True, False, False, True, False], seen[True])


def serve(address, port):
    """A service that says 'open' and ends with its host."""
    listener = socket.create_server((address, port), family=socket.AF_INET6, dualstack_ipv6=address == '::')
    if os.fork() == 0:
        while True:
            client, _ = listener.accept()
            client.recv(4096)
            client.sendall(b'open\n')
            client.close()
    listener.close()


if __name__ == '__main__':
    unittest.main()
