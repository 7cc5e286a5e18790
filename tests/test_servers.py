"""Servers that others wrote, unmodified, as images and as folders: a real faasd serves them all."""

import concurrent.futures
import contextlib
import http.client
import ipaddress
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

from tests import images, inside, lab, packages, programs, serving
from tests.test_faasd import CONTROL

GATEWAY = 'fd00:faa5:0:100::1'
REDEPLOYS, REQUESTS = 5, 20_000

WSGI = """
def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [f'peer {environ["REMOTE_ADDR"]}'.encode()]
"""
ASGI = """
async def app(scope, receive, send):
    if scope['type'] == 'http':
        text = f'peer {scope["client"][0]}'.encode()
        headers = [(b'content-length', str(len(text)).encode())]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
        await send({'type': 'http.response.body', 'body': text})
"""
FLASK = """
from flask import Flask, request
app = Flask(__name__)
@app.get('/')
def peer():
    return f'peer {request.remote_addr}'
"""
AIOHTTP = """
from aiohttp import web
async def peer(request):
    return web.Response(text=f'peer {request.remote}')
app = web.Application()
app.router.add_get('/', peer)
web.run_app(app, host=%r, port=80)
"""
NODE = """
const http = require('node:http')
http.createServer((request, response) => {
  const text = `peer ${request.socket.remoteAddress}`
  response.setHeader('Content-Length', text.length)
  response.end(text)
}).listen(80)
"""
CLUSTER = """
const cluster = require('node:cluster')
if (cluster.isPrimary) {
  for (let i = 0; i < 2; i++) cluster.fork()
  cluster.on('exit', () => cluster.fork())
} else {
%s
}
""" % NODE  # fmt: skip
GO = """package main

import (
	"fmt"
	"net"
	"net/http"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "peer %s", host)
	})
	panic(http.ListenAndServe(":80", nil))
}
"""
JAVA = """
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

public class Main {
    public static void main(String[] args) throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress(80), 0);
        server.createContext("/", exchange -> {
            byte[] text = ("peer " + exchange.getRemoteAddress().getAddress().getHostAddress()).getBytes();
            exchange.sendResponseHeaders(200, text.length);
            exchange.getResponseBody().write(text);
            exchange.close();
        });
        server.setExecutor(Executors.newCachedThreadPool());
        server.start();
    }
}
"""
JAVA_SOCKETS = """
import java.net.ServerSocket;
import java.net.Socket;

public class Main {
    public static void main(String[] args) throws Exception {
        ServerSocket server = new ServerSocket(80);
        while (true) {
            Socket client = server.accept();
            new Thread(() -> answer(client)).start();
        }
    }

    static void answer(Socket client) {
        try (client) {
            client.getInputStream().read(new byte[4096]);
            String text = "peer " + client.getInetAddress().getHostAddress();
            String head = "HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: " + text.length();
            client.getOutputStream().write((head + "\\r\\n\\r\\n" + text).getBytes());
        } catch (Exception error) {
            error.printStackTrace();
        }
    }
}
"""
JAVA_LIMITS = JAVA.replace(
    '("peer " + exchange.getRemoteAddress().getAddress().getHostAddress())',
    '(Runtime.getRuntime().availableProcessors() + " " + Runtime.getRuntime().maxMemory())',
)
# Of the standard library: processes that accept at one socket, and a parent that replaces them.
FORKING = """
import http.server, os, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        text = f'peer {self.client_address[0]}'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
server = Server(('::', 80), Handler)
def fork():
    if os.fork() == 0:
        server.serve_forever()
for _ in range(3):
    fork()
while True:
    os.wait()
    fork()
"""
TWICE = FORKING.partition('def fork')[0] + """
import threading
metrics = Server(('::', 9090), Handler)
threading.Thread(target=metrics.serve_forever, daemon=True).start()
server.serve_forever()
"""
CGI = '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\npeer $REMOTE_ADDR"\n'
# nginx under its own Debian configuration; a site for each way to listen.
SITE = (
    'proxy_cache_path /var/cache/nginx/proxy keys_zone=proxy:1m;\n'
    'server { %s location / { return 200 "peer $remote_addr"; } }\n'
)


