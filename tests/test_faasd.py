"""faasd as a whole, on hosts of its own: what it serves, whom it lets do what, what it survives."""
import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock

from handlers.containers import pace
from host.version import VERSION
from tests import lab, packages, serving

CRASHING = 'import os, time\ndef handle(connection, address):\n    os.kill(os.getpid(), 9)\n'
SYNTAX_ERROR = 'def handle(connection, address)\n    pass\n'
MISSING = 'import left_pad\n'
NOTHING = 'x = 1\n'
SLOW = (
    'import time\n'
    'def handle(connection, address):\n'
    '    connection.recv(4096)\n'
    '    time.sleep(%s)\n'
    '    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 4\\r\\nConnection: close\\r\\n\\r\\nslow")\n'
)
# The document's handler: it fetches one connection from /control.sock, serves it and exits.
CONTROL = """
import array, socket
from http.server import BaseHTTPRequestHandler

def receive_socket_fd():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.connect('/control.sock')
        _, ancillary, _, _ = control.recvmsg(1024, socket.CMSG_LEN(4))
        return array.array('i', ancillary[0][2])[0]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f'hello {self.client_address[0]}'.encode())

if __name__ == '__main__':
    tcp_fd = receive_socket_fd()
    client_sock = socket.fromfd(tcp_fd, socket.AF_INET6, socket.SOCK_STREAM)
    Handler(client_sock, client_sock.getpeername(), None)
"""
# A server that says which process it is, and at /listen how a listen() of now goes.
LISTENS = {
    'faas.toml': 'command = ["/usr/bin/python3", "server.py"]\n',
    'server.py': """
import http.server, os, secrets, socket
me = secrets.token_hex(4)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = me
        if self.path == '/listen':
            try:
                with socket.create_server(('::', 80), family=socket.AF_INET6, reuse_port=True):
                    text = 'again'
            except OSError as error:
                text = str(error)
        self.send_response(200)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
class Server(http.server.ThreadingHTTPServer):
    address_family, allow_reuse_port = socket.AF_INET6, True
    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()
Server(('::', 80), Handler).serve_forever()
""",
}


def key():
    return base64.b64encode(secrets.token_bytes(32)).decode()


def fields(*parts):
    parts = [part.encode() if isinstance(part, str) else part for part in parts]
    return b''.join(len(part).to_bytes(4, 'big') + part for part in parts)


