"""The rows of `make bench` for egress: a cold start, a request to another function, much data to another host."""

import contextlib
import json
import sys
import textwrap
import time
import urllib.parse

from tests import images, lab, serving

BOUNDS = {'egress-cold-start': 1.0, 'egress-functions': 0.9, 'egress-out': 0.9}
COLD_STARTS = 15  # in each round of the other rows there is one
SINK, PORT, DIRECT = '203.0.113.20', 9000, 9002
SERVER = ('203.0.113.10/24',)
COST_MS = 5  # what a cold start may take longer

# How it asks and sends, in a function as in a process of the host.
WORK = """
import socket, time

def ask(host, port, seconds):
    \"\"\"Requests a second over one connection that is kept alive.\"\"\"
    with socket.create_connection((host, port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        count, began = 0, time.monotonic()
        while time.monotonic() < began + seconds:
            sock.sendall(b'GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')
            answer = b''
            while not answer.endswith(b'Hello!\\n'):
                more = sock.recv(4096)
                if not more:
                    raise ConnectionError('no answer')
                answer += more
            count += 1
        return count / (time.monotonic() - began)

def send(host, port, size):
    \"\"\"MB a second, until the other end has it all.\"\"\"
    data = bytes(1 << 20)
    with socket.create_connection((host, port)) as sock:
        began = time.monotonic()
        for _ in range(max(1, size >> 20)):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        return max(1, size >> 20) * 1.048576 / (time.monotonic() - began)
"""
HANDLER = (
    WORK
    + """
def app(environ, start_response):
    what, host, port, much = environ['QUERY_STRING'].split(',')
    rate = {'ask': ask, 'send': send}[what](host, int(port), float(much) if what == 'ask' else int(much))
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [str(rate).encode()]
"""
)
TAKES = f"""
import socket, threading

def take(sock):
    with sock:
        space = bytearray(1 << 20)
        while sock.recv_into(space):
            pass
        sock.sendall(b'x')

with socket.create_server(('{SINK}', {PORT})) as listening:
    while True:
        threading.Thread(target=take, args=(listening.accept()[0],), daemon=True).start()
"""
PEER_NETWORK = """
table ip peer {
  chain postrouting { type nat hook postrouting priority srcnat; iifname "peer0" oifname != "peer0" masquerade; }
}
"""


def rows(bench, wanted, check, compared, grouped):
    """A row after the other, of those that are wanted."""
    with bench.faasd() as (host, server):
        deployed = Deployed(server, check)
        if 'egress-cold-start' in wanted:
            samples = cold_starts(bench, host, deployed)
            what = f'the first request after an idle stop, and without egress with {COST_MS} ms on top'
            bound = BOUNDS['egress-cold-start']
            yield compared('egress-cold-start', what, samples, unit='ms', better='less', bound=bound)
        if 'egress-functions' in wanted:
            samples = between_functions(bench, host, deployed, grouped)
            what = 'a function that asks another one, and the same two programs on the host'
            bound = BOUNDS['egress-functions']
            yield compared('egress-functions', what, samples, unit='requests/s', better='more', bound=bound)
        if 'egress-out' in wanted:
            samples = to_another_host(bench, host, deployed, grouped)
            what = 'much data to another host, and through a veth and masquerade made by hand'
            yield compared('egress-out', what, samples, unit='MB/s', better='more', bound=BOUNDS['egress-out'])


class Deployed:
    def __init__(self, server, check):
        self._server, self._check = server, check

    def deploy(self, name, archive, **config):
        """Its address."""
        text = urllib.parse.quote(json.dumps({'set': config}))
        reply = self._server.api('POST', f'/api/new?name={name}&config={text}', archive)
        return self._check(reply, f'deploying {name}').json['ipv6']


def cold_starts(bench, host, deployed):
    source = serving.archive({'handler.py': serving.HELLO % b'HTTP/1.0 200 OK\r\n\r\nHello!\n'})
    idle = {'idle': '0.5'}
    address = {
        'without': deployed.deploy('without', source, **idle),
        'with': deployed.deploy('with', source, egress='internet,functions', **idle),
    }
    samples = {'with egress': [], f'without, and {COST_MS} ms': []}
    for number in range(bench.size.rounds if bench.size.rounds == 1 else COLD_STARTS):
        bench.tell(f'egress-cold-start: round {number + 1}')
        for name in ('with', 'without') if number % 2 else ('without', 'with'):
            lab.wait_until(lambda: not any(host.path('/run/faasd/instances').iterdir()), 30, 'the idle stops')
            time.sleep(0.2)  # what the kernel has to clear away
            url = f'http://[{address[name]}]/'
            took = 1000 * float(host.run(['curl', '-sfgo', '/dev/null', '-w', '%{time_total}', url]).stdout)
            samples['with egress' if name == 'with' else f'without, and {COST_MS} ms'].append(
                took if name == 'with' else took + COST_MS
            )
    return samples