def image(*layers, command, form='docker', **config):
    return images.image(
        [each.layer() if isinstance(each, programs.Files) else each for each in layers],
        {'Cmd': command, **config},
        form=form,
    )


def python_image(text, *command, packages=(), **more):
    files = programs.Files().package(*packages), programs.Files().put('/app/app.py', text)
    return image(programs.python(), *files, command=list(command), WorkingDir='/app', **more)


def go_image():
    with tempfile.TemporaryDirectory() as work:
        pathlib.Path(work, 'main.go').write_text(GO)
        programs.compiled_go(work, f'{work}/server')
        return image(programs.Files().copy(f'{work}/server', '/server'), command=['/server'], form='oci')


def nginx_image(site=None):
    layers = [programs.Files().put('/etc/nginx/sites-enabled/default', site)] if site else []
    command = ['nginx', '-g', 'daemon off;']
    return image(programs.nginx(), *layers, command=command, StopSignal='SIGQUIT', ExposedPorts={'80/tcp': {}})


def visit(ipv6, path, times, source):
    """[(status, text, the client's port), …] of requests on one connection, as long as it is kept."""
    client = http.client.HTTPConnection(ipv6, 80, timeout=10, source_address=(source, 0) if source else None)
    found = []
    with contextlib.closing(client):
        for _ in range(times):
            client.request('GET', path)
            port = client.sock.getsockname()[1]
            with client.getresponse() as response:
                found.append((response.status, response.read().decode(), port))
    return found


@lab.needs_root
class Hosted(unittest.TestCase):
    """Tests that share a host and its faasd; what they deploy stays, so that images share layers."""

    host = server = None

    @classmethod
    def setUpClass(cls):
        if Hosted.host is None:
            unittest.addModuleCleanup(programs.forget)
            Hosted.host = unittest.enterModuleContext(lab.Host('server'))
            settings = {'FAAS_START_TIMEOUT': '15', 'FAAS_STOP_TIMEOUT': '2'}
            Hosted.server = unittest.enterModuleContext(serving.standalone(Hosted.host, **settings))

    def deploy(self, name, archive):
        """The answer to its deploy, which went well."""
        reply = self.server.deploy(name, archive)
        self.assertEqual(200, reply.status, reply.body.decode())
        return reply.json

    def refuse(self, name, archive):
        reply = self.server.deploy(name, archive)
        self.assertEqual(422, reply.status, reply.body.decode())
        return reply.json

    def visit(self, ipv6, path='/', times=3, source=None):
        return inside.call(self.host, visit, ipv6, path, times, source)

    def serves(self, name, archive, path='/', kept=True, peers=True):
        """Deploy it and visit it from two addresses; its own address."""
        reply = self.deploy(name, archive)
        if peers:
            self.assertIsNone(reply['warning'], reply)
        self.visits(reply['ipv6'], path, kept, peers)
        return reply['ipv6']

    def visits(self, ipv6, path='/', kept=True, peers=True):
        for source in (ipv6, GATEWAY):
            answers = self.visit(ipv6, path, source=source)
            self.assertEqual([200] * 3, [status for status, _, _ in answers], answers)
            self.assertEqual(1 if kept else 3, len({port for _, _, port in answers}), answers)
            for _, text, _ in answers if peers else ():
                said = ipaddress.ip_address(text.removeprefix('peer ').strip('[]\n'))
                self.assertEqual(ipaddress.ip_address(source), said, text)

    def instance(self, name):
        """The record of the function's only instance."""
        files = self.host.path('/run/faasd/instances').glob('*/record.json')
        records = [json.loads(each.read_text()) for each in files]
        (record,) = [record for record in records if record['function'] == name]
        return record

    def children(self, name):
        """The pids of its first one's children, as text, but for nginx's two that do not serve."""
        said = self.host.run(['pgrep', '-a', '-P', self.instance(name)['pid']], ok=None).stdout
        return [line.split()[0] for line in said.splitlines() if 'nginx: cache' not in line]

    def replaces_killed_workers(self, name, workers, ipv6, **more):
        """Each of its `workers` processes dies, the first one starts others, and they serve."""
        children = lambda: self.children(name)  # noqa: E731
        before = lab.wait_until(lambda: len(now := children()) == workers and now, 10, 'the workers')
        for killed in before[-1:], before[:-1]:
            self.host.run(['kill', '-9', *killed])
            lab.wait_until(
                lambda killed=killed: len(now := children()) == workers and not set(now) & set(killed), 10, 'others'
            )
        self.visits(ipv6, **more)
        self.assertEqual('running', self.server.status_of(name)['status'])


