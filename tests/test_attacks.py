"""A passed socket is a key to the host's network: the ways to turn it, shut by the guard, the mark and the table.

Each attack is seen to work without the rules first; else its failure would say nothing.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import threading
import time
import unittest

import registry
import vpn_manager
from host import firewall, process
from host.guard import Guard, Unguarded
from tests import inside, lab, serving

ADDRESS = 'fd00:faa5:1:0::a'
CLONE_NEWNET = 0x40000000
MAKER = 0x70000000  # the uid of the guard's maker
IPV6_RTHDR, IPV6_FREEBIND = 57, 78


REFUSED = 'PermissionError: [Errno 1] Operation not permitted'
TABLE = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)


def prepare():
    """wg0 with a function's address; in the server host."""
    manager = vpn_manager.VPNManager(lambda *_, **__: None, registry.GATEWAY, registry.ZONE_SERVER, 'x')
    manager.ensure_keys()
    manager.process = manager.bring_up()
    manager.project_addresses([ADDRESS])
    return manager


def listening(guard=None):
    """A function's listener, as faasd has it."""
    listener = (guard or Unguarded()).make()
    listener.setblocking(True)
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

    def give(self, owner=0, guard=None):
        """Hand it a connection as faasd does; the first thing it says after that."""
        assert self.hear() == 'ready'
        with listening(guard) as listener:
            connection, client = accepted(listener)
            with connection, client:
                os.fchown(connection.fileno(), owner, -1)
                socket.send_fds(self.channel, [b'C'], [connection.fileno()])
                return self.hear()

    def give_listener(self, guard=None):
        """Hand it the function's listener itself, as an injected server has it."""
        assert self.hear() == 'ready'
        with listening(guard) as listener:
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


def bind_a_port(connection, channel):
    disconnect(connection)
    connection.bind(('::', 8080, 0, 0))
    return 'bound'


def bind_an_address_that_is_not_there(connection, channel):
    disconnect(connection)
    connection.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
    connection.bind(('fd00:faa5:1:0::f', 8080, 0, 0))
    return 'bound'


def reach_the_host_with_the_first_packet(connection, channel):
    disconnect(connection)
    connection.sendto(b'x', socket.MSG_FASTOPEN, ('::1', 5432))
    return connection.recv(100).decode()


def connect_to_itself(connection, channel):
    """A simultaneous open, of one socket: a connection between two ports of the host without a listener."""
    address, port, *_ = connection.getpeername()
    disconnect(connection)
    connection.bind((address, 40000, 0, 0))
    connection.connect((address, 40000, 0, 0))
    return 'connected'


def route_by_a_header(connection, channel):
    """IPV6_RTHDR of type 4 (RFC 8754): packets go to the address in it, whatever way that is."""
    header = bytes([0, 2, 4, 0, 0, 0, 0, 0]) + socket.inet_pton(socket.AF_INET6, '2001:db8::99')
    connection.setsockopt(socket.IPPROTO_IPV6, IPV6_RTHDR, header)
    return 'set'


def send_by_the_lan(connection, channel):
    route_by_a_header(connection, channel)
    with contextlib.suppress(OSError):
        connection.send(b'in clear')
    time.sleep(0.1)
    return 'sent'


def other_marks():
    """A rule of the host's own that sets marks, as those of VPNs and container engines."""
    chain = 'chain output { type route hook output priority -150; policy accept;\n meta mark set ct mark\n }'
    process.run(['nft', '-f', '-'], input=f'table ip6 other {{\n {chain}\n}}\n')


def wait_at_close(connection, channel):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 3600))
    return 'set'