@lab.needs_root
class OneServer(unittest.TestCase):
    """Tests that share a server and leave it as it was, but for addresses used."""

    @classmethod
    def setUpClass(cls):
        cls.pair = cls.enterClassContext(lab.pair())
        cls.host, cls.laptop = cls.pair
        cls.server = cls.enterClassContext(serving.standalone(cls.host, FAAS_MAX_UPLOAD='1M', FAAS_START_TIMEOUT='6'))

    def deploy(self, name, source):
        reply = self.server.deploy(name, source)
        if reply.status == 200:
            self.addCleanup(self.server.api, 'DELETE', f'/api/remove/{name}')
        return reply

    def remains(self):
        """What deploys and peers leave on the host."""
        host = self.host
        return {
            'addresses': host.run(['ip', '-6', 'address', 'show', 'dev', 'wg0']).stdout.count('fd00:faa5:1:'),
            'functions': sorted(os.listdir(host.path('/var/lib/faasd/functions'))),
            'instances': sorted(os.listdir(host.path('/run/faasd/instances'))),
            'peers': sorted(os.listdir(host.path('/etc/wireguard/peers'))),
            'listeners': host.run(['ss', '-Htln']).stdout.count(':80 '),
            'temporary': [n for n in os.listdir(host.path('/run')) if n.startswith('faasd-')],
            'list': self.server.api('GET', '/api/list').json,
        }

    # The document's workflow, piece by piece

    def test_the_examples_answer(self):
        for name, path, expected in (
            ('fibonacci', '/?n=10', 'Fibonacci sequence (10 steps):\n0, 1, 1, 2, 3, 5, 8, 13, 21, 34\n'),
            ('hello', '/', 'Hello, '),
            ('api', '/a/b?x=1', '"path": "/a/b", "query": {"x": ["1"]}'),
        ):
            with self.subTest(name):
                reply = self.deploy(name, serving.example(name)).json
                self.assertEqual({'name', 'ipv6', 'dns', 'revision', 'serves', 'warning', 'hint'}, set(reply))
                self.assertIsNone(reply['warning'])
                self.assertEqual({'ipv6': reply['ipv6']}, self.server.api('GET', f'/api/ip/{name}').json)
                self.assertIn(expected, self.server.get(reply['ipv6'], path))
                digged = self.host.run(['dig', '+short', 'AAAA', f'{name}.faas', '@fd00:faa5:0:100::1']).stdout
                self.assertEqual(reply['ipv6'].replace('1:0::', '1::'), digged.strip())

    def test_fibonacci_bounds(self):
        ipv6 = self.deploy('fibonacci', serving.example('fibonacci')).json['ipv6']
        for query, code in (('n=0', '200'), ('n=10000', '200'), ('n=10001', '400'), ('n=-1', '400'), ('n=x', '400')):
            got = self.host.run(
                ['curl', '-sg', '-o', '/dev/null', '-w', '%{http_code}', f'http://[{ipv6}]/?{query}']
            ).stdout
            self.assertEqual(code, got, query)

    def test_the_documents_handler_runs_as_printed(self):
        ipv6 = self.deploy('control', {'handler.py': CONTROL}).json['ipv6']
        own = ipv6.replace('1:0::', '1::')
        for _ in range(3):
            self.assertEqual(f'hello {own}', self.server.get(ipv6))

    def test_the_log_has_the_functions_output_and_its_last_lines_are_served(self):
        source = {'handler.py': 'print("started")\n' + serving.HELLO % serving.answer('x')}
        self.deploy('chatty', source)
        lab.wait_until(lambda: self.server.api('GET', '/api/logs/chatty').body == b'started\n', 5, 'the log')

    def test_the_log_is_bounded(self):
        loud = 'import sys\nsys.stdout.write("".join(f"{n:01023}\\n" for n in range(6000)))\n'
        loud += serving.HELLO % serving.answer('x')
        self.deploy('loud', {'handler.py': loud})
        folder = next(self.host.path('/var/lib/faasd/functions').glob('*/log.1')).parent
        sizes = lambda: sum(file.stat().st_size for file in folder.glob('log*'))  # noqa: E731
        lab.wait_until(lambda: sizes() > 1 << 20, 5, 'the log')
        self.assertLess(sizes(), 3 << 20)

    def test_a_name_too_early_is_there_right_after_its_deploy(self):
        dig = ['dig', '+short', 'AAAA', 'early.faas', '@fd00:faa5:0:100::1']
        self.assertEqual('', self.host.run(dig).stdout)
        self.deploy('early', serving.saying('x'))
        self.assertNotEqual('', self.host.run(dig).stdout)

    def test_a_removed_name_is_gone(self):
        ipv6 = self.server.deploy('brief', serving.saying('x')).json['ipv6']
        before = self.remains()
        reply = self.server.api('DELETE', '/api/remove/brief')
        self.assertEqual((200, b''), (reply.status, reply.body))
        after = self.remains()
        self.assertEqual(before['addresses'] - 1, after['addresses'])
        self.assertEqual(len(before['functions']) - 1, len(after['functions']))
        self.assertEqual(404, self.server.api('GET', '/api/ip/brief').status)
        self.server.get(ipv6, ok=(7, 28), timeout_s=1)
        dig = ['dig', 'AAAA', 'brief.faas', '@fd00:faa5:0:100::1']
        lab.wait_until(lambda: 'NXDOMAIN' in self.host.run(dig).stdout, 2, 'NXDOMAIN')

    # Deploys that fail

    def test_code_that_does_not_start_is_refused_with_its_own_last_lines(self):
        before = self.remains()
        for source, expected, in_log in (
            (SYNTAX_ERROR, 'SyntaxError', 'def handle(connection, address)'),
            (MISSING, "No module named 'left_pad'", 'import left_pad'),
            (NOTHING, 'BaseHTTPRequestHandler', ''),  # it has printed nothing else
            ('import sys\nsys.exit("no licence")', 'no licence', 'no licence'),
            ('import time\ntime.sleep(60)', 'not ready within 6 s', ''),
        ):
            with self.subTest(expected):
                reply = self.server.deploy('broken', {'handler.py': source})
                self.assertEqual(422, reply.status)
                self.assertIn(expected, reply.json['error'])
                self.assertIn(in_log, '\n'.join(reply.json['log']))
                self.assertEqual(before, self.remains())

    def test_a_failed_redeploy_leaves_the_old_revision_serving(self):
        ipv6 = self.deploy('steady', serving.saying('one')).json['ipv6']
        before = self.remains()
        self.assertEqual(422, self.server.deploy('steady', {'handler.py': MISSING}).status)
        self.assertEqual('one', self.server.get(ipv6))
        self.assertEqual(before, self.remains())
        reply = self.server.deploy('steady', serving.saying('two')).json
        self.assertEqual((ipv6, 2), (reply['ipv6'], reply['revision']))
        self.assertEqual('two', self.server.get(ipv6))

    def test_bad_names(self):
        for name in ('', '../x', 'x' * 64, 'é', 'A', '-a', 'a-', 'a.b', 'ns', 'dashboard', '%00'):
            with self.subTest(name):
                reply = self.server.api('POST', '/api/new?name=' + name.encode().hex('%', 1).join(['%', '']), b'x')
                self.assertEqual(400, reply.status)
                self.assertTrue(reply.json['error'] and reply.json['hint'])

    def test_bad_archives(self):
        before = self.remains()
        for body in (b'', b'no tar at all', serving.archive({'x.py': ''}), serving.archive({'../handler.py': ''})):
            reply = self.server.deploy('archive', body)
            self.assertEqual(400, reply.status, reply.body)
        self.assertEqual(before, self.remains())

    def raw(self, request, *, shut=False):
        """The status line and JSON that the API answers to these bytes."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.host.path('/run/faasd/faasd.sock')))
            sock.sendall(request)
            if shut:
                sock.shutdown(socket.SHUT_WR)
            got = b''
            while chunk := sock.recv(65536):
                got += chunk
        head, _, body = got.partition(b'\r\n\r\n')
        return int(head.split()[1]), json.loads(body)

    def test_a_chunked_body_is_taken_whatever_its_chunks(self):
        data = serving.saying('in pieces')
        pieces = [data[:1], data[1:100], data[100:5000], data[5000:]]
        body = b''.join(b'%X;x=y\r\n%s\r\n' % (len(piece), piece) for piece in pieces) + b'0\r\nTrailer: x\r\n\r\n'
        head = b'POST /api/new?name=pieces HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
        status, answer = self.raw(head + body, shut=True)
        self.assertEqual(200, status, answer)
        self.assertEqual('in pieces', self.server.get(answer['ipv6']))
        self.server.api('DELETE', '/api/remove/pieces')

    def test_bad_bodies(self):
        before = self.remains()
        new = b'POST /api/new?name=body HTTP/1.1\r\nHost: x\r\n'
        create = b'POST /api/vpn/create HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
        chunked = new + b'Transfer-Encoding: chunked\r\n\r\n'
        for request, status in (
            (new + b'Connection: close\r\n\r\n', 411),
            (new + b'Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n', 411),
            (new + b'Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n', 400),
            (create + b'Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 411),
            (chunked + b'0\r\n\r\n', 400),
            (chunked + b'x\r\n', 400),
            (chunked + b'-1\r\n', 400),
            (chunked + b'123456789\r\n', 400),
            (chunked + b'5\nhello', 400),
            (chunked + b'5\r\nhello!\r\n0\r\n\r\n', 400),
            (chunked + b'5\r\nhel', 400),
            (chunked + b'5\r\nhello\r\n', 400),
            (chunked + b'5', 400),
            (chunked + b' 5\r\nhello\r\n0\r\n\r\n', 400),
            (chunked + b'5;\rx\r\nhello\r\n0\r\n\r\n', 400),
            (chunked + b'0\r\n' + b'Trailer: x\r\n' * 100 + b'\r\n', 400),
            (chunked + b';' * 9999, 400),
            (chunked + (b'80000\r\n' + b'x' * 0x80000 + b'\r\n') * 3 + b'0\r\n\r\n', 413),
            (new + b'Content-Length: 99999999\r\n\r\n' + b'x' * 4096, 413),
            (new + b'Content-Length: 4096\r\n\r\nonly this', 400),
            (new + b'Content-Length: -5\r\n\r\n', 400),
            (new + b'Content-Length: ten\r\n\r\n', 400),
            (create + b'Content-Length: 2\r\n\r\n[]', 400),
            (create + b'Content-Length: 1\r\n\r\n{', 400),
            (create + b'Content-Length: 2\r\n\r\n{}', 400),
            (create + b'Content-Length: 25\r\n\r\n{"name":1,"public_key":2}', 400),
            (create + b'Content-Length: 999999\r\n\r\n', 413),
        ):
            with self.subTest(request[:120]):
                got, body = self.raw(request, shut=True)
                self.assertEqual(status, got)
                self.assertTrue(body['error'])
        self.assertEqual(before, self.remains())

    def test_where_a_body_ends_is_said_once_or_not_taken(self):
        """Else whoever stands between could see another request begin in what is a body to us."""
        hidden = b'0\r\n\r\nGET /api/list HTTP/1.1\r\nHost: x\r\n\r\n'
        for headers, status in (
            (b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n', 400),
            (b'Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n', 400),
            (b'Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n', 400),
            (b'Content-Length: 5\r\nContent-Length: 50\r\n', 400),
            (b'Content-Length: 5\r\nTransfer-Encoding:\r\n', 400),
            (b'Content-Length: 5\r\nTransfer-Encoding : chunked\r\n', 400),
            (b'Transfer-Encoding:\r\n chunked\r\n', 411),
            (b'Transfer-Encoding: xchunked\r\n', 411),
            (b'Transfer-Encoding: chunked, identity\r\n', 411),
        ):
            with self.subTest(headers):
                request = b'POST /api/new?name=body HTTP/1.1\r\nHost: x\r\n' + headers + b'\r\n' + hidden
                self.assertEqual(status, self.raw(request)[0])  # and its JSON ends the answer: no second one follows

    def test_a_body_that_is_cut_says_what_is_missing(self):
        new = b'POST /api/new?name=body HTTP/1.1\r\nHost: x\r\n'
        for rest, missing in (
            (b'Content-Length: 9\r\n\r\nhel', 'its Content-Length'),
            (b'Transfer-Encoding: chunked\r\n\r\n9\r\nhel', 'its last chunk'),
            (b'Transfer-Encoding: chunked\r\n\r\n9', 'its last chunk'),
        ):
            status, body = self.raw(new + rest, shut=True)
            self.assertEqual((400, f'the body ended before {missing}'), (status, body['error']))

    def test_an_answer_arrives_though_the_client_goes_on_sending(self):
        """Had the server closed with much unread, the client could find a reset in place of the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.host.path('/run/faasd/faasd.sock')))
            sock.sendall(b'POST /api/new?name=body HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n')
            for _ in range(100):  # more than is read of it in a few pieces
                sock.sendall(bytes(1 << 20))
            self.assertRegex(sock.recv(65536), b'\\AHTTP/1.1 413 ')

    def test_what_http_server_itself_refuses_is_json_too(self):
        for request, status in (
            (b'BREW /api/list HTTP/1.1\r\nHost: x\r\n\r\n', 405),
            (b'GET http://[ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n', 400),
            (b'GET /api/list HTTP/1.1\r\nContent-Length: ' + b'9' * 5000 + b'\r\n\r\n', 400),
            (b'GET /' + b'x' * 70000 + b' HTTP/1.1\r\n\r\n', 414),
        ):
            with self.subTest(request[:30]):
                got, body = self.raw(request, shut=True)
                self.assertEqual((status, {'error', 'hint'}), (got, set(body)))
        deep = b'{"name": ' + b'[' * 60000
        self.assertEqual(400, self.server.api('POST', '/api/vpn/create', deep).status)
        self.assertFalse(self.server.printed('Traceback'))

    def test_a_web_page_does_not_speak_for_whom_looks_at_it(self):
        body = {'name': 'evil', 'public_key': key()}
        origin = {'Origin': 'http://evil.example', 'Content-Type': 'text/plain'}
        self.assertEqual(403, self.server.api('POST', '/api/vpn/create', body, origin).status)
        self.host.run(['ip', '-6', 'address', 'add', 'fd00:faa5:0:100::fff/128', 'dev', 'lo'])
        self.addCleanup(self.host.run, ['ip', '-6', 'address', 'del', 'fd00:faa5:0:100::fff/128', 'dev', 'lo'])
        peer = f'[Peer]\nPublicKey = {key()}\nAllowedIPs = fd00:faa5:0:100::fff/128\n'
        (self.host.path('/etc/wireguard/peers') / 'browser.conf').write_text(peer)
        self.server.api('POST', '/api/vpn/create', {'name': 'push', 'public_key': key()})
        for name in ('browser', 'push'):
            self.addCleanup(self.server.api, 'DELETE', f'/api/vpn/remove/{name}')
        ask = ['curl', '-sg', '--interface', 'fd00:faa5:0:100::fff', '-w', '%{http_code}', '-o', '/dev/null']
        url = 'http://[fd00:faa5:0:100::1]:8080/api/list'
        for more, code in (([], '200'), (['-H', 'Host: ns.faas:8080'], '200'), (['-H', 'Host: evil.example'], '403')):
            self.assertEqual(code, self.host.run([*ask, *more, url]).stdout, more)
        health = self.host.run([*ask[:4], url.replace('list', 'health')]).stdout
        self.assertNotIn('recent', health)
        self.assertIn('recent', self.server.api('GET', '/api/health').json)

    def test_unknown_paths_and_methods(self):
        for method, path, status in (
            ('GET', '/', 404),
            ('GET', '/api/nothing', 404),
            ('GET', '/api/ip/none', 404),
            ('DELETE', '/api/remove/none', 404),
            ('DELETE', '/api/vpn/remove/none', 404),
            ('GET', '/api/logs/none', 404),
            ('GET', '/api/ip/a/b', 404),
            ('DELETE', '/api/vpn/remove/..%2F..%2Fwg0', 400),
            ('PUT', '/api/list', 405),
            ('GET', '/api/new', 405),
            ('DELETE', '/api/list', 405),
            ('PATCH', '/api/vpn/create', 405),
        ):
            with self.subTest(f'{method} {path}'):
                reply = self.server.api(method, path)
                self.assertEqual(status, reply.status)
                self.assertTrue(reply.json['error'])

    def test_two_deploys_of_one_name_at_once(self):
        slow_start = {'handler.py': 'import time\ntime.sleep(1)\n' + serving.HELLO % serving.answer('x')}
        with concurrent.futures.ThreadPoolExecutor() as threads:
            replies = list(threads.map(lambda _: self.server.deploy('twice', slow_start), range(2)))
        self.addCleanup(self.server.api, 'DELETE', '/api/remove/twice')
        self.assertEqual([200, 409], sorted(reply.status for reply in replies))
        self.assertEqual(1, self.server.api('GET', '/api/list').body.count(b'"twice"'))

    def test_deploys_and_removals_of_one_name_in_turn_leave_one_or_none(self):
        before = self.remains()
        outcomes = set()

        def some(number):
            for _ in range(6):
                if number % 2:
                    outcomes.add(self.server.deploy('flicker', serving.saying('x')).status)
                else:
                    outcomes.add(self.server.api('DELETE', '/api/remove/flicker').status)

        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(some, range(4)))
        self.assertLessEqual(outcomes, {200, 404, 409})
        self.server.api('DELETE', '/api/remove/flicker')
        self.assertEqual(before, self.remains())
        ipv6 = self.deploy('flicker', serving.saying('at last')).json['ipv6']
        self.assertEqual('at last', self.server.get(ipv6))

    def test_twenty_deploys_at_once(self):
        with concurrent.futures.ThreadPoolExecutor(20) as threads:
            replies = list(threads.map(lambda n: self.deploy(f'many-{n}', serving.saying(str(n))), range(20)))
        self.assertEqual({200}, {reply.status for reply in replies})
        self.assertEqual(20, len({reply.json['ipv6'] for reply in replies}))
        self.assertEqual('7', self.server.get(replies[7].json['ipv6']))

    # Instances

    def test_a_redeploy_under_load_drops_nothing(self):
        ipv6 = self.deploy('busy', serving.example('fibonacci')).json['ipv6']
        script = (
            'import http.client, sys, time\n'
            'end, done = time.monotonic() + 4, 0\n'
            'while time.monotonic() < end:\n'
            '    c = http.client.HTTPConnection(sys.argv[1], 80, timeout=10)\n'
            '    for _ in range(5):\n'
            '        c.request("GET", "/?n=5")\n'
            '        r = c.getresponse()\n'
            '        assert r.status == 200 and b"0, 1, 1, 2, 3" in r.read(), r.status\n'
            '        done += 1\n'
            '        if r.will_close: break\n'
            '    c.close()\n'
            'print(done)\n'
        )
        with concurrent.futures.ThreadPoolExecutor() as threads:
            runs = [
                threads.submit(self.host.run, ['/usr/bin/python3', '-c', script, ipv6], timeout_s=30) for _ in range(3)
            ]
            revisions = []
            while not all(run.done() for run in runs):
                revisions.append(self.server.deploy('busy', serving.example('fibonacci')).json['revision'])
            answered = sum(int(run.result().stdout) for run in runs)
        self.assertGreater(len(revisions), 3)
        self.assertGreater(answered, 200)

    def test_a_running_answer_outlives_a_redeploy(self):
        ipv6 = self.deploy('long', {'handler.py': SLOW % 1.5}).json['ipv6']
        with concurrent.futures.ThreadPoolExecutor() as threads:
            slow = threads.submit(self.server.get, ipv6)
            lab.wait_until(lambda: ':80 ' in self.host.run(['ss', '-Htn']).stdout, 5, 'a client')
            self.assertEqual(200, self.server.deploy('long', serving.saying('new')).status)
            self.assertEqual('new', self.server.get(ipv6))
            self.assertEqual('slow', slow.result())
        lab.wait_until(lambda: len(os.listdir(self.host.path('/run/faasd/instances'))) == 1, 10, 'the old one to end')

    def test_clients_that_say_nothing_do_not_hold_a_function(self):
        ipv6 = self.deploy('patient', serving.example('fibonacci')).json['ipv6']
        half = (
            'import socket, sys, time\n'
            'held = [socket.create_connection((sys.argv[1], 80)) for _ in range(40)]\n'
            'for each in held: each.sendall(b"GET /?n=5 HT")\n'
            'print("held", flush=True)\n'
            'time.sleep(100)\n'
        )
        with self.host.popen(['/usr/bin/python3', '-c', half, ipv6], stdout=subprocess.PIPE) as process:
            self.addCleanup(process.kill)
            self.assertEqual(b'held\n', process.stdout.readline())
            self.assertIn('0, 1, 1', self.server.get(ipv6, '/?n=5', timeout_s=pace.GRACE_S + 10))
            process.kill()

    def test_an_instance_that_dies_is_said_to_crash_and_is_replaced(self):
        ipv6 = self.deploy('mortal', {'handler.py': CRASHING}).json['ipv6']
        self.assertIn('the function died', self.server.get(ipv6))
        lab.wait_until(lambda: self.server.status_of('mortal')['status'] == 'crashing', 5, 'crashing')
        self.assertIn('SIGKILL', self.server.status_of('mortal')['reason'])
        health = self.server.api('GET', '/api/health').json
        self.assertEqual(('degraded', 1), (health['status'], health['functions']['crashing']))
        self.assertIn('mortal', json.dumps(health['problems']))
        self.assertIn('the function died', self.server.get(ipv6))  # it waited in the backlog for the next instance

    def test_clients_wait_while_an_instance_is_replaced(self):
        ipv6 = self.deploy('phoenix', serving.saying('risen')).json['ipv6']
        instance = os.listdir(self.host.path('/run/faasd/instances'))[0]
        record = json.loads(self.host.path(f'/run/faasd/instances/{instance}/record.json').read_text())
        self.host.run(['kill', '-9', str(record['pid'])])
        self.assertEqual('risen', self.server.get(ipv6))

    def test_no_descriptor_leaks(self):
        good = self.deploy('good', serving.saying('x')).json['ipv6']
        self.server.get(good)
        before = self.server.descriptors()
        bad = self.server.deploy('bad', {'handler.py': CRASHING}).json['ipv6']
        for _ in range(50):
            self.server.get(good)
        self.server.get(bad)
        self.server.deploy('none', {'handler.py': MISSING})
        self.server.api('DELETE', '/api/remove/bad')
        lab.wait_until(lambda: self.server.descriptors() <= before, 10, 'the descriptors to be closed')

    # Peers and invites

    def test_create_list_and_remove_a_peer(self):
        before = self.remains()
        public_key = key()
        reply = self.server.api('POST', '/api/vpn/create', {'name': 'tablet', 'public_key': public_key})
        self.assertEqual(['ipv6', 'server_public_key', 'endpoint'], list(reply.json))
        self.assertEqual('203.0.113.10', reply.json['endpoint'])
        listed = next(p for p in self.server.api('GET', '/api/vpn/list').json if p['name'] == 'tablet')
        self.assertEqual(
            {'name': 'tablet', 'ipv6': reply.json['ipv6'], 'created': time.strftime('%Y-%m-%d', time.gmtime()),
             'status': 'inactive'},
            listed,
        )
        self.assertEqual(
            f'# Client: tablet\n[Peer]\nPublicKey = {public_key}\nAllowedIPs = {reply.json["ipv6"]}/128\n',
            self.host.path('/etc/wireguard/peers/tablet.conf').read_text(),
        )
        self.assertIn(public_key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        for name, taken in (('tablet', key()), ('other', public_key)):
            reply = self.server.api('POST', '/api/vpn/create', {'name': name, 'public_key': taken})
            self.assertEqual(409, reply.status)
        removed = self.server.api('DELETE', '/api/vpn/remove/tablet')
        self.assertEqual((200, b''), (removed.status, removed.body))
        self.assertNotIn(public_key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.assertEqual(before, self.remains())

    def test_bad_keys(self):
        zero = base64.b64encode(bytes(32)).decode()
        for bad in ('', 'x', key()[:-1], key() + '=', zero, 'é' * 44, key() + '\n', '\n[Peer]'):
            reply = self.server.api('POST', '/api/vpn/create', {'name': 'bad', 'public_key': bad})
            self.assertEqual(400, reply.status, bad)

    def token(self, **request):
        reply = self.server.api('POST', '/api/vpn/invite', {'name': None, 'expires': 3600, 'admin': False, **request})
        self.assertEqual(200, reply.status, reply.body)
        text, _, check = reply.json['token'].removeprefix('faas1_').partition('.')
        self.assertEqual(hashlib.sha256(text.encode()).hexdigest()[:8], check)
        token = json.loads(base64.urlsafe_b64decode(text + '=='))
        self.assertEqual(('203.0.113.10:51820', '203.0.113.10'), (token['a'], token['e']))
        return token

    def redeem(self, token, public_key, name='guest', *, secret=None):
        """(status, headers in lower case, body) of redeeming from the other host."""
        body = json.dumps({'name': name, 'public_key': public_key}).encode()
        nonce = secrets.token_hex(16)
        mac = secret or base64.urlsafe_b64decode(token['s'] + '==')
        proof = hmac.new(mac, fields('faas1 request', token['i'], nonce, body), 'sha256').hexdigest()
        out = self.laptop.run(
            ['curl', '-si', '--max-time', '5', f'http://{token["a"]}/api/vpn/create',
             '-H', f'Faas-Invite: {token["i"]}', '-H', f'Faas-Nonce: {nonce}', '-H', f'Faas-Proof: {proof}',
             '--data-binary', body.decode()]
        ).stdout
        head, _, answer = out.partition('\n\n')
        lines = head.replace('\r', '').split('\n')
        headers = {k.lower(): v for k, v in (line.split(': ', 1) for line in lines[1:])}
        if headers.get('faas-proof'):
            parts = fields('faas1 answer', token['i'], nonce, headers['faas-peer'], answer)
            self.assertEqual(hmac.new(mac, parts, 'sha256').hexdigest(), headers['faas-proof'])
            self.addCleanup(self.server.api, 'DELETE', f'/api/vpn/remove/{headers["faas-peer"]}')
        return int(lines[0].split()[1]), headers, json.loads(answer)

    def test_an_invite_makes_one_peer_and_repeats_its_answer_to_the_same_key(self):
        token, public_key = self.token(), key()
        first = self.redeem(token, public_key)
        self.assertEqual((200, 'guest'), (first[0], first[1]['faas-peer']))
        self.assertEqual(first[2], self.redeem(token, public_key)[2])
        status, _, body = self.redeem(token, key())
        self.assertEqual(403, status)
        second = self.redeem(self.token(), key())
        self.assertEqual('guest-2', second[1]['faas-peer'])
        wrong = self.redeem(self.token(), key(), secret=bytes(32))
        unknown = self.redeem(dict(self.token(), i='0' * 16), key())
        self.assertEqual([(403, body)] * 2, [(wrong[0], wrong[2]), (unknown[0], unknown[2])])

    def test_an_invites_name_is_kept_for_it(self):
        token = self.token(name='phone')
        self.assertEqual('phone', token['n'])
        self.assertEqual(409, self.server.api('POST', '/api/vpn/invite', {'name': 'phone'}).status)
        self.assertEqual('phone', self.redeem(token, key(), 'whatever')[1]['faas-peer'])

    def test_bad_invite_requests(self):
        lifetimes = ({'expires': 1}, {'expires': '1h'}, {'expires': True})
        for request in (*lifetimes, {'admin': 1}, {'name': 5}, {'name': '../x'}):
            self.assertEqual(400, self.server.api('POST', '/api/vpn/invite', request).status, request)

    def test_the_enroll_address_answers_nothing_else(self):
        token = self.token()
        for method, path in (('GET', '/api/list'), ('POST', '/api/new?name=x'), ('GET', '/api/vpn/list'), ('GET', '/')):
            out = self.laptop.run(['curl', '-s', '-X', method, '-d', '', '-w', '%{http_code}', f'http://{token["a"]}{path}'])
            self.assertTrue(out.stdout.endswith('404'), out.stdout)
        bare = ['curl', '-s', '-d', json.dumps({'name': 'x', 'public_key': key()}), '-w', '%{http_code}']
        self.assertTrue(self.laptop.run([*bare, f'http://{token["a"]}/api/vpn/create']).stdout.endswith('403'))

    def test_the_tunnels_api_refuses_who_is_no_peer(self):
        out = self.host.run(['curl', '-sg', 'http://[fd00:faa5:0:100::1]:8080/api/list'])
        self.assertIn('may not do that', out.stdout)

    def test_the_lan_reaches_neither_functions_nor_api(self):
        ipv6 = self.deploy('inside', serving.saying('x')).json['ipv6']
        self.laptop.run(['ip', '-6', 'route', 'replace', 'fd00:faa5::/32', 'via', '2001:db8::10'])
        self.addCleanup(self.laptop.run, ['ip', '-6', 'route', 'del', 'fd00:faa5::/32'])
        for target in (f'[{ipv6}]', '[fd00:faa5:0:100::1]:8080'):
            self.laptop.run(['curl', '-sg', '--max-time', '1', f'http://{target}/'], ok=(28,))

    def test_a_stranger_who_holds_the_enroll_port_does_not_keep_others_out(self):
        token = self.token()
        hold = (
            'import socket, sys, time\n'
            'held = []\n'
            'end = time.monotonic() + 30\n'
            'while time.monotonic() < end:\n'
            '    if len(held) < 100:\n'
            '        s = socket.create_connection(("203.0.113.10", 51820)); s.sendall(b"POST /api"); held.append(s)\n'
            '        continue\n'
            '    print("held", flush=True)\n'
            '    time.sleep(1)\n'
            '    for s in held:\n'
            '        try: s.send(b"x")\n'
            '        except OSError: held.remove(s); break\n'
        )
        self.laptop.run(['ip', 'address', 'add', '203.0.113.66/24', 'dev', 'eth0'])
        self.addCleanup(self.laptop.run, ['ip', 'address', 'del', '203.0.113.66/24', 'dev', 'eth0'])
        attacker = hold.replace('51820))', '51820), source_address=("203.0.113.66", 0))')
        with self.laptop.popen(['/usr/bin/python3', '-c', attacker], stdout=subprocess.PIPE) as process:
            self.addCleanup(process.kill)
            self.assertEqual(b'held\n', process.stdout.readline())
            self.assertEqual(200, self.redeem(token, key())[0])
            process.kill()

    def test_hand_made_peers_are_adopted_and_broken_files_left_out(self):
        peers, good = self.host.path('/etc/wireguard/peers'), key()
        (peers / 'byhand.conf').write_text(f'[Peer]\nPublicKey = {good}\nAllowedIPs = fd00:faa5:0:100::beef/128\n')
        (peers / 'broken.conf').write_text('[Peer]\nAllowedIPs = ::/0\n')
        self.addCleanup(os.unlink, peers / 'broken.conf')
        other = key()
        self.assertEqual(200, self.server.api('POST', '/api/vpn/create', {'name': 'next', 'public_key': other}).status)
        live = self.host.run(['wg', 'show', 'wg0', 'allowed-ips']).stdout
        self.assertIn(f'{good}\tfd00:faa5:0:100::beef/128', live)
        self.assertIn(other, live)
        self.assertTrue(self.server.printed('broken.conf: needs PublicKey'))
        for name in ('byhand', 'next'):
            self.server.api('DELETE', f'/api/vpn/remove/{name}')
        self.assertFalse((peers / 'byhand.conf').exists())
        self.assertTrue((peers / 'broken.conf').exists())

    # What happens to a running server

    def test_files_that_were_changed_cut_or_deleted_are_projected_again_within_seconds(self):
        self.deploy('kept', serving.saying('kept'))
        self.server.api('POST', '/api/vpn/create', {'name': 'tablet', 'public_key': key()})
        self.addCleanup(self.server.api, 'DELETE', '/api/vpn/remove/tablet')
        zone, corefile, peer = (
            self.host.path(path)
            for path in ('/var/lib/faasd/dns/faas.db', '/etc/coredns/Corefile', '/etc/wireguard/peers/tablet.conf')
        )
        right = {path: path.read_text() for path in (zone, corefile, peer)}
        without_serial = functools.partial(re.sub, r'\d+ ; Serial', '')
        same = lambda path: path.exists() and without_serial(path.read_text()) == without_serial(right[path])  # noqa: E731
        for spoil in (
            lambda path: path.unlink(),
            lambda path: path.write_text(right[path][: len(right[path]) // 2]),
            lambda path: path.write_text(right[path].replace('fd00:faa5', 'fd00:faa6')),
        ):
            for path in right:
                spoil(path)
                self.assertFalse(same(path), path)
            for path in right:
                lab.wait_until(functools.partial(same, path), 8, f'{path.name} to be written again')
        lab.wait_until(
            lambda: self.host.run(['dig', '+short', 'AAAA', 'kept.faas', '@fd00:faa5:0:100::1']).stdout, 5, 'the name'
        )
        self.host.run(['sh', '-c', 'rm -r /etc/wireguard/peers'])
        lab.wait_until(peer.exists, 8, 'peers/ to be made again')

    def test_a_peer_is_locked_out_without_its_folder_of_files(self):
        public = key()
        self.server.api('POST', '/api/vpn/create', {'name': 'lost', 'public_key': public})
        self.assertIn(public, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        folder = self.host.path('/etc/wireguard/peers')
        self.host.run(['mv', '/etc/wireguard/peers', '/etc/wireguard/away'])
        self.addCleanup(self.host.run, ['rm', '-rf', '/etc/wireguard/away'])
        folder.write_text('a file in the place of the folder')
        try:
            self.server.api('DELETE', '/api/vpn/remove/lost')
            self.assertNotIn(public, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        finally:
            folder.unlink()
        lab.wait_until(folder.is_dir, 10, 'peers/ to be made again')
        lab.wait_until(lambda: self.server.printed('Removed peer: lost'), 10, 'the end of the removal')
        self.assertNotIn('lost', [peer['name'] for peer in self.server.api('GET', '/api/vpn/list').json])

    def test_wg0_taken_away_is_told_and_made_good(self):
        ipv6 = self.deploy('away', serving.saying('back')).json['ipv6']
        public_key = key()
        self.server.api('POST', '/api/vpn/create', {'name': 'stays', 'public_key': public_key})
        self.addCleanup(self.server.api, 'DELETE', '/api/vpn/remove/stays')
        self.server.lines.clear()
        self.host.run(['ip', 'link', 'delete', 'wg0'])
        lab.wait_until(lambda: self.server.printed('wg0 is gone'), 5, 'the event')
        lab.wait_until(lambda: self.server.printed('[wg0] is well again'), 10, 'wg0')
        self.assertEqual('back', self.server.get(ipv6))
        self.assertIn(public_key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.assertEqual([], self.server.api('GET', '/api/health').json['problems'])

    def test_peers_taken_away_come_back(self):
        public_key = key()
        self.server.api('POST', '/api/vpn/create', {'name': 'comes', 'public_key': public_key})
        self.addCleanup(self.server.api, 'DELETE', '/api/vpn/remove/comes')
        shown = ['wg', 'show', 'wg0', 'peers']
        # What a reload of wg-quick@wg0 does.
        reload = 'wg syncconf wg0 <(wg-quick strip wg0); wg show wg0 peers'
        self.assertNotIn(public_key, self.host.run(['bash', '-c', reload]).stdout)
        lab.wait_until(lambda: public_key in self.host.run(shown).stdout, 10, 'the peer')

    def test_a_gateway_taken_away_is_told_and_made_good(self):
        ipv6 = self.deploy('gateway', serving.saying('here')).json['ipv6']
        for harm in (
            ['ip', '-6', 'address', 'del', 'fd00:faa5:0:100::1/64', 'dev', 'wg0'],
            ['ip', 'link', 'set', 'wg0', 'down'],
        ):
            self.server.lines.clear()
            self.host.run(harm)
            lab.wait_until(lambda: self.server.printed('[wg0] is well again'), 10, 'wg0')
            self.assertEqual('here', self.server.get(ipv6))
            lab.wait_until(lambda: not self.server.api('GET', '/api/health').json['problems'], 5, 'health')
            self.assertEqual(1, sum('[wg0] wg0 ' in line for line in self.server.lines))

    def test_an_address_taken_away_comes_back(self):
        ipv6 = self.deploy('moved', serving.saying('here')).json['ipv6']
        self.host.run(['ip', '-6', 'address', 'del', f'{ipv6}/128', 'dev', 'wg0'])
        lab.wait_until(lambda: self.server.get(ipv6, ok=None, timeout_s=1) == 'here', 10, 'the address')

    def test_the_second_address_of_dns_comes_back_too(self):
        ask = ['dig', '+short', '+tries=1', '+time=1', '@fd00:faa5:0:100::2', 'ns.faas', 'AAAA']
        self.assertEqual('fd00:faa5:0:100::1\n', self.host.run(ask).stdout)
        self.host.run(['ip', '-6', 'address', 'del', 'fd00:faa5:0:100::2/128', 'dev', 'wg0'])
        lab.wait_until(lambda: self.host.run(ask, ok=None).stdout == 'fd00:faa5:0:100::1\n', 10, 'the address')

    def test_a_flushed_table_stops_the_hand_off_until_it_is_back(self):
        ipv6 = self.deploy('guarded', serving.saying('x')).json['ipv6']
        for harm in (['nft', 'flush', 'ruleset'], ['nft', 'flush', 'chain', 'inet', 'faas', 'output']):
            self.server.lines.clear()
            self.host.run(harm)
            lab.wait_until(lambda: self.server.printed('[rules] is well again'), 10, 'the table')
            self.assertIn('mark', self.host.run(['nft', 'list', 'chain', 'inet', 'faas', 'output']).stdout)
            self.assertEqual('x', self.server.get(ipv6))

    def test_coredns_that_dies_is_started_again(self):
        self.host.run(['pkill', '-9', 'coredns'])
        lab.wait_until(lambda: self.server.printed('CoreDNS ended'), 5, 'the event')
        lab.wait_until(lambda: self.server.api('GET', '/api/health').json['status'] == 'ok', 10, 'CoreDNS')

    def test_coredns_is_nobodys_and_can_only_bind_low_ports(self):
        pid = self.host.run(['pgrep', '-x', 'coredns']).stdout.strip()
        status = dict(re.findall(r'(\w+):[ \t]*(.*)', self.host.run(['cat', f'/proc/{pid}/status']).stdout))
        self.assertEqual(['65534'] * 8, (status['Uid'] + '\t' + status['Gid']).split('\t'))
        self.assertEqual('', status['Groups'].strip())
        kinds = 'CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'
        self.assertEqual([f'{1 << 10:016x}'] * 5, [status[kind] for kind in kinds])  # CAP_NET_BIND_SERVICE
        self.assertEqual('1', status['NoNewPrivs'])

    def test_a_disk_that_is_full_while_staging(self):
        before = self.remains()
        functions = '/var/lib/faasd/functions'
        self.host.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tiny', functions])
        try:
            files = {'handler.py': 'x = 1\n', 'data': 'x' * 500_000}
            reply = self.server.deploy('big', files)
            self.assertEqual(507, reply.status, reply.body)
            self.assertEqual([], os.listdir(self.host.path(functions)))
        finally:
            self.host.run(['umount', functions])
        self.assertEqual(before, self.remains())

    def test_what_is_mounted_below_usr_is_read_only_too(self):
        self.host.run(['sh', '-c', 'mkdir /usr/shared && mount -t tmpfs -o mode=1777 shared /usr/shared'])
        self.addCleanup(self.host.run, ['umount', '/usr/shared'])
        source = (
            'import os\n'
            'def handle(connection, address):\n'
            '    try:\n        open("/usr/shared/x", "w")\n        said = b"written"\n'
            '    except OSError as error:\n        said = os.strerror(error.errno).encode()\n'
            '    connection.recv(4096)\n    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n" + said)\n'
        )
        ipv6 = self.deploy('writer', {'handler.py': source}).json['ipv6']
        self.assertEqual('Read-only file system', self.server.get(ipv6))


@lab.needs_root
class LivesOfAServer(unittest.TestCase):
    """Tests that start and end servers of their own."""

    def setUp(self):
        self.host = self.enterContext(lab.Host('server'))

    def test_a_restart_brings_everything_back(self):
        with serving.standalone(self.host) as server:
            ipv6 = server.deploy('kept', serving.saying('kept')).json['ipv6']
            public_key = key()
            server.api('POST', '/api/vpn/create', {'name': 'kept', 'public_key': public_key})
            own = server.host.path('/etc/wireguard/server_public.key').read_text()
            serial = server.host.path('/var/lib/faasd/dns/faas.db').read_text()
            server.stop()
            for leftover in ('wg0', 'fd00:faa5'):
                self.assertNotIn(leftover, self.host.run(['ip', 'address']).stdout)
            self.assertEqual('', self.host.run(['nft', 'list', 'ruleset']).stdout)
            self.assertEqual(['faasd.lock'], os.listdir(self.host.path('/run/faasd')))
            self.host.run(['pgrep', 'wireguard-go|coredns|runc'], ok=(1,))
            server.lines.clear()
            server.start()
            self.assertEqual('kept', server.get(ipv6))
            self.assertEqual('kept', server.get('fd00:faa5:1:0::a'))
            self.assertIn(public_key, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
            self.assertEqual(own, server.host.path('/etc/wireguard/server_public.key').read_text())
            self.assertEqual(serial, server.host.path('/var/lib/faasd/dns/faas.db').read_text())

    def test_a_function_cannot_keep_its_address_from_the_next_faasd(self):
        """Without SO_REUSE* on its connections nobody could listen beside them, also a minute after their end."""
        alone = (
            'import socket\ndef handle(connection, address):\n'
            '    connection.recv(4096)\n'
            '    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):\n'
            '        try:\n            connection.setsockopt(socket.SOL_SOCKET, option, 0)\n'
            '        except PermissionError:\n'
            f'            connection.sendall({serving.answer("refused")!r})\n'
            '    connection.shutdown(socket.SHUT_WR)\n'  # so that it is here that the kernel waits a minute
        )
        with serving.standalone(self.host) as server:
            alone = server.deploy('alone', {'handler.py': alone}).json['ipv6']
            self.assertEqual('refused', server.get(alone))
            server.restart()
            self.assertEqual('refused', server.get(alone))

    def test_a_function_that_cannot_be_opened_hides_no_other_and_can_be_removed(self):
        """Their addresses are bound by somebody else: at the start neither can be opened, later one can."""
        with serving.standalone(self.host) as server:
            first, second = (server.deploy(name, serving.saying(name)).json['ipv6'] for name in ('first', 'second'))
            server.stop()
            hold = 'import socket, sys, time\nkept = []\nfor address in sys.argv[1:]:\n'
            hold += '    sock = socket.socket(socket.AF_INET6)\n    sock.setsockopt(41, 78, 1)\n'  # IPV6_FREEBIND
            hold += '    sock.bind((address, 80))\n    sock.listen()\n    kept.append(sock)\n'
            hold += 'print("held", flush=True)\ntime.sleep(600)\n'
            holders = {}
            for ipv6 in (first, second):
                holders[ipv6] = self.host.popen(['/usr/bin/python3', '-c', hold, ipv6], stdout=subprocess.PIPE)
                self.addCleanup(holders[ipv6].stdout.close)
                self.addCleanup(holders[ipv6].wait)
                self.addCleanup(holders[ipv6].kill)
                self.assertEqual(b'held\n', holders[ipv6].stdout.readline())
            server.lines.clear()
            server.start()
            self.assertEqual(['unreachable'] * 2, [item['status'] for item in server.api('GET', '/api/list').json])
            holders[second].kill()
            lab.wait_until(lambda: server.status_of('second')['status'] == 'idle', 15, 'the second to be opened')
            self.assertEqual('second', server.get(second))
            self.assertEqual('unreachable', server.status_of('first')['status'])
            self.assertEqual(200, server.api('DELETE', '/api/remove/first').status)
            holders[first].kill()
            lab.wait_until(lambda: server.printed('[listener] is well again'), 15, 'nothing to be opened any more')
            self.assertEqual(['second'], [item['name'] for item in server.api('GET', '/api/list').json])

    def test_a_second_faasd_does_not_start_where_the_lock_file_is_gone(self):
        with serving.standalone(self.host) as server:
            ipv6 = server.deploy('kept', serving.saying('kept')).json['ipv6']
            self.host.path('/run/faasd/faasd.lock').unlink()
            done = self.host.run([*serving.FAASD, '--standalone'], ok=(1,))
            self.assertIn('another faasd runs on this host', done.stderr)
            self.assertEqual('kept', server.get(ipv6))
            self.assertEqual('ok', server.api('GET', '/api/health').json['status'])

    def test_a_thread_that_must_live_ends_faasd_with_it_and_the_next_start_repairs(self):
        with serving.standalone(self.host) as server:
            ipv6 = server.deploy('kept', serving.saying('kept')).json['ipv6']
            server.stop()
            for module, name, thread in (
                ('control.monitor', 'Monitor', 'monitor'),
                ('handlers.serving.injection', 'Injector', 'injector'),
                ('handlers.containers.logs', 'LogCopier', 'logs'),
            ):
                code = f'import sys, faasd, {module}\n{module}.{name}._run = lambda self: None\n'
                code += 'sys.exit(faasd.main())\n'
                done = self.host.run([serving.FAASD[0], '-c', code, '--standalone'], ok=(os.EX_SOFTWARE,))
                self.assertIn(f'[faasd] the thread {thread} has ended, and faasd with it', done.stdout)
            server.lines.clear()
            server.start()
            self.assertEqual('kept', server.get(ipv6))

    def test_the_version_is_said_everywhere(self):
        done = self.host.run([*serving.FAASD, '--version'])
        self.assertEqual(f'faasd {VERSION}\n', done.stdout)
        with serving.standalone(self.host) as server:
            self.assertEqual(f'[faasd] faasd {VERSION}\n', server.lines[0])
            self.assertEqual(VERSION, server.api('GET', '/api/health').json['version'])
        client = (lab.REPO / 'faas').read_text()
        self.assertIn(f"\nVERSION = '{VERSION}'", client)

    def test_a_killed_run_leaves_nothing_that_the_next_does_not_clear(self):
        with serving.standalone(self.host) as server:
            ipv6 = server.deploy('kept', serving.saying('kept')).json['ipv6']
            instance = os.listdir(self.host.path('/run/faasd/instances'))[0]
            self.host.path('/var/lib/faasd/functions/.incoming-cut').mkdir()
            self.host.path('/var/lib/faasd/functions/1/9').mkdir()
            server.stop(signal.SIGKILL)
            server.lines.clear()
            server.start()
            instances = self.host.path('/run/faasd/instances')
            lab.wait_until(lambda: instance not in os.listdir(instances), 10, 'the former instance to go')
            self.assertEqual('kept', server.get(ipv6))
            self.assertEqual(['1'], os.listdir(self.host.path('/var/lib/faasd/functions')))
            self.assertFalse(self.host.path('/var/lib/faasd/functions/1/9').exists())
            self.assertEqual(1, len(self.host.run(['pgrep', 'coredns']).stdout.split()))
            self.assertLessEqual(len(self.host.run(['pgrep', 'wireguard-go'], ok=(0, 1)).stdout.split()), 1)
            self.assertEqual(1, len(self.host.run(['pgrep', '-f', 'runtime.py']).stdout.split()) // 2)

    def test_what_listens_by_itself_survives_the_death_of_faasd(self):
        """Nobody is turned away meanwhile; afterwards a next instance takes over, in which a listen() works again."""
        self.host.run([*serving.FAASD], ok=(1,))
        self.host.run(['wg-quick', 'up', 'wg0'])
        self.addCleanup(self.host.run, ['ip', 'link', 'delete', 'wg0'])
        server = serving.Server(self.host).start()
        try:
            ipv6 = server.deploy('listens', LISTENS).json['ipv6']
            first = server.get(ipv6)
            self.assertEqual('again', server.get(ipv6, '/listen'))
            answers, over = [], threading.Event()

            def ask():
                while not over.is_set():
                    answers.append(server.get(ipv6))

            with concurrent.futures.ThreadPoolExecutor() as threads:
                asking = threads.submit(ask)
                server.stop(signal.SIGKILL)
                self.assertIn('Function not implemented', server.get(ipv6, '/listen'))
                self.assertEqual(first, server.get(ipv6))
                server.lines.clear()
                server.start()
                lab.wait_until(lambda: server.get(ipv6) != first, 10, 'the next instance')
                lab.wait_until(
                    lambda: len(os.listdir(self.host.path('/run/faasd/instances'))) == 1, 20, 'the end of the first'
                )
                self.assertEqual('again', server.get(ipv6, '/listen'))
                over.set()
                asking.result(10)
            self.assertEqual({first, server.get(ipv6)}, set(answers))
        finally:
            server.stop()
        self.assertEqual('', self.host.run(['nft', 'list', 'ruleset']).stdout)
        self.assertEqual(['faasd.lock'], os.listdir(self.host.path('/run/faasd')))

    def test_restarts_under_load_lose_nothing_of_what_listens_by_itself(self):
        self.host.run([*serving.FAASD], ok=(1,))
        self.host.run(['wg-quick', 'up', 'wg0'])
        self.addCleanup(self.host.run, ['ip', 'link', 'delete', 'wg0'])
        server = serving.Server(self.host).start()
        try:
            old, new = '(self):\n        text', '(self):\n        self.protocol_version = "HTTP/1.1"\n        text'
            files = {**LISTENS, 'server.py': LISTENS['server.py'].replace(old, new)}
            ipv6 = server.deploy('listens', files).json['ipv6']
            instances = self.host.path('/run/faasd/instances')
            command = [sys.executable, 'tests/load.py', ipv6, '24', '2000', '']
            with self.host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
                for _ in range(6):
                    first = server.get(ipv6)
                    server.stop(signal.SIGKILL)
                    server.lines.clear()
                    server.start()
                    lab.wait_until(lambda first=first: server.get(ipv6) != first, 20, 'the next instance')
                    lab.wait_until(lambda: len(os.listdir(instances)) == 1, 30, 'the end of the former')
                found = json.loads(load.communicate(timeout=60)[0])
            self.assertEqual({}, found['lost'])
            self.assertGreaterEqual(found['asked'], 2000)
        finally:
            server.stop()

    def test_a_deploy_cut_off_by_a_kill_is_forgotten(self):
        with serving.standalone(self.host) as server:
            sleeping = {'handler.py': 'import time\ntime.sleep(60)\n'}
            with concurrent.futures.ThreadPoolExecutor() as threads:
                cut = threads.submit(server.deploy, 'cut', sleeping)
                lab.wait_until(lambda: server.printed('Listening on'), 10, 'the listener')
                server.stop(signal.SIGKILL)
                self.assertIsNotNone(cut.exception())
            server.lines.clear()
            server.start()
            self.assertEqual([], server.api('GET', '/api/list').json)
            self.assertEqual('fd00:faa5:1:0::a', server.deploy('whole', serving.saying('x')).json['ipv6'])

    def test_it_expects_wg0_and_says_what_is_missing(self):
        def refusal(*arguments):
            return self.host.run(
                [*serving.FAASD, *arguments], ok=(1,), env={'FAAS_VPN_ENDPOINT': 'faas.example.com'}
            ).stderr

        self.assertRegex(refusal(), r'^faasd: there is no interface wg0 \(.*wg-quick@wg0.*\)\n$')
        self.host.run(['ip', 'tuntap', 'add', 'wg0', 'mode', 'tun'])
        self.assertRegex(refusal(), r'^faasd: wg0 is not a WireGuard interface \(.*FAAS_WG_INTERFACE.*\)\n$')
        self.host.run(['ip', 'link', 'delete', 'wg0'])
        self.host.run(['wg-quick', 'up', 'wg0'])
        self.assertRegex(refusal('--standalone'), r'^faasd: there is an interface wg0 already \(.*\)\n$')
        self.assertEqual('', self.host.run(['nft', 'list', 'ruleset']).stdout)
        self.host.run(['ip', 'link', 'delete', 'wg0'])

    def test_the_documents_command_on_a_prepared_wg0(self):
        """sudo python3 faasd.py: wg-quick brought wg0 up and CoreDNS runs; both outlive faasd."""
        self.host.run([*serving.FAASD], ok=(1,))  # makes keys and wg0.conf, then misses wg0
        self.host.run(['wg-quick', 'up', 'wg0'])
        server = serving.Server(self.host).start()
        try:
            reply = server.deploy('fibonacci', serving.example('fibonacci')).json
            self.assertEqual('deployed, not yet in DNS', reply['warning'])  # CoreDNS is down
            problems = server.api('GET', '/api/health').json['problems']
            self.assertEqual(['dns'], [problem['area'] for problem in problems])
            coredns = ['coredns', '-quiet', '-conf', '/etc/coredns/Corefile']
            with self.host.popen(coredns, stdout=subprocess.DEVNULL) as dns:
                self.addCleanup(dns.kill)
                lab.wait_until(lambda: server.api('GET', '/api/health').json['status'] == 'ok', 10, 'CoreDNS')
                self.assertIsNone(server.deploy('fibonacci', serving.example('fibonacci')).json['warning'])
                dns.terminate()
            self.assertIn('0, 1, 1, 2', server.get(reply['ipv6']))
            self.host.run(['ip', 'link', 'delete', 'wg0'])
            lab.wait_until(lambda: server.printed('wg0 is gone'), 5, 'the event')
            self.assertIn('wg0', json.dumps(server.api('GET', '/api/health').json['problems']))
            self.host.run(['wg-quick', 'up', 'wg0'])
            lab.wait_until(lambda: server.printed('[wg0] is well again'), 10, 'wg0')
            self.assertIn('0, 1, 1, 2', server.get(reply['ipv6']))
        finally:
            self.assertEqual(0, server.stop())
        self.assertIn('fd00:faa5:0:100::1', self.host.run(['ip', 'address', 'show', 'wg0']).stdout)
        self.assertNotIn('fd00:faa5:1:', self.host.run(['ip', 'address', 'show', 'wg0']).stdout)
        self.host.run(['ip', 'link', 'delete', 'wg0'])

    def test_a_peer_that_somebody_gave_to_wg0_is_not_cut_off(self):
        self.host.run([*serving.FAASD], ok=(1,))
        theirs = key()
        with open(self.host.path('/etc/wireguard/wg0.conf'), 'a') as file:
            file.write(f'[Peer]\nPublicKey = {theirs}\nAllowedIPs = fd00:faa5:0:100::77/128\n')
        self.host.run(['wg-quick', 'up', 'wg0'])
        refused = self.host.run([*serving.FAASD], ok=(1,)).stderr
        self.assertIn(f'wg0 has a peer that faasd does not know: {theirs} (give it a file in', refused)
        self.assertIn(theirs, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.host.path('/etc/wireguard/peers/theirs.conf').write_text(
            f'[Peer]\nPublicKey = {theirs}\nAllowedIPs = fd00:faa5:0:100::77/128\n'
        )
        server = serving.Server(self.host).start()
        self.assertIn(theirs, self.host.run(['wg', 'show', 'wg0', 'peers']).stdout)
        self.assertEqual(0, server.stop())
        self.host.run(['wg', 'set', 'wg0', 'listen-port', '51999'])
        refused = self.host.run([*serving.FAASD], ok=(1,)).stderr
        self.assertRegex(refused, 'listens on UDP port 51999, not on 51820 .set FAAS_WG_PORT')
        self.host.run(['ip', 'link', 'delete', 'wg0'])

    def test_a_port_in_use_is_named_with_who_holds_it_and_nothing_is_made(self):
        for kind, port, hint in (
            ('UDP', 51820, 'FAAS_WG_PORT'), ('UDP', 53, 'of its own'), ('TCP', 53, 'of its own'),
            ('TCP', 80, 'of its own'), ('TCP', 8080, 'of its own'),
        ):
            for how in ('--standalone', '--prepare'):
                with self.subTest(kind=kind, port=port, how=how), serving.holding(self.host, kind, port):
                    refused = self.host.run([*serving.FAASD, how], ok=(1,))
                    said = rf'^faasd: {kind} port {port} is in use by python3 \(.*{hint}.*\)\n$'
                    self.assertRegex(refused.stderr, said)
                    self.assertNotIn('wg0', self.host.run(['ip', 'link']).stdout)
                    self.assertEqual([], os.listdir(self.host.path('/etc/wireguard')))

    def test_addresses_in_use_on_another_interface_are_named(self):
        self.host.run(['ip', 'link', 'add', 'other', 'type', 'veth', 'peer', 'name', 'end'])
        self.host.run(['ip', 'address', 'add', 'fd00:faa5:1:0::7/128', 'dev', 'other'])
        refused = self.host.run([*serving.FAASD, '--standalone'], ok=(1,)).stderr
        said = 'faasd: fd00:faa5::/32 is in use on this host: other has fd00:faa5:1::7 (take other down'
        self.assertIn(said, refused)
        self.host.run(['ip', 'address', 'flush', 'dev', 'other'])
        self.host.run(['ip', 'link', 'set', 'other', 'up'])
        self.host.run(['ip', 'route', 'add', 'fd00:faa5:3::/48', 'dev', 'other'])
        refused = self.host.run([*serving.FAASD, '--prepare'], ok=(1,)).stderr
        self.assertIn('in use on this host: other has fd00:faa5:3::/48', refused)
        self.assertEqual([], os.listdir(self.host.path('/etc/wireguard')))

    def test_a_wg0_that_is_not_ours_is_left_alone(self):
        self.host.path('/etc/wireguard/wg0.conf').write_text(f'[Interface]\nPrivateKey = {key()}\n')
        for how in ('--standalone', '--prepare'):
            refused = self.host.run([*serving.FAASD, how], ok=(1,)).stderr
            self.assertRegex(refused, r"^faasd: wg0 is not faasd's: .*wg0.conf .*\(set FAAS_WG_INTERFACE.*\)\n$")
            self.assertEqual(['wg0.conf'], os.listdir(self.host.path('/etc/wireguard')))

    def test_prepare_makes_what_wg_quick_needs_and_follows_the_port(self):
        env = {'FAAS_VPN_ENDPOINT': 'faas.example.com'}
        prepare = [*serving.FAASD, '--prepare']
        self.host.run(prepare, env=env)
        conf = self.host.path('/etc/wireguard/wg0.conf')
        first = conf.read_text()
        self.host.run(prepare, env=env)
        self.assertEqual(first, conf.read_text())
        self.host.run(prepare, env={**env, 'FAAS_WG_PORT': '51999'})
        self.assertEqual(first.replace('51820', '51999'), conf.read_text())
        conf.write_text(first + '# mine\n')
        self.host.run(prepare, env={**env, 'FAAS_WG_PORT': '51999'})
        self.assertEqual(first + '# mine\n', conf.read_text())
        self.assertEqual([], os.listdir(self.host.path('/var/lib/faasd')))

    def test_prepare_for_another_name_of_wg0_while_the_first_is_up(self):
        """What our own interface and CoreDNS have is not in use; what others have is, also while faasd runs."""
        prepare, moved = [*serving.FAASD, '--prepare'], {'FAAS_WG_INTERFACE': 'wg7'}
        conf = self.host.path('/etc/wireguard/wg7.conf')
        with serving.standalone(self.host):
            self.host.run(prepare)
            self.host.run(prepare, env=moved)
            self.assertEqual(self.host.path('/etc/wireguard/wg0.conf').read_text(), conf.read_text())
            with serving.holding(self.host, 'UDP', 51999):
                refused = self.host.run(prepare, env={'FAAS_WG_PORT': '51999'}, ok=(1,)).stderr
                self.assertIn('UDP port 51999 is in use by python3', refused)
            conf.write_text(theirs := f'[Interface]\nPrivateKey = {key()}\n')
            self.assertIn("wg7 is not faasd's", self.host.run(prepare, env=moved, ok=(1,)).stderr)
            self.assertEqual(theirs, conf.read_text())
        conf.unlink()
        self.host.run(['wg-quick', 'up', 'wg0'])
        self.host.run(prepare, env=moved)
        refused = self.host.run(serving.FAASD, env=moved, ok=(1,)).stderr
        self.assertIn('in use on this host: wg0 has fd00:faa5:0:100::', refused)
        self.host.run(['ip', 'link', 'delete', 'wg0'])

    def test_ipv6_switched_off_is_said(self):
        self.host.run(['sysctl', '-qw', 'net.ipv6.conf.default.disable_ipv6=1'])
        refused = self.host.run([*serving.FAASD, '--standalone'], ok=(1,)).stderr
        hint = 'sysctl -w net.ipv6.conf.default.disable_ipv6=0'
        self.assertEqual(f'faasd: IPv6 is switched off on this host ({hint})\n', refused)

    def test_crun_serves_where_it_can_and_says_why_where_not(self):
        packages.put(self.host, 'crun')
        with serving.standalone(self.host, FAAS_RUNTIME='crun') as server:
            reply = server.deploy('hello', serving.saying('hello'))
            if os.path.exists('/sys/fs/cgroup/cgroup.controllers'):
                self.assertEqual('hello', server.get(reply.json['ipv6']))
                self.assertNotRegex(self.host.sh('ps -eo stat,comm'), r'(?m)^Z\S* +crun')
            else:
                self.assertEqual(422, reply.status)
                self.assertIn('cgroups in hybrid mode not supported', reply.json['error'])

    def test_a_terminal_that_goes_ends_it_well(self):
        server = serving.Server(self.host, '--standalone').start()
        self.assertEqual(0, server.stop(signal.SIGHUP))
        self.assertEqual(['faasd.lock'], os.listdir(self.host.path('/run/faasd')))

    def test_a_strict_umask_of_roots_is_no_trouble(self):
        with serving.standalone(self.host, umask=0o077) as server:
            self.assertEqual('x', server.get(server.deploy('strict', serving.saying('x')).json['ipv6']))

    def test_stop_in_the_middle_of_a_deploy_leaves_nothing(self):
        server = serving.Server(self.host, '--standalone').start()
        server.deploy('old', serving.saying('old'))
        slow = 'import time\ntime.sleep(20)\n'
        with concurrent.futures.ThreadPoolExecutor() as threads:
            running = [threads.submit(server.deploy, name, {'handler.py': slow}) for name in ('old', 'new')]
            lab.wait_until(lambda: server.printed('for new'), 10, 'the listener')
            lab.wait_until(lambda: len(os.listdir(self.host.path('/run/faasd/instances'))) == 3, 10, 'both instances')
            started = time.monotonic()
            self.assertEqual(0, server.stop())
            self.assertLess(time.monotonic() - started, 18)
            for each in running:
                with contextlib.suppress(ConnectionError, http.client.HTTPException):
                    self.assertIn(each.result().status, (422, 503))
        self.assertFalse(server.printed('Traceback'), ''.join(server.lines))
        self.assertEqual(['faasd.lock'], os.listdir(self.host.path('/run/faasd')))

    def test_coredns_that_cannot_start_says_why(self):
        with serving.standalone(self.host) as server:
            server.stop()
            self.host.path('/etc/coredns/Corefile').write_text('faas:53 {\n    no_such_plugin\n}\n')
            server.lines.clear()
            server.start()
            self.assertFalse(server.printed('CoreDNS answers'))
            lab.wait_until(lambda: server.printed("Unknown directive 'no_such_plugin'"), 10, 'the reason')
            self.assertEqual('degraded', server.api('GET', '/api/health').json['status'])

    def test_it_refuses_a_second_one_and_does_not_run_without_root(self):
        with serving.standalone(self.host):
            again = self.host.run([*serving.FAASD, '--standalone'], ok=(1,))
            self.assertRegex(again.stderr, r'^faasd: another faasd runs on this host')
        # Nobody, but able to read a checkout in /root.
        plain = ['setpriv', '--reuid', '65534', '--clear-groups', '--inh-caps', '+dac_read_search']
        plain += ['--ambient-caps', '+dac_read_search', '/usr/bin/python3', 'faasd.py']
        self.assertRegex(self.host.run(plain, ok=(1,)).stderr, r'^faasd: faasd needs root')

    def test_a_full_range_is_a_named_error(self):
        with serving.standalone(self.host) as server:
            server.stop()
            self.host.run(
                ['/usr/bin/python3', '-c',
                 'import sqlite3\n'
                 'db = sqlite3.connect("/var/lib/faasd/registry.db")\n'
                 'rows = [(n, host) for n in ("fd00:faa5:1:0", "fd00:faa5:0:100") for host in range(10, 65536)]\n'
                 'db.executemany("INSERT INTO addresses VALUES (?, ?, NULL)", rows)\n'
                 'db.commit()\n']
            )
            server.lines.clear()
            server.start()
            reply = server.deploy('full', serving.saying('x'))
            self.assertEqual(507, reply.status)
            self.assertIn('are in use', reply.json['error'])
            reply = server.api('POST', '/api/vpn/create', {'name': 'full', 'public_key': key()})
            self.assertEqual(507, reply.status)
            self.assertEqual([], server.api('GET', '/api/vpn/list').json)

    def test_open_enrolment_is_announced_and_takes_bare_requests(self):
        with serving.standalone(self.host, FAAS_ENROLL='open') as server:
            self.assertTrue(server.printed('FAAS_ENROLL=open'))
            body = json.dumps({'name': 'anyone', 'public_key': key()})
            out = self.host.run(['curl', '-s', '-d', body, 'http://127.0.0.1:51820/api/vpn/create']).stdout
            self.assertEqual('fd00:faa5:0:100::a', json.loads(out)['ipv6'])

    def test_the_enroll_address_is_closed_without_an_invite(self):
        with serving.standalone(self.host) as server:
            self.assertNotIn(':51820', self.host.run(['ss', '-Htln']).stdout)
            server.api('POST', '/api/vpn/invite', {'expires': 60})
            self.assertIn(':51820', self.host.run(['ss', '-Htln']).stdout)

    def test_an_enroll_port_in_use_is_a_clear_error(self):
        with serving.holding(self.host, 'TCP', 51820), serving.standalone(self.host) as server:
            reply = server.api('POST', '/api/vpn/invite', {})
            self.assertEqual(503, reply.status)
            self.assertIn('FAAS_ENROLL_BIND', reply.json['hint'])

    def test_stop_does_not_wait_for_those_who_hold_the_api(self):
        with serving.standalone(self.host) as server, contextlib.ExitStack() as held:
            for _ in range(20):  # more than it has threads
                sock = held.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(self.host.path('/run/faasd/faasd.sock')))
                sock.sendall(b'GET /api/')
            started = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - started, 5)

    def test_stop_lets_a_running_request_finish(self):
        server = serving.Server(self.host, '--standalone').start()
        ipv6 = server.deploy('slow', {'handler.py': SLOW % 1.5}).json['ipv6']
        with concurrent.futures.ThreadPoolExecutor() as threads:
            running = threads.submit(server.get, ipv6)
            lab.wait_until(lambda: ':80 ' in self.host.run(['ss', '-Htn']).stdout, 5, 'a client')
            self.assertEqual(0, server.stop(signal.SIGINT))
            self.assertEqual('slow', running.result())


if __name__ == '__main__':
    unittest.main()