class Images(Hosted):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        later = cls.enterClassContext(concurrent.futures.ThreadPoolExecutor())
        silent = image(programs.busybox(), command=['busybox', 'sleep', '600'])
        cls.silent = later.submit(cls.server.deploy, 'silent', silent)  # which takes as long as it may

    def test_the_documents_handler_asks_for_a_connection(self):
        archive = python_image(CONTROL, 'python3', 'app.py')
        ipv6 = self.deploy('control', archive)['ipv6']
        for _ in range(3):
            ((status, text, _),) = self.visit(ipv6, times=1)
            self.assertEqual((200, f'hello {ipaddress.ip_address(ipv6)}'), (status, text))

    def test_go(self):
        self.serves('static', go_image())

    def test_nginx_as_debian_sets_it_up(self):
        archive = nginx_image()
        ipv6 = self.deploy('nginx', archive)['ipv6']
        for source in (ipv6, GATEWAY):
            answers = self.visit(ipv6, source=source)
            self.assertEqual({(200, '<h1>Welcome to nginx!</h1>\n')}, {each[:2] for each in answers})
            self.assertEqual(1, len({port for _, _, port in answers}))
        for source in (ipv6, GATEWAY):
            line = f'{ipaddress.ip_address(source)} - - ['.encode()
            lab.wait_until(lambda line=line: self.server.api('GET', '/api/logs/nginx').body.count(line) == 3, 5, line)
        worker = self.children('nginx')[0]
        www_data = self.instance('nginx')['ids'][0] + 33
        self.assertEqual(f'{www_data}', self.host.run(['stat', '-c', '%u', f'/proc/{worker}']).stdout.strip())

    def test_nginx_on_both_families(self):
        self.serves('nginx-both', nginx_image(SITE % 'listen 80; listen [::]:80;'))

    def test_nginx_with_reuseport(self):
        self.serves('nginx-reuse', nginx_image(SITE % 'listen 80 reuseport; listen [::]:80 reuseport;'))

    def test_nginx_on_ipv4_alone_is_refused(self):
        answer = self.refuse('nginx-four', nginx_image(SITE % 'listen 80;'))
        self.assertIn('IPv4 alone', answer['error'])
        self.assertIn('[::]', answer['hint'])

    def test_nginx_replaces_its_workers(self):
        ipv6 = self.serves('nginx-workers', nginx_image('# two\n' + SITE % 'listen 80; listen [::]:80;'))
        self.replaces_killed_workers('nginx-workers', os.cpu_count(), ipv6)

    def test_node(self):
        files = programs.Files().put('/app/server.js', NODE)
        self.serves('server-js', image(programs.node(), files, command=['node', '/app/server.js']))

    def test_node_cluster(self):
        files = programs.Files().put('/app/server.js', CLUSTER)
        ipv6 = self.serves('cluster', image(programs.node(), files, command=['node', '/app/server.js']))
        self.replaces_killed_workers('cluster', 2, ipv6)

    def gunicorn(self, *more):
        return python_image(WSGI, 'gunicorn', '--workers=2', *more, 'app:app', packages=['gunicorn'])

    def test_gunicorn(self):
        ipv6 = self.serves('gunicorn', self.gunicorn('--bind=[::]:80'), kept=False)
        self.replaces_killed_workers('gunicorn', 2, ipv6, kept=False)

    def test_gunicorn_with_workers_of_another_user(self):
        archive = self.gunicorn('--bind=[::]:80', '--user=www-data', '--group=www-data')
        ipv6 = self.serves('gunicorn-user', archive, kept=False)
        self.replaces_killed_workers('gunicorn-user', 2, ipv6, kept=False)

    def test_gunicorn_on_ipv4_works_and_is_warned_of(self):
        reply = self.deploy('gunicorn-four', self.gunicorn('--bind=0.0.0.0:80'))
        self.assertIn('IPv4 alone', reply['warning'])
        self.assertIn('[::]', reply['hint'])
        self.visits(reply['ipv6'], kept=False, peers=False)

    def test_uvicorn(self):
        self.serves('uvicorn', uvicorn_image('--host=::'))

    def test_uvicorn_on_ipv4_works_and_is_warned_of(self):
        reply = self.deploy('uvicorn-four', uvicorn_image('--host=0.0.0.0'))
        self.assertIn('IPv4 alone', reply['warning'])
        self.visits(reply['ipv6'], peers=False)

    def test_uvicorn_with_workers(self):
        self.serves('uvicorn-two', uvicorn_image('--host=::', '--workers=2'))

    def test_flasks_own_server(self):
        command = ['python3', '-m', 'flask', 'run', '--host=::', '--port=80']
        self.serves('dev', python_image(FLASK, *command, packages=['python3-flask']), kept=False)

    def test_aiohttp(self):
        self.serves('aiohttp', python_image(AIOHTTP % '::', 'python3', 'app.py', packages=['python3-aiohttp']))

    def test_java(self):
        for name, source, kept in (('java', JAVA, True), ('java-sockets', JAVA_SOCKETS, False)):
            with self.subTest(name):
                files = programs.Files()
                for path, content in programs.compiled_java('Main', source).items():
                    files.put(f'/app/{path}', content)
                archive = image(programs.java(), files, command=['java', '-cp', '/app', 'Main'])
                self.serves(name, archive, kept=kept)

    def test_java_knows_its_limits(self):
        files = programs.Files()
        for path, content in programs.compiled_java('Main', JAVA_LIMITS).items():
            files.put(f'/app/{path}', content)
        ipv6 = self.deploy('limits', image(programs.java(), files, command=['java', '-cp', '/app', 'Main']))['ipv6']
        processors, heap = map(int, self.visit(ipv6, times=1)[0][1].split())
        self.assertEqual(1, processors)
        self.assertLess(heap, 256 << 20)

    def test_where_it_sees_its_limits_nothing_can_be_written(self):
        command = 'for f in $(find /sys -type d); do mkdir $f/x 2>/dev/null && echo $f; done; find /sys | wc -l'
        command = f'({command}) >/www/index.html; exec httpd -f -p 80 -h /www'
        files = programs.Files().folder('/www')
        for name in ('find', 'mkdir', 'wc', 'httpd'):
            files.link(f'/usr/bin/{name}', 'busybox')
        ipv6 = self.deploy('limits-written', image(programs.busybox(), files, command=['sh', '-c', command]))['ipv6']
        self.assertGreater(int(self.visit(ipv6, times=1)[0][1]), 10)

    def test_busybox_httpd(self):
        files = programs.Files().put('/www/cgi-bin/peer', CGI, 0o755).put('/www/index.html', 'busybox')
        archive = image(programs.busybox(), files, command=['busybox', 'httpd', '-f', '-p', '80', '-h', '/www'])
        ipv6 = self.serves('busybox', archive, '/cgi-bin/peer', kept=False)
        self.assertEqual('busybox', self.visit(ipv6)[0][1])

    def test_another_user_opens_its_output(self):
        command = ['sh', '-c', 'echo started >/dev/stdout; exec busybox httpd -f -p 80 -h /www 2>/dev/stderr']
        archive = image(programs.busybox(), programs.Files().put('/www/index.html', 'x'), command=command, User='33')
        ipv6 = self.deploy('output', archive)['ipv6']
        self.assertEqual('x', self.visit(ipv6)[0][1])
        self.assertEqual(b'started\n', self.server.api('GET', '/api/logs/output').body)

    def test_one_that_forks_workers(self):
        ipv6 = self.serves('forking', python_image(FORKING, 'python3', '-u', 'app.py'))
        self.replaces_killed_workers('forking', 3, ipv6)

    def test_one_that_listens_twice(self):
        self.serves('twice', python_image(TWICE, 'python3', '-u', 'app.py'))

    def test_one_that_never_listens_is_refused(self):
        reply = self.silent.result()
        self.assertEqual(422, reply.status, reply.body.decode())
        self.assertIn('neither listened on a port nor connected to /control.sock', reply.json['error'])

    def test_after_sigkill_the_next_instance_serves(self):
        ipv6 = self.serves('killed', go_image())
        self.host.run(['kill', '-9', self.instance('killed')['pid']])
        self.visits(ipv6)