def leave_the_group(listener, channel):
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    return 'set'


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
                for load in (None, TABLE.load, other_marks, TABLE.remove):
                    if load:
                        load()
                    with Stranger(reach_the_host) as stranger:
                        told.append(stranger.give())
            return told

        without, with_rules, with_other_marks, again = inside.call(self.server, attack)
        self.assertEqual(('the database', 'the database'), (without, again), 'the attack itself does not work')
        self.assertEqual(['TimeoutError: timed out'] * 2, [with_rules, with_other_marks])

    def test_nothing_marked_leaves_by_another_interface(self):
        """A routing header in a packet of an open connection is no SYN; its way is the LAN's."""

        def attack():
            self.kept = prepare()
            sent = []
            for load in (None, TABLE.load):
                if load:
                    load()
                process.run(['ip', '-6', 'neigh', 'flush', 'all'])
                with Stranger(send_by_the_lan) as stranger:
                    self.assertEqual('sent', stranger.give())
                sent.append(process.run(['ip', '-6', 'neigh', 'show', '2001:db8::99']).stdout)
            return sent

        without, with_rules = inside.call(self.server, attack)
        self.assertIn('2001:db8::99 dev', without, 'the attack itself does not work')
        self.assertEqual('', with_rules)

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

    def test_the_guard_alone_refuses_what_the_table_cannot_see(self):
        attacks = {
            reach_the_host: 'the database',
            reach_the_host_with_the_first_packet: 'the database',
            connect_to_itself: 'connected',
            bind_a_port: 'bound',
            bind_an_address_that_is_not_there: 'bound',
            join_a_listener: 'joined',
            route_by_a_header: 'set',
            wait_at_close: 'set',
        }

        def attack():
            self.kept = prepare()
            self.guard = guard = Guard('', 'faas-attacks', MAKER)
            guard.start()
            with open('/proc/sys/net/ipv4/ip_unprivileged_port_start', 'w') as file:
                file.write('0')
            told = {}
            with database():
                for each in attacks:
                    for held in (None, guard):
                        with Stranger(each) as stranger:
                            told.setdefault(each.__name__, []).append(stranger.give(guard=held))
            for held in (None, guard):
                with Stranger(leave_the_group) as stranger:
                    told.setdefault('leave_the_group', []).append(stranger.give_listener(held))
            guard.close()
            return told

        told = inside.call(self.server, attack)
        for each, (without, _) in told.items():
            wanted = {'leave_the_group': 'set'} | {attack.__name__: text for attack, text in attacks.items()}
            self.assertEqual(wanted[each], without, f'{each}: the attack itself does not work')
        self.assertEqual(dict.fromkeys(told, REFUSED), {each: guarded for each, (_, guarded) in told.items()})

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
import ctypes, errno, fcntl, json, os, socket, struct, threading, time

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

def insist(sock):
    told, end = set(), time.monotonic() + 3
    disconnect(sock)
    sock.settimeout(0.2)
    while time.monotonic() < end:
        told.add(attempt(lambda: sock.connect(('::1', 5432))) or 'connected')
        attempt(lambda: disconnect(sock))
        time.sleep(0.0005)
    return sorted(told)

def listen(sock):
    disconnect(sock)
    sock.listen()
    return sock.getsockname()[1]

def join(sock):
    address = sock.getsockname()
    disconnect(sock)
    sock.bind(address)

def exchange(sock):
    'listen() on a socket of its own, while a thread puts the passed one in its place.'
    disconnect(sock)
    fd, over, told = os.open('/dev/null', os.O_RDONLY), threading.Event(), set()
    def swap():
        while not over.is_set():
            own = socket.socket(socket.AF_INET6)
            os.dup2(own.fileno(), fd)
            os.dup2(sock.fileno(), fd)
            own.close()
    thread = threading.Thread(target=swap)
    thread.start()
    libc, end = ctypes.CDLL(None, use_errno=True), time.monotonic() + 2
    while time.monotonic() < end:
        told.add('listens' if libc.listen(fd, 1) == 0 else errno.errorcode[ctypes.get_errno()])
    over.set()
    thread.join()
    return sorted(told)

def inside(sock):
    tcp, unix = socket.socket(socket.AF_INET6), socket.socket(socket.AF_UNIX)
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    tcp.bind(('::1', 0))
    unix.bind('/tmp/own')
    with open('/tmp/file', 'w') as file:
        libc = ctypes.CDLL(None, use_errno=True)
        told = [attempt(tcp.listen), attempt(udp.listen), attempt(unix.listen)]
        for number in (file.fileno(), 999):
            told.append(errno.errorcode[ctypes.get_errno()] if libc.listen(number, 1) else 'listens')
    client = socket.create_connection(tcp.getsockname()[:2])
    tcp.accept()[0].sendall(b'me')
    return told + [client.recv(9).decode()]