def program(*arguments):
    """The argv of a process that does one thing of WORK and prints the rate."""
    what, *rest = arguments
    return [sys.executable, '-c', f'{WORK}\nprint({what}({", ".join(map(repr, rest))}))']


def asked(host, address, what, *arguments):
    """What the function at the address says."""
    url = f'http://[{address}]/?{",".join(map(str, (what, *arguments)))}'
    return float(host.run(['curl', '-sfg', '--max-time', '120', url], timeout_s=150).stdout)


def between_functions(bench, host, deployed, grouped):
    layers = [images.layer(('server', bench.program.read_bytes(), {'mode': 0o755}))]
    to = deployed.deploy('answers', images.image(layers, {'Cmd': ['/server', '[::]:80']}))
    asks = deployed.deploy('asks', serving.archive({'handler.py': HANDLER}), egress='functions')
    host.path('/tmp/answers').write_bytes(bench.program.read_bytes())
    host.path('/tmp/answers').chmod(0o755)
    samples, gateway = {'functions': [], 'processes': []}, 'fd00:faa5:0:100::1'
    with host.popen(grouped(host, 'answers', ['/tmp/answers', f'[{gateway}]:{DIRECT}'])) as direct:
        try:
            ready = ['curl', '-sfg', f'http://[{gateway}]:{DIRECT}/']
            lab.wait_until(lambda: host.run(ready, ok=None).stdout == 'Hello!\n', 10, 'the server')
            for number in range(bench.size.rounds):
                bench.tell(f'egress-functions: round {number + 1} of {bench.size.rounds}')
                samples['functions'].append(asked(host, asks, 'ask', to, 80, bench.size.seconds))
                command = grouped(host, 'asks', program('ask', gateway, DIRECT, bench.size.seconds))
                samples['processes'].append(float(host.run(command).stdout))
        finally:
            direct.terminate()
    return samples


def to_another_host(bench, host, deployed, grouped):
    sends = deployed.deploy('sends', serving.archive({'handler.py': HANDLER}), egress='internet,203.0.113.0/24')
    samples = {'function': [], 'by hand': []}
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(lab.Host('other'))
        lab.join(host, other, SERVER, (f'{SINK}/24',))
        takes = stack.enter_context(other.popen([sys.executable, '-c', TAKES]))
        stack.callback(takes.terminate)
        lab.wait_until(lambda: f':{PORT} ' in other.sh('ss -ltn'), 10, 'the sink')
        peer = stack.enter_context(host.popen(['unshare', '--net', 'sleep', '600']))
        stack.callback(peer.terminate)
        own = host.path('/proc/1/ns/net').readlink()
        inside = host.path(f'/proc/{inner(host)}/ns/net')
        lab.wait_until(lambda: inside.readlink() != own, 10, 'the network')
        enter = f'nsenter --net=/proc/{inner(host)}/ns/net'
        host.sh(textwrap.dedent(f"""\
            ip link add peer0 type veth peer name eth0 netns {inner(host)}
            ip address add 198.51.100.1/24 dev peer0
            ip link set peer0 up
            {enter} ip address add 198.51.100.2/24 dev eth0
            {enter} ip link set eth0 up
            {enter} ip route add default via 198.51.100.1
            """))
        host.run(['nft', '-f', '-'], input=PEER_NETWORK)
        for number in range(bench.size.rounds):
            bench.tell(f'egress-out: round {number + 1} of {bench.size.rounds}')
            size = 2 * bench.size.bytes
            samples['function'].append(asked(host, sends, 'send', SINK, PORT, size))
            command = [*enter.split(), *program('send', SINK, PORT, size)]
            samples['by hand'].append(float(host.run(grouped(host, 'sends', command)).stdout))
    return samples


def inner(host):
    """The pid, inside the host, of its process with the peer's network."""
    return host.sh("pgrep -x -f 'sleep 600'").split()[0]