def uvicorn_image(*more, text=ASGI):
    return python_image(text, 'uvicorn', '--port=80', '--no-access-log', *more, 'app:app', packages=['uvicorn'])


class Load(Hosted):
    def redeploys(self, name, archive, text):
        """Redeploy it REDEPLOYS times while it is asked; nothing is lost."""
        ipv6 = self.deploy(name, archive)['ipv6']
        command = [sys.executable, 'tests/load.py', ipv6, '8', REQUESTS, text]
        with self.host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
            for _ in range(REDEPLOYS):
                self.deploy(name, archive)
            found = json.loads(load.communicate(timeout=60)[0])
        self.assertEqual({}, found['lost'])
        self.assertGreaterEqual(found['asked'], REQUESTS)

    def test_go(self):
        self.redeploys('load-go', go_image(), 'peer')

    def test_nginx(self):
        self.redeploys('load-nginx', nginx_image(), 'Welcome')

    def test_uvicorn(self):
        self.redeploys('load-uvicorn', uvicorn_image('--host=::'), 'peer')


class Examples(Hosted):
    """The folders in handlers/ that are not of Python alone; their programs are the host's."""

    def example(self, name, pattern, put=(), built=None):
        folder = pathlib.Path(lab.REPO, 'handlers', name)
        for package in put:
            try:
                packages.put(self.host, package)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                raise unittest.SkipTest(str(error)) from error
        with tempfile.TemporaryDirectory() as work:
            shutil.copytree(folder, work, dirs_exist_ok=True)
            if built:
                built(work)
            tar = subprocess.run(['tar', '-C', work, '-c', '.'], capture_output=True, check=True).stdout
        reply = self.deploy(name, tar)
        self.assertIsNone(reply['warning'])
        for source in (reply['ipv6'], GATEWAY):
            command = ['curl', '-sfg', '--max-time', '20', '--interface', str(ipaddress.ip_address(source))]
            said = self.host.run([*command, f'http://[{reply["ipv6"]}]/']).stdout
            self.assertRegex(said, pattern)
            self.assertIn(str(ipaddress.ip_address(source)), said)

    def test_node(self):
        put = () if self.host.path('/usr/bin/node').exists() else ('nodejs',)
        self.example('node', r'^Hello from Node \d', put)

    def test_go(self):
        self.example('go', '^Hello from Go, ', built=lambda work: programs.compiled_go(work, 'server'))

    def test_flask(self):
        self.example('flask', '^Hello from Flask, ', put=('python3-flask', 'gunicorn'))

    def test_fastapi(self):
        self.example('fastapi', '"hello":"FastAPI"', put=('python3-fastapi', 'uvicorn'))