def handle(connection, address):
    what = connection.recv(4096).split()[1][1:].decode()
    if what == 'options':
        asked = 0x8912, 0x8913, 0x8927  # SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFHWADDR
        answer = [attempt(lambda: fcntl.ioctl(connection, each, bytearray(4096))) for each in asked]
        answer.append(attempt(lambda: connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)))
        linger = struct.pack('ii', 1, 3600)
        answer.append(attempt(lambda: connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)))
    else:
        answer = attempt(lambda: globals()[what](connection))
    print('attack:', json.dumps(answer), flush=True)
    keep.append(connection.dup())

keep = []
"""


@lab.needs_root
class Deployed(unittest.TestCase):
    """The same from a deployed function, through everything that faasd puts around it."""

    def attack(self, server, ipv6, what):
        """What the function says of an attack."""

        def lines():
            text = server.api('GET', '/api/logs/attacker').body.decode()
            return [line.partition(': ')[2] for line in text.splitlines() if line.startswith('attack: ')]

        before = len(lines())
        server.get(ipv6, f'/{what}', ok=(0, 28, 52, 56), timeout_s=1)
        return json.loads(lab.wait_until(lambda: lines()[before:], 10, what)[0])

    def insist(self, host, server, ipv6):
        """What it gets by trying all the time, while the rules are flushed again and again."""

        def flush():
            for _ in range(10):
                host.run(['nft', 'flush', 'ruleset'])
                time.sleep(0.2)

        flusher = threading.Thread(target=flush)
        flusher.start()
        told = self.attack(server, ipv6, 'insist')
        flusher.join()
        return told

    def test_a_function_gets_nowhere_and_a_table_that_was_taken_away_returns(self):
        with lab.pair() as (host, _), serving.standalone(host) as server:
            self.assertEqual('bpf', server.api('GET', '/api/health').json['guard'])
            host.run(['sh', '-c', 'echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start'])
            deployed = server.deploy('attacker', {'handler.py': ATTACKER})
            self.assertEqual(200, deployed.status, deployed.body)
            ipv6 = deployed.json['ipv6']
            inside.call(host, serve, '::1', 5432)
            sockets = host.run(['ss', '-Htlnp']).stdout
            self.assertEqual(['EPERM'] * 5, self.attack(server, ipv6, 'options'))
            for what in ('reach', 'listen', 'join'):
                self.assertEqual('EPERM', self.attack(server, ipv6, what), what)
            self.assertEqual(['EPERM', 'listens'], self.attack(server, ipv6, 'exchange'))
            self.assertEqual(sockets, host.run(['ss', '-Htlnp']).stdout)
            inner = [None, 'ENOTSUP', None, 'ENOTSOCK', 'EBADF', 'me']
            self.assertEqual(inner, self.attack(server, ipv6, 'inside'))
            self.assertEqual(['EPERM'], self.insist(host, server, ipv6))
            self.assertIn(
                'faas', lab.wait_until(lambda: host.run(['nft', 'list', 'tables']).stdout, 5, 'the table again')
            )
            self.assertEqual([], server.api('GET', '/api/health').json['problems'])

    def test_without_the_guard_it_does_not_start_or_says_what_is_open(self):
        with lab.pair() as (host, _):
            host.run(['umount', '--lazy', '/sys/fs/cgroup/unified'])
            server = serving.Server(host, '--standalone').start(wait=False)
            self.assertEqual(os.EX_CONFIG, server.stop(0))
            self.assertIn('none are mounted (FAAS_GUARD=table goes on with nftables alone', server.lines[-1])
            with serving.standalone(host, FAAS_GUARD='table') as server:
                self.assertTrue(server.printed('[guard] the socket guard needs cgroups of version 2'))
                self.assertEqual('table', server.api('GET', '/api/health').json['guard'])
                ipv6 = server.deploy('attacker', {'handler.py': ATTACKER}).json['ipv6']
                inside.call(host, serve, '::1', 5432)
                self.assertEqual('ETIMEDOUT', self.attack(server, ipv6, 'reach').replace('TimeoutError', 'ETIMEDOUT'))
                self.assertIn('connected', self.insist(host, server, ipv6))


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
            with client, contextlib.suppress(OSError):
                client.recv(4096)
                client.sendall(b'open\n')
    listener.close()


if __name__ == '__main__':
    unittest.main()
